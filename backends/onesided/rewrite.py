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

from torch import fx

from fastpar.backends.onesided.order import SPARE, Order, choose
from fastpar.backends.onesided.skeleton import (
    PROLOGUE,
    START,
    STEP,
    Exchanged,
    Nodes,
    Side,
    Skeleton,
    of_all,
    of_program,
)
from fastpar.backends.onesided.slots import PUT, READ, Event, Traffic
from fastpar.core.errors import CheckError
from fastpar.core.inherit import inherited
from fastpar.graph.program import Program, copy_module
from fastpar.ops.collectives import unpack
from fastpar.ops.onesided import HeapSpec, put, receive, receive_sum


@dataclass(frozen=True)
class Planned:
    """A heap of the programs of all ranks: its spec, the slots and credits, and the exchanges that use it."""

    spec: HeapSpec
    order: Order
    traffic: Traffic
    keys: tuple[tuple[int, int], ...]  # channel -> (number of the exchange, phase)
    skeletons: tuple[Skeleton, ...]  # of all ranks: what was planned for


def planned(skeletons: Sequence[Skeleton], name: str, spare: int = SPARE) -> dict[str, Planned]:
    """The heaps of all ranks' programs (PROLOGUE, STEP: those that exchange anything), as ``name.step`` and so on.

    ``spare``: bytes of heap that may be spent to save credits (``order.choose``).
    Raises CheckError where ranks start different exchanges.
    """
    kinds = [[(x.kind, len(x.sides), x.where) for x in s.exchanges] for s in skeletons]
    if any(k != kinds[0] for k in kinds):
        raise CheckError("ranks start different exchanges, so none can be one-sided")
    out = {}
    for where in (PROLOGUE, STEP):
        numbers = [i for i, x in enumerate(skeletons[0].exchanges) if x.where == where]
        if not numbers:
            continue
        chosen = [[s.exchanges[i] for i in numbers] for s in skeletons]
        keys = tuple((side.number, side.phase) for x in chosen[0] for side in x.sides)
        channel = {key: i for i, key in enumerate(keys)}
        events = tuple(_events(s, where, channel) for s in skeletons)
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
        spec = HeapSpec(f"{name}.{where}", labels, order.slots.size)
        out[where] = Planned(spec, order, traffic, keys, tuple(skeletons))
    return out


def _events(skeleton: Skeleton, where: str, channel: dict[tuple[int, int], int]) -> tuple[Event, ...]:
    """Puts and reads in program order; the second half of an all-reduce takes place where the first is read."""
    out: list[Event] = []
    for kind, number in skeleton.order:
        exchange = skeleton.exchanges[number]
        if exchange.where != where:
            continue
        if kind == START:
            out.append((PUT, channel[number, 0]))
            continue
        for side in exchange.sides:
            if side.phase:
                out.append((PUT, channel[number, side.phase]))
            out.append((READ, channel[number, side.phase]))
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
    """The localised program of ``rank`` with every exchange one-sided; the given one is left as it is.

    Raises CheckError where it does not exchange what the heaps were planned for.
    """
    new = replace(program, gm=copy_module(program.gm), notes=list(program.notes))
    graph = new.graph
    mine, nodes = of_program(new, rank)
    for heap in heaps.values():
        if mine != heap.skeletons[rank]:
            raise CheckError(f"rank {rank}: {_difference(mine, heap.skeletons[rank])}")
    for x, found in zip(mine.exchanges, nodes, strict=True):
        _replace(graph, x, found, rank, heaps[x.where])
    graph.lint()
    new.gm.meta["heaps"] = {h.spec.name: h.spec for h in heaps.values()}
    new.gm.recompile()
    return new


def _difference(mine: Skeleton, expected: Skeleton) -> str:
    for i, (a, b) in enumerate(zip(mine.exchanges, expected.exchanges, strict=False)):
        if a != b:
            return f"exchange {i} is {a}, and was planned as {b}"
    count = len(mine.exchanges), len(expected.exchanges)
    if count[0] != count[1]:
        return f"{count[0]} exchanges, and {count[1]} were planned"
    return "exchanges are started or waited for in another order than was planned"


def _replace(graph: fx.Graph, x: Exchanged, nodes: Nodes, rank: int, heap: Planned) -> None:
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
        return emit(put, (buffer, heap.spec.name, channel, sends, awaits), nodes.start)

    def arrival(side: Side, token: fx.Node, buffer: Any, channel: int) -> tuple[Any, ...]:
        sources = [s for s in traffic.pieces(channel, rank) if s != rank]
        # one flag per writer, however many of its puts wait for it
        credits = sorted({c.writer for c in heap.order.credits if c.reader == rank and c.read == channel})
        return (token, buffer, heap.spec.name, channel, sources, credits, slots.offsets[channel])

    shapes, boxes, *dtypes = nodes.unpack.args[1:]
    buffer: Any = nodes.start.args[0]
    for side in x.sides:
        channel = heap.keys.index((side.number, side.phase))
        last = side is x.sides[-1]
        with graph.inserting_before(nodes.start if side.phase == 0 else nodes.wait):
            token = put_of(side, buffer, channel)
        with graph.inserting_before(nodes.wait):
            args = arrival(side, token, buffer, channel)
            if x.kind == "all_reduce" and side.phase == 0:
                more = (len(side.members), side.receives[0], str(nodes.start.args[1]))
                buffer = emit(receive_sum, (*args, *more), nodes.wait)
            else:
                buffer = emit(receive, (*args, sum(side.receives), shapes, boxes, *dtypes), nodes.unpack)
        if last and x.kind == "all_reduce" and side.phase == 0:
            with graph.inserting_before(nodes.unpack):
                buffer = emit(unpack, (buffer, shapes, boxes, *dtypes), nodes.unpack)
    nodes.unpack.replace_all_uses_with(buffer)
    for node in (nodes.unpack, nodes.wait, nodes.start):
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


__all__ = ["Planned", "of_all", "planned", "rewrite", "said"]
