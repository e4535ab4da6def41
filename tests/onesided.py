"""What the tests of one-sided communication share: heaps between threads, and a checker that knows no clocks."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastpar.backends.eager import compile_eager
from fastpar.backends.onesided.order import SPARE, Order
from fastpar.backends.onesided.rewrite import Planned, of_all, planned, rewrite
from fastpar.backends.onesided.shared import Shared
from fastpar.backends.onesided.slots import PUT, Traffic
from fastpar.graph.program import Program
from fastpar.ops.onesided import is_onesided, put
from fastpar.run.build import Built
from fastpar.run.onesided import Attended

_names = itertools.count()


def sided(built: Built, name: str = "h", spare: int = SPARE) -> tuple[list[Program], list[Program], dict[str, Planned]]:
    """(two-sided programs of all ranks, one-sided ones, their heaps)."""
    programs = [built.localise(r) for r in range(built.mesh.ranks)]
    heaps = planned(of_all(built.lowered, built.mesh), name, spare)
    return programs, [rewrite(p, r, heaps) for r, p in enumerate(programs)], heaps


def other(args: Sequence[Any]) -> list[Any]:
    """Arguments of another call, so that what is left of the one before shows."""
    return [a * 1.5 if torch.is_tensor(a) and a.is_floating_point() and a.dim() == 3 else a for a in args]


def same(found: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> bool:
    """Equal bits, rank by rank."""
    return all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


class Meeting:
    """``gather`` between threads: every rank's text, by rank."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.texts: dict[tuple[str, int], str] = {}
        self.ranks = ranks

    def of(self, rank: int) -> Callable[[str, str], list[str]]:
        def gather(what: str, mine: str) -> list[str]:
            self.texts[what, rank] = mine
            self.barrier.wait()
            found = [self.texts[what, r] for r in range(self.ranks)]
            self.barrier.wait()
            return found

        return gather


def in_threads(run: Callable[[int], Any], ranks: int) -> list[Any]:
    """``run(rank)`` of all ranks at once; the first error of any."""
    found: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def of(rank: int) -> None:
        try:
            with torch.no_grad():
                found[rank] = run(rank)
        except BaseException as error:  # of a thread nobody sees it otherwise
            errors.append(error)

    threads = [threading.Thread(target=of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return found


def over_shared_memory(
    built: Built, calls: Sequence[Sequence[Any]], lowering: Any = compile_eager, spare: int = SPARE
) -> list[list[Any]]:
    """[call][rank]: outputs of the one-sided programs, ranks being threads with real heaps."""
    ranks, number = built.mesh.ranks, next(_names)
    # one registry for all: each rank's heap has a name of its own
    programs = [sided(built, f"t{number}r{rank}", spare)[1][rank] for rank in range(ranks)]
    runners = [lowering(p) for p in programs]
    meeting = Meeting(ranks)

    def run(rank: int) -> list[Any]:
        specs = programs[rank].gm.meta["heaps"].values()
        heaps = [Shared(spec, rank, ranks, 20.0, meeting.of(rank)) for spec in specs]
        attended = Attended(runners[rank], heaps)
        try:
            return [[x.clone() for x in attended(list(args))] for args in calls]
        finally:
            attended.close()

    found = in_threads(run, ranks)
    return [[found[rank][call] for rank in range(ranks)] for call in range(len(calls))]


def without_credits(program: Program) -> Program:
    """The one-sided program whose puts wait for nobody."""
    new = program.copy()
    for node in new.graph.nodes:
        if is_onesided(node) and node.target is put:
            node.args = (*node.args[:4], [])
    new.gm.recompile()
    return new


class Overwritten(AssertionError):
    """A put landed on bytes that their reader had yet to read."""


def walk(traffic: Traffic, order: Order, dice: random.Random, calls: int = 3, lazy: int | None = None) -> None:
    """All ranks through several calls in an order that ``dice`` draw.

    A put runs beside the program, behind the puts before it: what waits for credits is not what reads. ``lazy``: a rank
    that only reads when no other can move. Raises Overwritten, or AssertionError where all are stuck.
    """
    length = len(traffic.events[0])
    at, beside = [0] * traffic.ranks, [0] * traffic.ranks  # events of the program that are over; puts that are
    puts = [[c for kind, c in events if kind == PUT] for events in traffic.events]
    place = [{c: i for i, c in enumerate(of_rank)} for of_rank in puts]
    here: dict[tuple[int, int, int], int] = {}  # (reader, channel, source) -> call of the last piece
    was_read: dict[tuple[int, int], int] = {}
    unread: list[list[tuple[int, int, int]]] = [[] for _ in at]  # (low, high, channel)

    def can_run(rank: int) -> bool:
        if at[rank] == calls * length:
            return False
        call, event = divmod(at[rank], length)
        kind, channel = traffic.events[rank][event]
        if kind == PUT:
            return True  # it is let go of, and takes place when it can
        left = beside[rank] > call * len(puts[rank]) + place[rank][channel]
        return left and all(here.get((rank, channel, s), -1) >= call for s in traffic.pieces(channel, rank))

    def can_put(rank: int) -> bool:
        call, number = divmod(beside[rank], len(puts[rank]))
        let_go = divmod(at[rank], length)
        events = traffic.events[rank][: let_go[1]]
        if (call, number) >= (let_go[0], sum(kind == PUT for kind, _ in events)):
            return False
        mine = [c for c in order.credits if (c.writer, c.put) == (rank, puts[rank][number])]
        return all(was_read.get((c.reader, c.read), -1) >= call - c.lag for c in mine)

    def move(rank: int) -> None:
        kind, channel = traffic.events[rank][at[rank] % length]
        if kind != PUT:
            unread[rank] = [entry for entry in unread[rank] if entry[2] != channel]
            was_read[rank, channel] = at[rank] // length
        at[rank] += 1

    def land(rank: int) -> None:
        call, number = divmod(beside[rank], len(puts[rank]))
        channel = puts[rank][number]
        beside[rank] += 1
        for reader in range(traffic.ranks):
            if rank in (pieces := traffic.pieces(channel, reader)):
                start, size = pieces[rank]
                low = order.slots.offsets[channel] + start
                for a, b, other in unread[reader]:
                    if a < low + size and low < b:
                        raise Overwritten(f"channel {channel} on {other} of rank {reader}")
                unread[reader].append((low, low + size, channel))
                here[reader, channel, rank] = call

    while any(n < calls * length for n in at):
        ready = [(r, step) for r in range(traffic.ranks) for step, can in ((move, can_run), (land, can_put)) if can(r)]
        assert ready, f"stuck: {at}"
        rank, step = dice.choice([x for x in ready if x[0] != lazy or x[1] is land] or ready)
        step(rank)


def dropped(order: Order, number: int) -> Order:
    """The order without one of its credits."""
    return replace(order, credits=(*order.credits[:number], *order.credits[number + 1 :]))
