"""The virtual clock's engine: ranks that follow their scripts, and exchanges that share links, event by event.

A rank has one stream that computes and one per group that it talks to, as NCCL has (a communicator per group, each
with its own stream): exchanges over the same axes come one after the other, those over different axes can be under way
at once. An exchange begins when all ranks of its group have come to it and their streams for these axes are free; its
latency passes; then it moves at the speed that the links give (``fastpar.plan.links``), which changes whenever
another one begins or ends. Ranks flow from call to call: nothing but exchanges makes them wait for each other.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastpar.core.errors import CheckError
from fastpar.plan.links import Load, speeds
from fastpar.plan.timeline import COMMUNICATION, COMPUTE, WAIT, Event, Timeline


@dataclass(frozen=True, slots=True)
class Op:
    """Computes for so many seconds."""

    seconds: float
    name: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """Comes to the call's exchange ``number`` with the ranks ``group`` over ``axes``, to whom it sends ``bytes``."""

    number: int
    group: tuple[int, ...]
    axes: str
    load: Load
    name: str
    source: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """Goes on when the call's exchange ``number`` is over."""

    number: int
    source: str = ""


Script = Sequence[Op | Start | Wait]
Call = Sequence[Script]
"""What every rank does in one call."""


@dataclass(eq=False)
class _Exchange:
    """One exchange of one group, from the first rank that comes to its end."""

    load: Load
    group: tuple[int, ...]
    starts: dict[int, Start] = field(default_factory=dict)
    came: dict[int, float] = field(default_factory=dict)
    begin: float | None = None
    end: float | None = None
    left: float = 0.0  # seconds of moving, alone
    speed: float = 1.0
    call: int = 0
    waiting: list[_Rank] = field(default_factory=list)


class _Rank:
    """One rank on its way through its calls."""

    def __init__(self, rank: int, slowdown: float, jitter: float, seed: int) -> None:
        self.rank, self.slowdown, self.jitter = rank, slowdown, jitter
        self.random = random.Random(f"{seed} {rank}")  # its own: what it draws does not depend on when others run
        self.time = self.computed = self.waited = self.communicated = 0.0
        self.call = self.at = 0
        self.numbers: dict[int, _Exchange] = {}  # of this call
        self.queues: dict[str, deque[_Exchange]] = {}  # by axes: not over yet, in order
        self.free: dict[str, float] = {}

    def takes(self, seconds: float) -> float:
        noise = 1.0 + self.jitter * self.random.random() if self.jitter else 1.0
        return seconds * self.slowdown * noise


class Engine:
    """Plays calls on all ranks. ``slowdown`` is a factor per rank on what it computes, ``jitter`` makes each operator
    up to that share slower, by a number drawn for it; events of the first ``keep`` calls are kept (None: of all)."""

    def __init__(
        self,
        calls: Sequence[Call],
        bandwidths: Sequence[float],
        slowdown: Sequence[float],
        jitter: float = 0.0,
        seed: int = 0,
        keep: int | None = None,
    ) -> None:
        self.calls, self.bandwidths = calls, bandwidths
        self.keep = len(calls) if keep is None else keep
        self.ranks = [_Rank(r, factor, jitter, seed) for r, factor in enumerate(slowdown)]
        self.known: dict[tuple[int, int, tuple[int, ...]], _Exchange] = {}
        self.due: list[tuple[float, int, _Exchange]] = []  # exchanges whose latency is passing, by its end
        self.count = 0
        self.moving: list[_Exchange] = []
        self.now = 0.0
        self.events: list[Event] = []
        self.ends = [0.0] * len(calls)

    def run(self) -> Timeline:
        """The timeline. Raises CheckError where ranks wait for exchanges that others never reach."""
        for rank in self.ranks:
            self._walk(rank)
        while self.due or self.moving:
            self._advance()
        if any(rank.call < len(self.calls) for rank in self.ranks) or self.known:
            raise CheckError(self._stuck())
        last = max(self.ranks, key=lambda r: r.time)
        self.events.sort(key=lambda e: (e.rank, e.start))
        return Timeline(last.time, last.computed, last.communicated, last.waited, self.events, self.ends)

    def _stuck(self) -> str:
        said = "ranks wait for exchanges that others never reach"
        for (call, number, group), exchange in self.known.items():
            missing = ", ".join(str(r) for r in group if r not in exchange.came)
            axes = next(iter(exchange.starts.values())).axes
            return f"{said}: number {number} of call {call}, over {axes} among ranks {group}; missing: {missing}"
        return f"{said}, or come to them in different orders"

    # -- ranks ----------------------------------------------------------------------------------

    def _walk(self, rank: _Rank) -> None:
        """Let a rank run on until it waits for an exchange whose end is not known yet."""
        while rank.call < len(self.calls):
            script, keep = self.calls[rank.call][rank.rank], rank.call < self.keep
            for at in range(rank.at, len(script)):
                step = script[at]
                if isinstance(step, Op):
                    took = rank.takes(step.seconds)
                    if keep:
                        self.events.append(
                            Event(rank.rank, COMPUTE, step.name, rank.time, rank.time + took, step.source)
                        )
                    rank.time, rank.computed = rank.time + took, rank.computed + took
                elif isinstance(step, Start):
                    self._come(rank, step)
                elif not self._wait(rank, step, keep):
                    rank.at = at
                    return
            self.ends[rank.call] = max(self.ends[rank.call], rank.time)
            rank.call, rank.at = rank.call + 1, 0
            rank.numbers.clear()

    def _come(self, rank: _Rank, start: Start) -> None:
        key = (rank.call, start.number, start.group)
        exchange = self.known.get(key)
        if exchange is None:
            exchange = self.known[key] = _Exchange(start.load, start.group, left=start.load.moving, call=rank.call)
        exchange.came[rank.rank], exchange.starts[rank.rank] = rank.time, start
        rank.numbers[start.number] = exchange
        rank.queues.setdefault(start.axes, deque()).append(exchange)
        if len(exchange.came) == len(exchange.group):
            del self.known[key]
            self._begin(exchange)

    def _wait(self, rank: _Rank, wait: Wait, keep: bool) -> bool:
        exchange = rank.numbers[wait.number]
        if exchange.end is None:
            exchange.waiting.append(rank)
            return False
        end = exchange.end
        if end > rank.time:
            if keep:
                last = max(exchange.came, key=lambda r: exchange.came[r])
                came = min(end, max(rank.time, exchange.came[last]))
                for late, begin, over in ((last, rank.time, came), (-1, came, end)):
                    if over > begin:
                        name = WAIT if late < 0 else f"wait for rank {late}"
                        self.events.append(Event(rank.rank, WAIT, name, begin, over, wait.source, late=late))
            rank.waited += end - rank.time
            rank.time = end
        return True

    # -- exchanges ------------------------------------------------------------------------------

    def _begin(self, exchange: _Exchange) -> None:
        """Begin, where all have come and their streams are free."""
        members = [(self.ranks[m], exchange.starts[m].axes) for m in exchange.group if m in exchange.starts]
        if len(members) < len(exchange.group) or any(r.queues[axes][0] is not exchange for r, axes in members):
            return
        exchange.begin = max(max(exchange.came[r.rank], r.free.get(axes, 0.0)) for r, axes in members)
        self.count += 1
        heapq.heappush(self.due, (exchange.begin + exchange.load.latency, self.count, exchange))

    def _advance(self) -> None:
        """On to the next moment at which an exchange starts to move or is over."""
        next_end = min((self.now + e.left / e.speed for e in self.moving), default=math.inf)
        then = min(next_end, self.due[0][0] if self.due else math.inf)
        over = []
        for e in self.moving:
            e.left -= (then - self.now) * e.speed
            if e.left <= 1e-9 * e.load.moving:
                over.append(e)
        self.now = then
        begun = len(self.moving)
        self.moving = [e for e in self.moving if e not in over] if over else self.moving
        for e in over:
            self._end(e)
        while self.due and self.due[0][0] <= then:
            e = heapq.heappop(self.due)[2]
            if e.load.moving:
                self.moving.append(e)
            else:
                self._end(e)
        if over or len(self.moving) != begun:
            found = speeds([e.load for e in self.moving], self.bandwidths)
            for e, speed in zip(self.moving, found, strict=True):
                e.speed = speed

    def _end(self, exchange: _Exchange) -> None:
        exchange.end = self.now
        begin = exchange.begin or 0.0
        following = []
        for member in exchange.group:
            rank, start = self.ranks[member], exchange.starts[member]
            queue = rank.queues[start.axes]
            queue.popleft()
            rank.free[start.axes] = self.now
            rank.communicated += self.now - begin
            if exchange.call < self.keep:
                self.events.append(
                    Event(member, COMMUNICATION, start.name, begin, self.now, start.source, start.axes, start.bytes)
                )
            if queue and queue[0] not in following:
                following.append(queue[0])
        for one in following:
            if one.begin is None:
                self._begin(one)
        waiting, exchange.waiting = exchange.waiting, []
        for rank in waiting:
            self._walk(rank)
