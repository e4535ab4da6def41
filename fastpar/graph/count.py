"""What a program costs, read off its layouts: FLOPs, bytes and collectives.

FLOPs use torch's own formulas (``torch.utils.flop_counter``) on every rank's local shapes.
Bytes are the payload that leaves a rank for others; copies to itself do not count. Of a rank that runs the model in one
of several steps only (``Mesh.strides``), both are the mean over a sampler's steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

import fastpar.ops.attention  # noqa: F401  (registers the formula of attention)
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import elements_sent, transfer
from fastpar.graph.program import Program, source_line
from fastpar.ops.collectives import COLLECTIVES, all_reduce, axes_of, layouts_of
from fastpar.ops.late import late
from fastpar.rules import Call, rule_for
from fastpar.sharding.candidates import Candidate

EXCHANGES = (*COLLECTIVES, late)


@dataclass(frozen=True)
class Collective:
    """One kind of collective at one place of the model: ``bytes`` leave the busiest rank, all ``count`` together."""

    kind: str
    axis: str
    bytes: int
    count: int
    source: str
    why: str


def node_flops(node: fx.Node, shape_of: Any) -> int:
    """FLOPs of one node with operand shapes given by ``shape_of(node)``; 0 without a formula."""
    packet = getattr(node.target, "overloadpacket", None)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), shape_of)
    return int(formula(*args, **kwargs, out_val=shape_of(node)))


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return tuple(int(s) for s in value.shape)
    return value


def flops(program: Program) -> list[int]:
    """FLOPs of every rank (one entry where the program is still whole)."""
    if program.stage == "captured":
        return [sum(node_flops(n, _shape) for n in program.graph.nodes if n.op == "call_function")]
    mesh: Mesh = program.mesh
    totals = [0] * mesh.ranks
    known: dict[Hashable, list[int]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "overloadpacket", None) not in flop_registry:
            continue
        key = likeness(node)
        if key not in known:
            known[key] = []
            for rank in range(mesh.ranks):

                def local(n: fx.Node, rank: int = rank) -> Any:
                    layout = n.meta.get("layout")
                    return layout.local_shape(mesh, rank) if isinstance(layout, Layout) else _shape(n)

                known[key].append(node_flops(node, local))
        totals = [a + b for a, b in zip(totals, known[key], strict=True)]
    return [total // mesh.stride(rank) for rank, total in enumerate(totals)]


def likeness(node: fx.Node) -> Hashable:
    """Equal for nodes that cost the same on every rank: the same operator on values of the same layouts and dtypes.

    A model's blocks are alike, and there are many ranks: what they cost is worked out once.
    """
    values: list[Hashable] = [_kind(node)]

    def mark(operand: fx.Node) -> Any:
        values.append(_kind(operand))
        return f"%{len(values)}"

    text = str(fx.map_arg((node.args, node.kwargs), mark))
    return node.target, text, tuple(values)


def _kind(node: fx.Node) -> Hashable:
    value, layout = node.meta.get("val"), node.meta.get("layout")
    if isinstance(value, (tuple, list)):
        value, layout = (value[0] if value else None), tuple(layout) if isinstance(layout, (tuple, list)) else layout
    return layout, *((value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else (None, None))


def collectives(program: Program) -> list[Collective]:
    """Collectives of a lowered program, those of one kind, axis and source line together."""
    mesh: Mesh = program.mesh
    found: dict[tuple[str, str, str, str], list[Any]] = {}
    for node in program.graph.nodes:
        sent = node_bytes(node, mesh)
        if sent is None:
            continue
        kind, axes, per_rank = sent
        key = (kind, axes, source_line(node), node.meta.get("why", ""))
        entry = found.setdefault(key, [[0] * mesh.ranks, 0])
        entry[0] = [a + b for a, b in zip(entry[0], per_rank, strict=True)]
        entry[1] += 1
    return [
        Collective(kind, axis, max(per_rank), count, source, why)
        for (kind, axis, source, why), (per_rank, count) in found.items()
    ]


def bytes_per_rank(program: Program) -> list[int]:
    """Bytes that leave each rank for others, the whole program together."""
    mesh: Mesh = program.mesh
    totals = [0] * mesh.ranks
    for node in program.graph.nodes:
        sent = node_bytes(node, mesh)
        if sent is not None:
            totals = [a + b for a, b in zip(totals, sent[2], strict=True)]
    return totals


def node_bytes(node: fx.Node, mesh: Mesh) -> tuple[str, str, list[int]] | None:
    """(kind, mesh axes, bytes per rank) of one collective of a lowered program; None for other nodes."""
    if node.target not in EXCHANGES:
        return None
    totals = [0] * mesh.ranks
    if mesh.strides:
        shares = [Fraction(0)] * mesh.ranks
        for rank, peer, sent in messages(node, mesh):
            shares[rank] += Fraction(sent) if peer != rank else 0
        return "all_to_all", ".".join(axes_of(node, mesh)), [math.ceil(share) for share in shares]
    for x, src, dst in zip(node.args[0], *layouts_of(node), strict=True):  # type: ignore[arg-type]
        size = x.meta["val"].element_size()  # type: ignore[union-attr]
        totals = [t + e * size for t, e in zip(totals, elements_sent(src, dst, mesh), strict=True)]
    return str(node.target).split(".")[1], ".".join(axes_of(node, mesh)), totals


def bytes_across(program: Program, axes: tuple[str, ...], why: str | None = None) -> list[int]:
    """Bytes that every rank sends to ranks with another coordinate along ``axes`` (to other machines, say).

    ``why`` takes exchanges of one purpose only (``attention``).
    """
    mesh: Mesh = program.mesh
    totals = [0.0] * mesh.ranks
    for rank, peer, size in _messages(program, why):
        if mesh.coordinate(rank, axes) != mesh.coordinate(peer, axes):
            totals[rank] += size
    return [math.ceil(t) for t in totals]


def bytes_crossing(program: Program, span: int) -> list[int]:
    """Bytes that leave each block of ``span`` neighbouring ranks (the devices of a machine, say) for other blocks."""
    totals = [0.0] * -(-program.mesh.ranks // span)
    for rank, peer, size in _messages(program):
        if rank // span != peer // span:
            totals[rank // span] += size
    return [math.ceil(t) for t in totals]


def messages(node: fx.Node, mesh: Mesh) -> Iterator[tuple[int, int, float]]:
    """(from, to, bytes) of one collective of a lowered program, what ranks keep for themselves included.

    Of an all-reduce, which is a reduce-scatter and an all-gather, each rank of its group gets two n-ths.
    """
    axes = axes_of(node, mesh)
    for x, src, dst in zip(node.args[0], *layouts_of(node), strict=True):  # type: ignore[arg-type]
        itemsize = x.meta["val"].element_size()  # type: ignore[union-attr]
        for rank in range(mesh.ranks):
            if node.target is all_reduce:
                group = mesh.group(rank, axes)
                share = 2 * itemsize * _numel(dst, mesh, rank) / len(group) / mesh.stride(rank)
                yield from ((rank, peer, share) for peer in group)
            else:
                t = transfer(src, dst, mesh, rank, axes)
                for peer, elements in zip(t.group, t.send_splits, strict=True):
                    yield rank, peer, itemsize * elements / mesh.meets(rank, peer)


def _messages(program: Program, why: str | None = None) -> Iterator[tuple[int, int, float]]:
    """Those of all collectives of a program, between different ranks; collectives alike are looked at once."""
    mesh: Mesh = program.mesh
    alike: dict[Hashable, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target in EXCHANGES and (why is None or node.meta.get("why") == why):
            dtypes = tuple(x.meta["val"].dtype for x in node.args[0])
            key = (node.target, axes_of(node, mesh), *map(tuple, layouts_of(node)), dtypes)
            alike.setdefault(key, []).append(node)
    for nodes in alike.values():
        for rank, peer, size in messages(nodes[0], mesh):
            if rank != peer and size:
                yield rank, peer, len(nodes) * size


def _numel(layout: Layout, mesh: Mesh, rank: int) -> int:
    out = 1
    for s in layout.local_shape(mesh, rank):
        out *= s
    return out


def carrying(program: Program, candidates: Sequence[Candidate]) -> tuple[dict[fx.Node, set[int]], set[fx.Node]]:
    """Where the rows to be split are, in a captured program: dimensions per value, and the operators that carry
    one in an operand (passed through or contracted).

    Rows are followed forward from all candidates' seeds, through whatever the rules can follow.
    """
    marks: dict[fx.Node, set[int]] = {}
    seeds: dict[fx.Node, set[int]] = {}
    for candidate in candidates:
        for seed in candidate.seeds:
            seeds.setdefault(seed.node, set()).add(seed.pos.dim)
    carriers: set[fx.Node] = set()
    for node in program.graph.nodes:
        marked = set(seeds.get(node, ()))
        if node.op == "call_function" and any(marks.get(n) for n in node.all_input_nodes):
            if isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                call = Call.of(node)
                if call.results and not isinstance(node.meta["val"], (tuple, list)):
                    marked |= rule_for(call).carries(call, [marks.get(n, set()) for n in call.operands])
                elif call.results:  # several results: the first has the operand's rows
                    marked |= marks.get(call.operands[0], set())
            carriers.add(node)
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
            marked |= marks.get(node.args[0], set()) if node.args[1] == 0 else set()
        if marked:
            marks[node] = marked
    return marks, carriers


def attainable(
    program: Program, candidates: Sequence[Candidate], ranks: Fraction | int, cut: Collection[str] = (), tp: int = 1
) -> float:
    """FLOPs that a rank is left with at best, of a captured program.

    An operator that carries a row to be split, in an operand or contracted, is shared by ``ranks`` (where they have
    unequal shares, by the rows over the busiest one's); one whose name is in ``cut`` works on columns of weights and
    is shared by ``tp``; one that does both, by both.
    """
    carriers = carrying(program, candidates)[1] if ranks > 1 else set()
    return sum(
        node_flops(node, _shape) / (float(ranks if node in carriers else 1) * (tp if node.name in cut else 1))
        for node in program.graph.nodes
        if node.op == "call_function"
    )
