"""What a rank exchanges, how much, and in which order: all that the others need to know of its program.

``of_program`` reads it from a localised program. ``of_all`` reads it for all ranks from the program that they share,
without writing any rank's: where an exchange is waited for follows from who uses its result first, and its sizes from
its layouts. Both give the same, which ``rewrite`` checks for the rank whose program it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from fastpar.core.errors import CheckError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.program import Program
from fastpar.ops.collectives import (
    COLLECTIVES,
    Exchange,
    all_gather,
    all_reduce,
    all_to_all,
    axes_of,
    decode,
    dtypes_of,
    layouts_of,
    pack,
    unpack,
)
from fastpar.ops.join import join, join_order

_C10D = torch.ops._c10d_functional
KINDS = {
    _C10D.all_to_all_single.default: "all_to_all",
    _C10D.all_gather_into_tensor.default: "all_gather",
    _C10D.all_reduce.default: "all_reduce",
}
_LOWERED = {all_to_all: "all_to_all", all_gather: "all_gather", all_reduce: "all_reduce"}
WHOLE = 1 << 15
"""Bytes up to which every rank reduces a value from all terms: at this size a message takes what its latency is."""
PROLOGUE, STEP = "prologue", "step"
START, WAIT = "start", "wait"


@dataclass(frozen=True)
class Side:
    """One rank's side of one message: pieces of the send buffer, and what comes, in elements."""

    number: int  # of the exchange in the program
    phase: int
    sends: tuple[tuple[int, int, int], ...]  # peer, start, size
    members: tuple[int, ...]
    receives: tuple[int, ...]  # per member
    itemsize: int


@dataclass(frozen=True)
class Exchanged:
    """One exchange of one rank: its messages (two, where an all-reduce has two halves)."""

    kind: str
    axes: tuple[str, ...]
    sides: tuple[Side, ...]
    where: str  # PROLOGUE or STEP

    @property
    def label(self) -> str:
        return f"{self.kind} over {' and '.join(self.axes)}"


@dataclass(frozen=True)
class Skeleton:
    """A rank's exchanges by their start, and the order of starts and waits in its program: (START or WAIT, number)."""

    exchanges: tuple[Exchanged, ...]
    order: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Nodes:
    """The nodes of one exchange in a localised program."""

    start: fx.Node
    wait: fx.Node
    unpack: fx.Node


def of_program(program: Program, rank: int) -> tuple[Skeleton, list[Nodes]]:
    """The skeleton of a localised program whose groups have the names of mesh axes, and the nodes of its exchanges."""
    found: list[Exchanged] = []
    nodes: list[Nodes] = []
    order: list[tuple[str, int]] = []
    waits: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        if node.target in KINDS:
            wait = _user(node, _C10D.wait_tensor.default)
            nodes.append(Nodes(node, wait, _user(wait, unpack)))
            axes = tuple(str(node.args[-1]).split("."))
            sizes = _sizes(node)
            found.append(_exchanged(KINDS[node.target], axes, program.mesh, rank, sizes, node, len(found)))
            order.append((START, len(waits)))
            waits[wait] = len(waits)
        elif node in waits:
            order.append((WAIT, waits[node]))
    return Skeleton(tuple(found), tuple(order)), nodes


def of_all(program: Program, mesh: Mesh) -> list[Skeleton]:
    """The skeletons of all ranks, from the lowered or scheduled program that they share."""
    steps = _steps(program.graph, mesh)
    return [_skeleton(steps, mesh, rank) for rank in range(mesh.ranks)]


def _user(node: fx.Node, target: Any) -> fx.Node:
    users = [u for u in node.users if u.target is target]
    if len(users) != 1 or len(node.users) != 1:
        raise CheckError(f"{node.format_node()} should have one use, a {target}")
    return users[0]


@dataclass(frozen=True)
class _Sizes:
    """Of a send buffer: bytes per element, elements; of an all-to-all also what comes from and goes to each member."""

    item: int
    numel: int
    receives: tuple[int, ...] = ()
    sends: tuple[int, ...] = ()


def _exchanged(
    kind: str, axes: tuple[str, ...], mesh: Mesh, rank: int, sizes: _Sizes, node: fx.Node, number: int
) -> Exchanged:
    group = mesh.group(rank, axes)
    where = PROLOGUE if node.meta.get("hoisted") else STEP
    return Exchanged(kind, axes, _sides(kind, sizes, group, group.index(rank), number), where)


def _sides(kind: str, sizes: _Sizes, group: tuple[int, ...], me: int, number: int) -> tuple[Side, ...]:
    n, numel = len(group), sizes.numel

    def side(phase: int, sends: Sequence[tuple[int, int, int]], receives: Sequence[int]) -> Side:
        kept = tuple(piece for piece in sends if piece[2])
        return Side(number, phase, kept, group, tuple(receives), sizes.item)

    if kind == "all_to_all":
        return (side(0, _cut(group, sizes.sends), sizes.receives),)
    everything = [(peer, 0, numel) for peer in group]
    if kind == "all_gather" or numel * sizes.item <= WHOLE or n <= 2:
        return (side(0, everything, [numel] * n),)
    chunks = [numel // n + (i < numel % n) for i in range(n)]
    return (
        side(0, _cut(group, chunks), [chunks[me]] * n),
        side(1, [(peer, 0, chunks[me]) for peer in group], chunks),
    )


def _cut(group: tuple[int, ...], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(peer, start, size) of pieces that lie one behind the other."""
    out, at = [], 0
    for peer, size in zip(group, sizes, strict=True):
        out.append((peer, at, size))
        at += size
    return out


def _sizes(start: fx.Node) -> _Sizes:
    """Of a start in a localised program; of what ``pack`` gives there, ``meta["val"]`` is of the whole."""
    packed: Any = start.args[0]
    if packed.target is not pack:
        raise CheckError(f"an exchange of {packed.format_node()}, which is not packed")
    dtypes = [x.meta["val"].dtype for x in packed.args[0]]
    mixed = len(set(dtypes)) > 1
    boxes = decode(packed.args[1])
    numel = sum(math.prod(sizes) * (dtypes[i].itemsize if mixed else 1) for i, _, sizes in boxes)
    item = 1 if mixed else dtypes[0].itemsize
    if KINDS[start.target] != "all_to_all":
        return _Sizes(item, numel)
    receives, sends = (tuple(int(x) for x in splits) for splits in start.args[1:3])  # type: ignore[union-attr]
    return _Sizes(item, numel, receives, sends)


# -- without a rank's program -------------------------------------------------------------------------------------

_Step = tuple[str, Any]  # (START, number), ("read", numbers of exchanges), ("join", node), ("end", None)


@dataclass(frozen=True)
class _Start:
    node: fx.Node
    axes: tuple[str, ...]
    sizes: list[_Sizes]  # per rank


@dataclass(frozen=True)
class _Steps:
    steps: list[_Step]
    number: dict[fx.Node, int]  # of the exchange that a value is a part of
    starts: list[_Start]


def _steps(graph: fx.Graph, mesh: Mesh) -> _Steps:
    """What concerns exchanges in a program, as ``localise`` goes through it for any rank."""
    steps: list[_Step] = []
    number: dict[fx.Node, int] = {}
    starts: list[_Start] = []
    known: dict[Any, tuple[tuple[str, ...], list[_Sizes]]] = {}  # many exchanges have the same layouts
    for node in graph.nodes:
        if node.op == "call_function" and node.target is getitem and node.args[0].target in COLLECTIVES:
            number[node] = number[node.args[0]]
            continue
        if node.op == "output":
            steps.append(("end", None))
        if node.target is join:
            steps.append(("join", node))
        elif read := [number[x] for x in node.all_input_nodes if x in number]:
            steps.append(("read", read))
        if node.target in COLLECTIVES:
            number[node] = len(starts)
            steps.append((START, len(starts)))
            dtypes, layouts = tuple(dtypes_of(node)), layouts_of(node)
            key = (node.target, node.args[1:], dtypes, *map(tuple, layouts))
            if key not in known:
                sizes = [_sizes_on(node, layouts, dtypes, mesh, rank) for rank in range(mesh.ranks)]
                known[key] = axes_of(node, mesh), sizes
            starts.append(_Start(node, *known[key]))
    return _Steps(steps, number, starts)


def _skeleton(found: _Steps, mesh: Mesh, rank: int) -> Skeleton:
    exchanges: list[Exchanged] = []
    order: list[tuple[str, int]] = []
    over: set[int] = set()

    def wait(numbers: Iterable[int]) -> None:
        for number in numbers:
            if number not in over:
                over.add(number)
                order.append((WAIT, number))

    for kind, what in found.steps:
        if kind == "read":
            wait(what)
        elif kind == "join":
            xs, srcs, dst, dim = what.args
            layouts = [Layout.parse(str(t)) for t in srcs]
            pieces = [xs[i] for i in join_order(layouts, Layout.parse(str(dst)), int(dim), mesh, rank)]
            wait(found.number[x] for x in pieces if x in found.number)
        elif kind == "end":
            wait(range(len(found.starts)))
        else:
            start = found.starts[what]
            order.append((START, what))
            kind = _LOWERED[start.node.target]
            exchanges.append(_exchanged(kind, start.axes, mesh, rank, start.sizes[rank], start.node, what))
    return Skeleton(tuple(exchanges), tuple(order))


def _sizes_on(
    node: fx.Node, layouts: tuple[list[Layout], list[Layout]], dtypes: Sequence[torch.dtype], mesh: Mesh, rank: int
) -> _Sizes:
    mixed = len(set(dtypes)) > 1
    item = 1 if mixed else dtypes[0].itemsize
    if node.target is all_reduce:
        numels = [math.prod(layout.local_shape(mesh, rank)) for layout in layouts[1]]
        return _Sizes(item, sum(n * (d.itemsize if mixed else 1) for n, d in zip(numels, dtypes, strict=True)))
    exchange = Exchange(*layouts, mesh, rank, dtypes, keep=node.target is all_to_all)
    if node.target is all_gather:
        return _Sizes(item, exchange.send_splits[0])
    return _Sizes(item, sum(exchange.send_splits), tuple(exchange.receive_splits), tuple(exchange.send_splits))
