"""Where a put must be told that the slot is free, and where it knows that already.

A slot may be written again when its reader has read it. Often the writer knows: it has itself received something that
the reader sent after reading, or that somebody sent who had heard of it. This is *happens-before* (Lamport; vector
clocks): the edges are each rank's program order, and from every put to its read. Where it holds, nothing is added.
Where it does not, the reader says so after reading (a *credit*: one more flag, at the writer), and the put waits.

Flags count calls, so a heap is reused by the next call without a barrier; hence two calls in a row are looked at, which
is all there is to look at: every path from a read to the next put into its slot lies within them.

No put can wait in vain: order all events by their place in the programs. A read comes after the start of its channel,
and a channel that shares a slot is started after the other was read, on every rank. All edges lead forward, and the
walk below, which runs all ranks to their end, fails where one does not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from fastpar.backends.onesided.slots import PUT, READ, Slots, Traffic, assign
from fastpar.core.errors import CheckError

CALLS = 2
_REST = (0, 1, 2, 3, 4, 6, 8, 12, 16)
_TWICE = 2  # heap over the smallest one: as much as double buffering would take
SPARE = 128 << 20
"""Bytes of heap that are nothing beside a model's weights; a credit costs both ranks a launch."""


@dataclass(frozen=True)
class Credit:
    """``reader`` tells ``writer`` that it has read ``read``; ``writer`` waits for it before it puts ``put``: that of
    the same call (``lag`` 0) or of the one before (1)."""

    reader: int
    read: int
    writer: int
    put: int
    lag: int


@dataclass(frozen=True)
class Order:
    """The slots of a program's channels and the credits that they need."""

    slots: Slots
    credits: tuple[Credit, ...]
    rest: int  # for how many channels a slot rests between two uses


def credits(traffic: Traffic, slots: Slots) -> tuple[Credit, ...]:
    """The credits without which some put could overwrite what its reader has yet to read.

    Raises CheckError where two channels that may be under way at once share bytes, or ranks wait for each other.
    """
    return _Walk(traffic, slots).run()


def choose(traffic: Traffic, spare: int = SPARE) -> Order:
    """Fewest credits on a heap of at most twice the smallest size, or of ``spare`` bytes if that is more.

    Of orders that need equally many, the one whose slots rest longest: its credits come before they are waited for.
    """
    found: list[Order] = []
    for rest in _REST:
        slots = assign(traffic, rest)
        if found and (slots.size > max(_TWICE * found[0].slots.size, spare) or slots == found[-1].slots):
            break
        found.append(Order(slots, credits(traffic, slots), rest))
        if not found[-1].credits:
            break
    return min(found, key=lambda order: (len(order.credits), -order.rest))


class _Walk:
    """All ranks through two calls, as far as each can go, with what every rank knows of the others."""

    def __init__(self, traffic: Traffic, slots: Slots) -> None:
        self.traffic = traffic
        self.ranks = range(traffic.ranks)
        self.length = len(traffic.events[0]) if traffic.events else 0
        self.last = _last_reads(traffic, slots)
        # the last event of each rank (over both calls) that a rank knows to be over, before its next one
        self.known = np.full((traffic.ranks, traffic.ranks), -1, dtype=np.int64)
        # the same, and what credits told: puts run beside the program, in their own order, so what one of them waited
        # for is known to later puts, and to the program only from where it waits for that put to have left
        self.beside = self.known.copy()
        self.at = [0] * traffic.ranks
        self.sent: dict[tuple[int, int, int], np.ndarray] = {}  # (call, channel, rank) -> what it knew when it put
        self.read: dict[tuple[int, int], np.ndarray] = {}  # (rank, event) -> what it knew after reading
        self.needed: dict[tuple[int, int], list[Credit]] = {}  # (writer, channel)
        self.asked: set[tuple[int, int]] = set()  # (writer, event): its credits are decided

    def run(self) -> tuple[Credit, ...]:
        ready = deque(self.ranks)
        stuck = 0
        while ready:
            rank = ready.popleft()
            moved = False
            while self.at[rank] < CALLS * self.length and self._step(rank):
                moved = True
            if self.at[rank] < CALLS * self.length:
                ready.append(rank)
                stuck = 0 if moved else stuck + 1
                if stuck > len(ready):
                    where = {r: self._event(r)[:2] for r in ready}
                    raise CheckError(f"ranks wait for each other in one-sided order: {where}")
            else:
                stuck = 0
        return tuple(c for found in self.needed.values() for c in found)

    def _event(self, rank: int) -> tuple[str, int, int]:
        call, event = divmod(self.at[rank], self.length)
        return (*self.traffic.events[rank][event], call)

    def _step(self, rank: int) -> bool:
        """The rank's next event, if it can take place."""
        kind, channel, call = self._event(rank)
        knows = self.known[rank]
        if kind == PUT:
            if not self._may_put(rank, channel, call):
                return False
        else:
            sources = [s for s in self.traffic.pieces(channel, rank) if s != rank]
            if not all((call, channel, s) in self.sent for s in sources):
                return False
            for source in (*sources, rank):
                np.maximum(knows, self.sent[call, channel, source], out=knows)
        knows[rank] = self.at[rank]
        if kind == PUT:
            np.maximum(self.beside[rank], knows, out=self.beside[rank])
            self.sent[call, channel, rank] = self.beside[rank].copy()
        else:
            self.read[rank, self.at[rank]] = knows.copy()
        self.at[rank] += 1
        return True

    def _may_put(self, rank: int, channel: int, call: int) -> bool:
        """Whether all credits are there; decides once per put which it needs, from what the rank knows so far."""
        mine = self.needed.setdefault((rank, channel), [])
        np.maximum(self.beside[rank], self.known[rank], out=self.beside[rank])
        if (rank, self.at[rank]) not in self.asked:
            if not self._take(rank, call, mine):  # those of the first call, before more are asked for
                return False
            for reader in self.ranks:
                found = self.last[channel].get((rank, reader))
                if found is None:
                    continue
                for lag, read in enumerate(found):
                    if read is None or lag > call:
                        continue
                    event = (call - lag) * self.length + int(self.traffic.place[READ][reader, read])
                    if self.beside[rank, reader] < event:
                        mine.append(Credit(reader, read, rank, channel, lag))
                        break  # of the same call, or there is none: it is later than any of the call before
            self.asked.add((rank, self.at[rank]))
        return self._take(rank, call, mine)

    def _take(self, rank: int, call: int, wanted: list[Credit]) -> bool:
        there = []
        for credit in wanted:
            if credit.lag > call:
                continue
            event = (call - credit.lag) * self.length + int(self.traffic.place[READ][credit.reader, credit.read])
            if (credit.reader, event) not in self.read:
                return False
            there.append(self.read[credit.reader, event])
        for knowledge in there:
            np.maximum(self.beside[rank], knowledge, out=self.beside[rank])
        return True


def _last_reads(traffic: Traffic, slots: Slots) -> list[dict[tuple[int, int], tuple[int | None, int | None]]]:
    """Per channel, (writer, reader) -> the last channel that the reader read, of this call and of the one before, from
    the bytes that the writer's piece goes to. In its program's order all others are read before it."""
    sharing = slots.sharing(traffic)
    out: list[dict[tuple[int, int], tuple[int | None, int | None]]] = []
    low = np.array(slots.offsets, dtype=np.int64)
    filled = np.array([[sum(pieces) for pieces in of_rank] for of_rank in traffic.bytes], dtype=np.int64)
    for channel in range(traffic.channels):
        found: dict[tuple[int, int], tuple[int | None, int | None]] = {}
        others = np.flatnonzero(sharing[channel])
        before = traffic.apart[others, channel]
        both = ~before & ~traffic.apart[channel, others] & (others != channel)
        if both.any():
            pair = sorted((int(others[both][0]), channel))
            raise CheckError(f"channels {pair[0]} and {pair[1]} share bytes while both may be under way")
        for reader in range(traffic.ranks):
            read = traffic.place[READ][reader, others]
            ends = low[others] + filled[others, reader]
            for writer, (start, size) in traffic.pieces(channel, reader).items():
                if writer != reader:  # a rank's own piece is in its own order
                    at = low[channel] + start
                    hit = (low[others] < at + size) & (at < ends)
                    found[writer, reader] = (_latest(others, read, hit & before), _latest(others, read, hit & ~before))
        out.append(found)
    return out


def _latest(channels: np.ndarray, read: np.ndarray, chosen: np.ndarray) -> int | None:
    return int(channels[np.where(chosen, read, -1).argmax()]) if chosen.any() else None


__all__ = ["SPARE", "Credit", "Order", "choose", "credits"]
