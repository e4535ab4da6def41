"""The localised programs of all ranks to one rank's program of puts and receives.

Every start becomes a ``put``, its wait and the ``unpack`` behind it one ``receive``. An all-gather is a put of the same
to all. An all-reduce is two: every rank reduces one piece of the value, in rank order, and puts the result to all; so
as many bytes travel as two-sided, all ranks have the same bits, and the sums are those of lock step. The second put
stands where the wait stood, so only the first half hides under compute. Small values, of which a second latency would
cost more than the bytes that it saves, are put whole to all and reduced by each.

What a prologue exchanges (pass ``hoist``) has a heap of its own, since the prologue is called less often than the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastpar.backends.onesided.order import SPARE, Order, choose
from fastpar.backends.onesided.slots import PUT, READ, Event, Traffic
from fastpar.core.errors import CheckError
from fastpar.core.inherit import inherited
from fastpar.core.mesh import Mesh
from fastpar.graph.program import Program, copy_module
from fastpar.ops.collectives import decode, pack, unpack
from fastpar.ops.onesided import HeapSpec, put, receive, receive_sum

_C10D = torch.ops._c10d_functional
_KINDS = {
    _C10D.all_to_all_single.default: "all_to_all",
    _C10D.all_gather_into_tensor.default: "all_gather",
    _C10D.all_reduce.default: "all_reduce",
}
WHOLE = 1 << 15
"""Bytes up to which every rank reduces a value from all terms: at this size a message takes what its latency is."""
PROLOGUE, STEP = "prologue", "step"


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
class Exchange:
    """One exchange of one rank's program: its nodes and its messages (two, where an all-reduce has two halves)."""

    kind: str
    start: fx.Node
    wait: fx.Node
    unpack: fx.Node
    sides: tuple[Side, ...]
    where: str  # PROLOGUE or STEP

    @property
    def label(self) -> str:
        return f"{self.kind} over {str(self.start.args[-1]).replace('.', ' and ')}"


@dataclass(frozen=True)
class Planned:
    """A heap of the programs of all ranks: its spec, the slots and credits, and the exchanges that use it."""

    spec: HeapSpec
    order: Order
    traffic: Traffic
    keys: tuple[tuple[int, int], ...]  # channel -> (number of the exchange, phase)


def exchanges(program: Program, rank: int) -> list[Exchange]:
    """The exchanges of a localised program whose groups have the names of mesh axes, in order of their start."""
    mesh: Mesh = program.mesh
    found: list[Exchange] = []
    for node in program.graph.nodes:
        if node.target in _KINDS:
            kind = _KINDS[node.target]
            (wait,) = _users(node, _C10D.wait_tensor.default)
            (opened,) = _users(wait, unpack)
            group = mesh.group(rank, tuple(str(node.args[-1]).split(".")))
            where = PROLOGUE if node.meta.get("hoisted") else STEP
            sides = _sides(kind, node, group, rank, len(found))
            found.append(Exchange(kind, node, wait, opened, sides, where))
    return found


def _users(node: fx.Node, target: Any) -> list[fx.Node]:
    users = [u for u in node.users if u.target is target]
    if len(users) != 1 or len(node.users) != 1:
        raise CheckError(f"{node.format_node()} should have one use, a {target}")
    return users


def _sides(kind: str, start: fx.Node, group: tuple[int, ...], rank: int, number: int) -> tuple[Side, ...]:
    item, numel = _buffer(start.args[0])  # type: ignore[arg-type]
    n, me = len(group), group.index(rank)

    def side(phase: int, sends: Sequence[tuple[int, int, int]], receives: Sequence[int]) -> Side:
        kept = tuple(piece for piece in sends if piece[2])
        return Side(number, phase, kept, group, tuple(receives), item)

    if kind == "all_to_all":
        receives, sizes = ([int(x) for x in splits] for splits in start.args[1:3])  # type: ignore[union-attr]
        return (side(0, _cut(group, sizes), receives),)
    everything = [(peer, 0, numel) for peer in group]
    if kind == "all_gather" or numel * item <= WHOLE or n <= 2:
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


def _buffer(packed: fx.Node) -> tuple[int, int]:
    """(bytes per element, elements) of what ``pack`` gives on this rank (its ``meta["val"]`` is of the whole)."""
    if packed.target is not pack:
        raise CheckError(f"an exchange of {packed.format_node()}, which is not packed")
    dtypes = [x.meta["val"].dtype for x in packed.args[0]]  # type: ignore[union-attr]
    mixed, item, numel = len(set(dtypes)) > 1, dtypes[0].itemsize, 0
    for operand, _, sizes in decode(packed.args[1]):  # type: ignore[arg-type]
        box = 1
        for size in sizes:
            box *= size
        numel += box * (dtypes[operand].itemsize if mixed else 1)
    return (1 if mixed else item), numel


def planned(programs: Sequence[Program], name: str, spare: int = SPARE) -> dict[str, Planned]:
    """The heaps of the ranks' programs (PROLOGUE, STEP: those that exchange anything), as ``name.step`` and so on.

    ``spare``: bytes of heap that may be spent to save credits (``order.choose``).
    Raises CheckError where ranks start different exchanges.
    """
    every = [exchanges(p, rank) for rank, p in enumerate(programs)]
    kinds = [[(x.kind, len(x.sides), x.where) for x in found] for found in every]
    if any(k != kinds[0] for k in kinds):
        raise CheckError("ranks start different exchanges, so none can be one-sided")
    out = {}
    for where in (PROLOGUE, STEP):
        chosen = [[x for x in found if x.where == where] for found in every]
        if not chosen[0]:
            continue
        keys = tuple((side.number, side.phase) for x in chosen[0] for side in x.sides)
        channel = {key: i for i, key in enumerate(keys)}
        events = tuple(_events(p, found, channel) for p, found in zip(programs, chosen, strict=True))
        sides = [[side for x in found for side in x.sides] for found in chosen]
        members = tuple(tuple(of_rank[c].members for of_rank in sides) for c in range(len(keys)))
        sizes = tuple(
            tuple(tuple(n * of_rank[c].itemsize for n in of_rank[c].receives) for of_rank in sides)
            for c in range(len(keys))
        )
        traffic = Traffic(events, members, sizes)
        _check(sides, traffic)
        order = choose(traffic, spare)
        labels = tuple(x.label for x in chosen[0] for _ in x.sides)
        out[where] = Planned(HeapSpec(f"{name}.{where}", labels, order.slots.size), order, traffic, keys)
    return out


def _events(program: Program, found: list[Exchange], channel: dict[tuple[int, int], int]) -> tuple[Event, ...]:
    """Puts and reads in program order; the second half of an all-reduce takes place where the first is read."""
    starts = {x.start: x for x in found}
    waits = {x.wait: x for x in found}
    out: list[Event] = []
    for node in program.graph.nodes:
        if node in starts:
            out.append((PUT, channel[starts[node].sides[0].number, 0]))
        elif node in waits:
            for side in waits[node].sides:
                if side.phase:
                    out.append((PUT, channel[side.number, side.phase]))
                out.append((READ, channel[side.number, side.phase]))
    return tuple(out)


def _check(sides: list[list[Side]], traffic: Traffic) -> None:
    """What a rank puts to another is what that one expects."""
    for channel in range(traffic.channels):
        for rank, of_rank in enumerate(sides):
            for peer, _, size in of_rank[channel].sends:
                there = traffic.pieces(channel, peer).get(rank, (0, 0))[1]
                if there != size * of_rank[channel].itemsize:
                    raise CheckError(
                        f"channel {channel}: rank {rank} puts {size * of_rank[channel].itemsize} bytes, "
                        f"rank {peer} expects {there}"
                    )


def rewrite(program: Program, rank: int, heaps: dict[str, Planned]) -> Program:
    """The localised program of ``rank`` with every exchange one-sided; the given one is left as it is."""
    new = replace(program, gm=copy_module(program.gm), notes=list(program.notes))
    graph = new.graph
    for x in exchanges(new, rank):
        _replace(graph, x, rank, heaps[x.where])
    graph.lint()
    new.gm.meta["heaps"] = {h.spec.name: h.spec for h in heaps.values()}
    new.gm.recompile()
    return new


def _replace(graph: fx.Graph, x: Exchange, rank: int, heap: Planned) -> None:
    slots, traffic = heap.order.slots, heap.traffic

    def emit(target: Any, args: tuple[Any, ...], origin: fx.Node) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = inherited(origin.meta, "layout", "why", "hoisted", "val", "exchange")
        return node

    def put_of(side: Side, buffer: Any, channel: int) -> fx.Node:
        sends = []
        for peer, start, size in side.sends:
            offset = slots.offsets[channel] + traffic.pieces(channel, peer)[rank][0]
            sends += [peer, start, size, offset]
        mine = [c for c in heap.order.credits if c.writer == rank and c.put == channel]
        awaits = [n for c in mine for n in (c.reader, c.read, c.lag)]
        return emit(put, (buffer, heap.spec.name, channel, sends, awaits), x.start)

    def arrival(side: Side, token: fx.Node, buffer: Any, channel: int) -> tuple[Any, ...]:
        sources = [s for s in traffic.pieces(channel, rank) if s != rank]
        # one flag per writer, however many of its puts wait for it
        credits = sorted({c.writer for c in heap.order.credits if c.reader == rank and c.read == channel})
        return (token, buffer, heap.spec.name, channel, sources, credits, slots.offsets[channel])

    shapes, boxes, *dtypes = x.unpack.args[1:]
    buffer: Any = x.start.args[0]
    for side in x.sides:
        channel = heap.keys.index((side.number, side.phase))
        last = side is x.sides[-1]
        with graph.inserting_before(x.start if side.phase == 0 else x.wait):
            token = put_of(side, buffer, channel)
        with graph.inserting_before(x.wait):
            args = arrival(side, token, buffer, channel)
            if x.kind == "all_reduce" and side.phase == 0:
                buffer = emit(receive_sum, (*args, len(side.members), side.receives[0], str(x.start.args[1])), x.wait)
            else:
                buffer = emit(receive, (*args, sum(side.receives), shapes, boxes, *dtypes), x.unpack)
        if last and x.kind == "all_reduce" and side.phase == 0:
            with graph.inserting_before(x.unpack):
                buffer = emit(unpack, (buffer, shapes, boxes, *dtypes), x.unpack)
    x.unpack.replace_all_uses_with(buffer)
    for node in (x.unpack, x.wait, x.start):
        graph.erase_node(node)


def said(heaps: dict[str, Planned]) -> str:
    """One line for reports: messages, heap, credits."""
    parts = []
    for where, heap in heaps.items():
        waits = len(heap.order.credits)
        parts.append(
            f"{heap.spec.channels} exchanges in the {where} through a heap of {heap.spec.size / 1e6:.2f} MB, "
            + (f"{waits} credits on {heap.traffic.ranks} ranks" if waits else "no credits needed")
        )
    return "one-sided: " + ("; ".join(parts) or "nothing is exchanged")


__all__ = ["Exchange", "Planned", "exchanges", "planned", "rewrite", "said"]
