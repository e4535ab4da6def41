"""What ``explain`` tells of a program: shares, bytes, collectives, time, and what is left whole; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastpar.graph import roofline
from fastpar.graph.count import Collective, attainable, bytes_crossing, bytes_per_rank, collectives, flops, node_flops
from fastpar.graph.program import Program, source_line, target_name
from fastpar.graph.prologue import apart, checked, split
from fastpar.ops.late import outgoing
from fastpar.passes.localise import given_shape
from fastpar.plan import clock
from fastpar.plan.formula import Volume, dealt_bytes, volume
from fastpar.plan.generation import generation
from fastpar.plan.predict import predict
from fastpar.plan.topology import Topology
from fastpar.plan.workload import workload
from fastpar.run.build import Built
from fastpar.run.meeting import rounds
from fastpar.run.report import ExposedRow, FallbackReport, Hoisted, LinkRow, OrderRow, PlanRow, Replicated, Report
from fastpar.sharding.candidates import find, find_batch


@dataclass(frozen=True)
class Play:
    """What the clock is asked for besides one call: its timeline at any cost, and a generation."""

    timeline: bool = False
    steps: int | None = None
    streams: int = 1


def explained(built: Built, play: Play = Play()) -> Report:  # noqa: B008  (frozen)
    ranks = built.mesh.ranks
    eager = flops(built.captured)[0]
    shared = flops(built.lowered)
    # Of calls that are dealt, a rank runs one in ``deal``; what it does then is split over the other axes.
    deal = built.mesh.size((built.dealt,)) if built.dealt else 1
    batch = find_batch(built.captured.graph, built.captured.fixed) if built.plan.cfg else None
    tp = built.plan.tp or 1
    cut = built.lowered.gm.meta.get("cut", ())
    candidates = find(built.captured.graph) + ([batch] if batch else [])
    # the largest share of the rows that a rank has (an N-th, or what its speed gives it) in the mean of all steps
    axes = tuple(a for a in built.mesh.names if a not in (built.dealt, "tp"))
    shares = built.mesh.shares(axes)
    most = max(shares[built.mesh.coordinate(rank, axes)] / built.mesh.stride(rank) for rank in range(ranks))
    left = attainable(built.captured, candidates, 1 / most, cut, tp)
    times, whole = roofline.seconds(built.lowered), roofline.seconds(built.captured)[0]
    form = volume(built.lowered, built.plan, built.mesh)
    return Report(
        plan=str(built.plan),
        pipeline=str(built.pipeline),
        ranks=ranks,
        graphs=1,
        flops_share=max(shared) / eager / deal if eager else 1.0,
        attainable_share=left / eager / deal if eager else 1.0,
        time_share=max(times) / whole / deal if whole else 1.0,
        eager_flops=eager,
        eager_time=whole,
        replicated=_replicated(built, eager),
        fallbacks=_fallbacks(built),
        collectives=collectives(built.lowered) + _dealt(built),
        bytes_per_rank=max(bytes_per_rank(built.lowered)) // deal + sum(c.bytes for c in _dealt(built)),
        bytes_formula=form.bytes,
        hoisted=_hoisted(built, eager, deal),
        carried_bytes=carried_bytes(built.lowered),
        formula=form.text,
        symbols=form.values,
        collectives_formula=form.collectives,
        seconds=dict(built.seconds),
        **_timed(built, form, play),
        **_ordered(built),
        notes=list(map(str, built.notes)),
    )


def carried_bytes(program: Program) -> int:
    """Bytes that the largest rank keeps from call to call (pass ``displace``)."""
    mesh = program.mesh
    totals = [0] * mesh.ranks
    for node, given in zip(program.placeholders, program.inputs, strict=True):
        if given.kind == "carried":
            for rank in range(mesh.ranks):
                totals[rank] += roofline.node_bytes(node, given_shape(node, mesh, rank))
    for node in program.graph.nodes:
        if node.target is outgoing:  # what a rank sends when it next runs the model
            for rank in range(mesh.ranks):
                totals[rank] += roofline.node_bytes(node, roofline.local_shape(node, mesh, rank))
    return max(totals)


def _hoisted(built: Built, eager: int, deal: int) -> Hoisted:
    parts = split(built.lowered)
    varying = tuple(built.lowered.gm.meta.get("varying", ()))
    if parts is None:
        return Hoisted(varying=varying)

    def held(nodes: Sequence[Any]) -> int:
        ranks = range(built.mesh.ranks)
        return max(sum(roofline.node_bytes(n, roofline.local_shape(n, built.mesh, r)) for n in nodes) for r in ranks)

    return Hoisted(
        flops_share=(max(flops(built.lowered)) - max(flops(parts.step))) / eager / deal if eager else 0.0,
        bytes=(max(bytes_per_rank(built.lowered)) - max(bytes_per_rank(parts.step))) // deal,
        collectives=sum(c.count for c in collectives(parts.prologue)),
        values=len(parts.kept),
        kept_bytes=held(parts.kept),
        checked_bytes=held([part for several in checked(parts.prologue).values() for part in several]),
        agreements=int(apart(parts.prologue)),
        varying=varying,
    )


def _dealt(built: Built) -> list[Collective]:
    """The broadcasts of results where calls are dealt: the mean over calls, of which a rank sends one in ``deal``."""
    if not built.dealt:
        return []
    deal = built.mesh.size((built.dealt,))
    sent = dealt_bytes(built.captured, deal)
    return [Collective("broadcast", built.dealt, sent // deal, len(built.captured.outputs), "", "output")]


CLOCKED = 150_000
"""Operators, of all ranks together, that the clock may walk: about a minute. Else the planner's prediction is told."""


def _timed(built: Built, form: Volume, play: Play) -> dict[str, Any]:
    """Fields of the report that need a topology."""
    if built.choice is None:
        return {}
    box = built.choice.topology
    deal = built.mesh.size((built.dealt,)) if built.dealt else 1
    parts = ("seconds", "compute", "communication", "exposed")
    line, whole = None, {}
    if not play.timeline and play.steps is None and built.mesh.ranks * built.lowered.num_nodes > CLOCKED:
        found = predict(workload(built.captured), built.plan, box)
        predicted = {k: getattr(found, k) for k in parts}
        built.notes.append(f"predicted by the closed forms: the clock would have to walk {built.mesh.ranks} programs "
                           f"of {built.lowered.num_nodes:,} operators")  # fmt: skip
    else:
        programs = [built.localise(r) for r in range(built.mesh.ranks)]
        turns = rounds(built, programs) if built.plan.steps else [programs]
        line = clock.play([clock.call(turn, box) for turn in turns if any(turn)], built.mesh, box)
        predicted = {k: getattr(line, k) / deal / len(turns) for k in parts}
        if play.steps is not None:
            displaced = built.plan.displaced
            waiting = [built.first.localise(r) for r in range(built.mesh.ranks)] if built.first is not None else ()
            warmup = max(1, displaced.warmup) if displaced is not None else 0
            streams = math.ceil(play.streams / deal)
            run = generation(programs, box, play.steps, streams, waiting=waiting, warmup=warmup, rounds=turns)
            line, whole = run.timeline, {k: getattr(run, k) for k in ("seconds", "first", "step")}
            whole |= {"steps": play.steps, "streams": play.streams}
    rows = [
        PlanRow(v.plan, 1e3 * p.seconds, 1e3 * p.exposed, int(p.bytes), p.memory / 1e9, v.reason, p.links)
        if (p := v.prediction) is not None
        else PlanRow(v.plan, None, None, None, None, v.reason)
        for v in built.choice.verdicts
    ]
    return {
        "topology": box.name,
        "timeline": line,
        "generation": whole,
        "links": _links(built, form, box),
        "predicted": predicted,
        "plans": rows,
    }


def _links(built: Built, form: Volume, box: Topology) -> list[LinkRow]:
    """What crosses each class of links that more than one rank has; the mean over calls where these are dealt."""
    mesh = built.mesh
    deal = mesh.size((built.dealt,)) if built.dealt else 1
    joined = {a: box.link(mesh.group(0, (a,))) for a in mesh.names}
    rows = []
    for level, span in zip(box.levels, box.spans(), strict=True):
        if mesh.ranks <= span:
            break
        # results of dealt calls are sent by the runtime: no node of the program does
        results = Volume("", [f for f in form.flows if f.axes == (built.dealt,)]).crossing(mesh, span)
        sent = max(bytes_crossing(built.lowered, span)) // deal + results
        axes = [a for a in mesh.names if joined[a] == level.name]
        rows.append(LinkRow(level.name, span, sent, form.crossing(mesh, span), axes))
    return rows


def _ordered(built: Built) -> dict[str, Any]:
    """Fields of the report that ``overlap`` fills."""
    found = built.lowered.gm.meta.get("schedule")
    if found is None:
        return {}
    orders = [OrderRow(w.name, 1e3 * w.seconds, 1e3 * w.exposed, w.collectives) for w in found.ways]
    return {"orders": orders, "exposed": [ExposedRow(source, 1e3 * s, n, why) for source, s, n, why in found.exposed]}


def _replicated(built: Built, eager: int) -> list[Replicated]:
    """Products whose result is whole on every rank, by source line, largest first."""
    found: dict[tuple[str, str], int] = {}
    for node in built.lowered.graph.nodes:
        layout = node.meta.get("layout")
        if node.op != "call_function" or layout is None or built.mesh.ranks == 1:
            continue
        if isinstance(layout, tuple) or not layout.is_whole:
            continue
        cost = node_flops(node, lambda n: getattr(n.meta.get("val"), "shape", n.meta.get("val")))
        if cost:
            key = (target_name(node.target), source_line(node))
            found[key] = found.get(key, 0) + cost
    rows = [Replicated(op, source, cost / eager) for (op, source), cost in found.items()]
    return sorted(rows, key=lambda r: -r.share)


def _fallbacks(built: Built) -> list[FallbackReport]:
    return [
        FallbackReport(f.operator, source_line(f.node), f.reason, f.kind, f.bytes)
        for f in built.lowered.gm.meta.get("fallbacks", [])
        if f.kind == "gather"  # a realignment keeps rows split: it shows among the collectives
    ]


def joined(a: Report, b: Report) -> Report:
    """Reports of two graphs of one model as one. The busiest ranks' work adds up, as if they were the same rank."""
    worst = max(a, b, key=lambda x: (x.max_rel_err or 0) / (x.tolerance or 1))
    a.ok = None if a.ok is None else a.ok and bool(b.ok)
    a.max_abs_err, a.max_rel_err, a.tolerance = worst.max_abs_err, worst.max_rel_err, worst.tolerance
    a.diverged_at = a.diverged_at or b.diverged_at
    a.graphs += b.graphs
    flops = (a.eager_flops, b.eager_flops)
    a.flops_share = _weighted((a.flops_share, b.flops_share), flops)
    a.attainable_share = _weighted((a.attainable_share, b.attainable_share), flops)
    a.time_share = _weighted((a.time_share, b.time_share), (a.eager_time, b.eager_time))
    a.eager_flops, a.eager_time = sum(flops), a.eager_time + b.eager_time
    a.predicted = {k: a.predicted.get(k, 0) + b.predicted.get(k, 0) for k in {*a.predicted, *b.predicted}}
    a.generation |= {k: a.generation[k] + b.generation[k] for k in ("seconds", "first", "step") if a.generation}
    a.timeline = a.timeline.then(b.timeline) if a.timeline is not None and b.timeline is not None else None
    a.plans = a.plans if flops[0] >= flops[1] else b.plans  # those of the graph with more work
    a.orders = a.orders if flops[0] >= flops[1] else b.orders
    a.exposed += b.exposed
    a.replicated = [
        replace(r, share=r.share * own / a.eager_flops)
        for x, own in zip((a, b), flops, strict=True)
        for r in x.replicated
    ]
    a.fallbacks += b.fallbacks
    a.collectives += b.collectives
    a.bytes_per_rank += b.bytes_per_rank
    a.bytes_formula += b.bytes_formula
    a.symbols += b.symbols
    a.collectives_formula += b.collectives_formula
    a.links = [
        replace(x, bytes=x.bytes + y.bytes, formula=x.formula + y.formula)
        for x, y in zip(a.links, b.links, strict=True)
    ]
    hoisted = [replace(x.hoisted, flops_share=x.hoisted.flops_share * f / max(1, sum(flops)))
               for x, f in ((a, flops[0]), (b, flops[1]))]  # fmt: skip
    a.hoisted = hoisted[0] + hoisted[1]
    a.carried_bytes += b.carried_bytes
    a.notes += [n for n in b.notes if n not in a.notes]
    a.seconds = {k: a.seconds.get(k, 0) + b.seconds.get(k, 0) for k in {*a.seconds, *b.seconds}}
    return a


def _weighted(shares: tuple[float, float], weights: tuple[float, float]) -> float:
    """The mean by weight; 1 where nothing weighs anything."""
    total = sum(weights)
    return sum(s * w for s, w in zip(shares, weights, strict=True)) / total if total else 1.0
