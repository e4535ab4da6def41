"""What happened when, on every rank: what the virtual clock gives, and what traces and pictures are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

COMPUTE, COMMUNICATION, WAIT = "compute", "communication", "wait"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a rank did from ``start`` to ``end`` (seconds).

    ``stream`` says what: ``compute`` (operators), ``communication`` (an exchange with the group over the mesh's
    ``axes``, to which the rank sends ``bytes``) or ``wait`` (its computing stream stands still until an exchange is
    over; ``late`` is the rank that had not come to it yet, -1 where all had). Operators and waits of a rank follow
    each other, and so do its exchanges over the same axes; those over other axes can be under way at the same time.
    """

    rank: int
    stream: str
    name: str
    start: float
    end: float
    source: str = ""
    axes: str = ""
    bytes: int = 0
    late: int = -1

    @property
    def row(self) -> str:
        """The row of a trace that it belongs to; nothing on one row of one rank overlaps."""
        return f"communication over {self.axes}" if self.stream == COMMUNICATION else "compute"


@dataclass
class Timeline:
    """Calls on all ranks: seconds until the last rank is done; of that rank what it computed, what its exchanges
    took and how long it stood still for them. ``calls`` is when the last rank was done with each call."""

    seconds: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    events: list[Event] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    def then(self, other: Timeline) -> Timeline:
        """``other`` behind this one, begun when its last rank is done."""
        later = [replace(e, start=e.start + self.seconds, end=e.end + self.seconds) for e in other.events]
        return Timeline(
            self.seconds + other.seconds,
            self.compute + other.compute,
            self.communication + other.communication,
            self.exposed + other.exposed,
            [*self.events, *later],
            [*self.calls, *(self.seconds + c for c in other.calls)],
        )

    def rows(self) -> Iterator[tuple[int, str, list[Event]]]:
        """(rank, row, its events in order of time): every rank's operators and waits, then its exchanges by axes."""
        found: dict[tuple[int, str], list[Event]] = {}
        for event in self.events:
            found.setdefault((event.rank, event.row), []).append(event)
        for rank, row in sorted(found, key=lambda key: (key[0], key[1] != "compute", key[1])):
            yield rank, row, sorted(found[rank, row], key=lambda e: e.start)
