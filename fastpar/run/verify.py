"""``verify``, ``explain`` and ``simulate``: N virtual ranks in this process.

``verify`` holds the N localised programs of every graph of a model against the graph run
whole. float64 models are compared at 1e-9, with the model's own casts to float32 promoted
on both sides; other dtypes must not be further from a float64 reference than twice what
eager itself is, plus one unit in the last place. A plan that rounds what travels is held against the same rounding
on one device (``fastpar.run.rounded``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastpar.backends.onesided.rewrite import of_all, planned, rewrite, said
from fastpar.backends.simulate import run_calls, run_local
from fastpar.core.errors import FastparError, OptionError
from fastpar.core.options import TRANSPORTS
from fastpar.core.plan import Plan
from fastpar.core.text import unknown
from fastpar.graph import roofline
from fastpar.graph.capture import Captured, Inputs, Recorded, call_arguments, capture, compile_fx
from fastpar.graph.check import check_order
from fastpar.graph.count import Collective, attainable, bytes_crossing, bytes_per_rank, collectives, flops, node_flops
from fastpar.graph.program import Program, source_line, target_name
from fastpar.graph.prologue import apart, checked, split
from fastpar.plan import clock
from fastpar.plan.formula import Volume, dealt_bytes, volume
from fastpar.plan.generation import generation
from fastpar.plan.predict import predict
from fastpar.plan.topology import Topology
from fastpar.plan.workload import workload
from fastpar.run.build import Built, build
from fastpar.run.compare import (
    FLOAT64_TOLERANCE,
    capture_and_compare,
    difference,
    float64_reference,
    same_bits,
)
from fastpar.run.diverge import first_difference
from fastpar.run.report import ExposedRow, FallbackReport, Hoisted, LinkRow, OrderRow, PlanRow, Replicated, Report
from fastpar.run.rounded import rounded, rounds
from fastpar.sharding.candidates import find, find_batch


def verify(
    model: Any,
    inputs: Inputs | None = None,
    plan: Plan | str = "auto",
    ranks: int | None = None,
    passes: str | None = None,
    topology: str | None = None,
    transport: str = "two-sided",
) -> Report:
    """Prove that the N ranks' programs of ``model`` together compute what eager computes.

    ``model`` is a module or function with ``inputs`` (a dict, a tuple, or a callable giving one),
    or a ``Captured``, so that one capture serves many plans. With ``topology`` (a preset's name or a
    TOML file) the plan's axes lie as they would there. With ``transport="one-sided"`` it is the one-sided programs that
    run, in one random interleaving, two calls in a row. Returns a Report whose ``ok`` says whether
    every output of every rank is within tolerance and the same bits on all ranks; given a model,
    also whether the captured graphs give what the model itself gives.
    """
    if isinstance(model, Captured):
        captured, strayed = model, None
    else:
        captured, strayed = capture_and_compare(model, _given(inputs))
    report = None
    double = _in_double(captured)
    for recorded in captured.programs:
        built = build(recorded.program, plan, ranks, passes, topology=topology)
        part = _explained(built)
        part.notes += _transported(built, transport)
        _compare(built, recorded, part, ranks, passes, double, transport)
        report = part if report is None else _join(report, part)
    report = _nothing(report)
    if strayed is not None:
        report.ok = False
        report.notes.append(strayed)
    return report


def explain(
    model: Any,
    inputs: Inputs | None = None,
    plan: Plan | str = "auto",
    ranks: int | None = None,
    passes: str | None = None,
    verify_structure: bool = True,
    topology: str | None = None,
    timeline: bool = False,
    steps: int | None = None,
    streams: int = 1,
    transport: str = "two-sided",
) -> Report:
    """What a plan would do to ``model``: shares, collectives, bytes, fallbacks; nothing is run.

    Works on fake tensors: a model of any size can be explained on a laptop. ``topology`` (a preset's name or a
    TOML file) adds the predicted time, what other plans would take, and what every rank does when
    (``Report.timeline``); with ``timeline`` also of programs that take the clock minutes. With ``steps`` it adds what
    a sampling run of so many takes that calls the model ``streams`` times in each (``Report.generation``), and the
    timeline is that of its first two steps. ``transport="one-sided"`` adds what that takes to the notes. Raises
    OptionError for ``steps`` without a topology.
    """
    if steps is not None and topology is None:
        raise OptionError("what a generation takes needs a topology: a preset or a TOML file")
    captured = model if isinstance(model, Captured) else capture(model, _given(inputs))
    report = None
    for recorded in captured.programs:
        built = build(recorded.program, plan, ranks, passes, verify_structure=verify_structure, topology=topology)
        part = _explained(built, _Play(timeline, steps, streams))
        part.notes += _transported(built, transport)
        report = part if report is None else _join(report, part)
    return _nothing(report)


def simulate(
    model: Any, inputs: Inputs, plan: Plan | str = "auto", ranks: int | None = None, passes: str | None = None
) -> list[Any]:
    """The model's output on each of N virtual ranks: what it returns there, in its own structure."""
    calls: list[list[tuple[Any, ...]]] = []
    state = {"rank": 0, "call": 0, "ranks": 1}

    def backend(gm: Any, example: Sequence[Any]) -> Any:
        def finish(program: Program) -> Any:
            built = build(program, plan, ranks, passes)
            state["ranks"] = built.mesh.ranks
            programs = [built.localise(r) for r in range(built.mesh.ranks)]

            def run(args: list[Any]) -> Sequence[Any]:
                if state["call"] == len(calls):
                    calls.append(run_local(programs, list(args)))
                state["call"] += 1
                return calls[state["call"] - 1][state["rank"]]

            return run

        return compile_fx(gm, example, finish)

    compiled = torch.compile(model, backend=backend, dynamic=False)
    outputs = []
    args, kwargs = call_arguments(inputs)
    with torch.no_grad():
        while state["rank"] < state["ranks"]:
            state["call"] = 0
            outputs.append(compiled(*args, **kwargs))
            state["rank"] += 1
    return outputs


def _given(inputs: Inputs | None) -> Inputs:
    if inputs is None:
        raise FastparError("give the model's inputs: a dict, a tuple, or a callable that returns one")
    return inputs


def _nothing(report: Report | None) -> Report:
    if report is None:
        raise FastparError("the model ran without a single graph: nothing was captured (is it wholly untraceable?)")
    return report


# -- explain ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Play:
    """What the clock is asked for besides one call: its timeline at any cost, and a generation."""

    timeline: bool = False
    steps: int | None = None
    streams: int = 1


def _explained(built: Built, play: _Play = _Play()) -> Report:  # noqa: B008  (frozen)
    ranks = built.mesh.ranks
    eager = flops(built.captured)[0]
    shared = flops(built.lowered)
    # Of calls that are dealt, a rank runs one in ``deal``; what it does then is split over the other axes.
    deal = built.mesh.size((built.dealt,)) if built.dealt else 1
    batch = find_batch(built.captured.graph, built.captured.fixed) if built.plan.cfg else None
    tp = built.plan.tp or 1
    cut = built.lowered.gm.meta.get("cut", ())
    candidates = find(built.captured.graph) + ([batch] if batch else [])
    # the largest share of the rows that a rank has: an N-th, or what its speed gives it
    most = max(built.mesh.shares(tuple(a for a in built.mesh.names if a not in (built.dealt, "tp"))))
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
        formula=form.text,
        symbols=form.values,
        collectives_formula=form.collectives,
        seconds=dict(built.seconds),
        **_timed(built, form, play),
        **_ordered(built),
        notes=list(map(str, built.notes)),
    )


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


def _timed(built: Built, form: Volume, play: _Play) -> dict[str, Any]:
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
        line = clock.run(programs, box)
        predicted = {k: getattr(line, k) / deal for k in parts}
        if play.steps is not None:
            run = generation(programs, box, play.steps, math.ceil(play.streams / deal))
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


def _join(a: Report, b: Report) -> Report:
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
    a.notes += [n for n in b.notes if n not in a.notes]
    a.seconds = {k: a.seconds.get(k, 0) + b.seconds.get(k, 0) for k in {*a.seconds, *b.seconds}}
    return a


def _weighted(shares: tuple[float, float], weights: tuple[float, float]) -> float:
    """The mean by weight; 1 where nothing weighs anything."""
    total = sum(weights)
    return sum(s * w for s, w in zip(shares, weights, strict=True)) / total if total else 1.0


# -- verify -------------------------------------------------------------------------------------


def _compare(
    built: Built,
    recorded: Recorded,
    report: Report,
    ranks: int | None,
    passes: str | None,
    double: bool,
    transport: str,
) -> None:
    program, args = recorded.program, list(recorded.args)
    promoted, exact_args, exact = float64_reference(recorded)
    with torch.no_grad():
        if double:
            report.notes += [n for n in promoted.notes if n not in report.notes]
            box = built.choice.topology if built.choice is not None else None  # the same schedule is proved
            built = build(promoted, built.plan, ranks, passes, topology=box, order=built.order)
            eager, args = exact, exact_args
        else:
            eager = tuple(program.gm(*args))
        results = _simulated(built, args, transport)
    _finite(exact, report)
    eps = [torch.finfo(x.dtype).eps if isinstance(x, torch.Tensor) and x.is_floating_point() else 0.0 for x in eager]
    bounds = [FLOAT64_TOLERANCE] * len(eager)
    if not double:
        bounds = [2 * difference(x, y)[1] + e if e else b for x, y, e, b in zip(eager, exact, eps, bounds, strict=True)]
    own = rounded(built.lowered, args) if rounds(built.lowered) else None
    report.ok, worst = True, -1.0
    for sentence in own.strayed(exact, bounds) if own is not None else ():
        report.ok = False
        report.notes.append(sentence)
    unbounded = bool(built.plan.naive)  # its difference is reported, there is nothing to hold it against
    report.max_abs_err = report.max_rel_err = 0.0
    report.tolerance = FLOAT64_TOLERANCE
    for i, (reference, plain) in enumerate(zip(exact, eager, strict=True)):
        if not isinstance(plain, torch.Tensor):
            if any(r[i] != plain for r in results):
                report.ok = False
            continue
        tolerance = math.inf if unbounded else bounds[i]
        if own is not None:  # the plan's own error; where float64 shows it, that of one device and no more
            tolerance += (1 if double else 2) * difference(own.outputs[i], reference)[1]
        for rank, result in enumerate(results):
            if not same_bits(result[i], results[0][i]):
                report.ok = False
                report.notes.append(f"output {i}: rank {rank} has other bits than rank 0")
            absolute, relative = difference(result[i], reference)
            if unbounded and not torch.isfinite(result[i]).all() and torch.isfinite(reference).all():
                report.ok = False
                report.notes.append(f"output {i}: rank {rank} has values that are not finite")
            if own is not None and double and not (off := difference(result[i], own.outputs[i])[1]) <= bounds[i]:
                report.ok = False
                report.notes.append(f"output {i}: rank {rank} is off by {off:.1e} from the same rounding on one device")
            if not relative <= tolerance:
                report.ok = False
            held = relative if unbounded else relative / tolerance
            if held > worst:
                worst = held
                report.max_abs_err, report.max_rel_err, report.tolerance = absolute, relative, tolerance
    if not report.ok:
        limit = FLOAT64_TOLERANCE if own is not None and double else report.tolerance
        report.diverged_at = first_difference(built, args, limit, own)


def _finite(exact: tuple[Any, ...], report: Report) -> None:
    """Say so where the reference is not finite: there is little to compare, or nothing."""
    for i, value in enumerate(exact):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            wrong = int((~torch.isfinite(value)).sum())
            if wrong:
                report.notes.append(f"output {i}: {wrong} of {value.numel()} values are not finite in eager either")


def _in_double(captured: Captured) -> bool:
    """Whether this is a float64 model: its parameters are, or without any its floating inputs, if it has any.

    Buffers do not count: a float64 model may keep a table in float32, which is promoted like its casts. Nor
    do graphs one by one: between two graphs of a float64 model a value may travel in float32.
    """
    floats: dict[str, set[torch.dtype]] = {}
    for recorded in captured.programs:
        for given, arg in zip(recorded.program.inputs, recorded.args, strict=True):
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                floats.setdefault(given.kind, set()).add(arg.dtype)
    return floats.get("parameter", floats.get("user")) in (None, {torch.float64})


def _simulated(built: Built, args: list[Any], transport: str) -> list[tuple[Any, ...]]:
    programs = [built.localise(r) for r in range(built.mesh.ranks)]
    check_order(programs)
    if transport == "two-sided":
        return run_local(programs, args)
    heaps = planned(of_all(built.lowered, built.mesh), "verify")
    sided = [rewrite(p, r, heaps) for r, p in enumerate(programs)]
    return run_calls(sided, [args, args], seed=0)[1]  # the second call finds what the first left in the heaps


def _transported(built: Built, transport: str) -> list[str]:
    """What a transport takes, for the notes. Raises OptionError for one that there is not."""
    if transport not in TRANSPORTS:
        raise OptionError(unknown("transport", transport, TRANSPORTS))
    if transport == "two-sided":
        return []
    return [said(planned(of_all(built.lowered, built.mesh), "explain"))]


def outputs_of(value: Any) -> list[torch.Tensor]:
    """Tensors of a model's output, in order."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
