"""Which place in the heap each message has: interval colouring over the schedule.

All ranks run the same exchanges in the same order, so a channel has one slot, at the same offset on every rank and as
large as the rank needs it that receives most. Two channels may share bytes where on *every* rank the one has been read
before the other is started; else both could be under way at once. Channels take the lowest gap that no such neighbour
holds (first fit, in order of start).

Sharing sooner saves memory and costs order: a slot may be written again only when its reader is known to have read it
(``order``). ``apart`` keeps a slot unused for that many channels after it was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastpar.core.errors import CheckError

ALIGN = 128
"""Bytes: what every device's widest loads and copies want."""

PUT, READ = "put", "read"
Event = tuple[str, int]  # (PUT or READ, channel)


@dataclass(frozen=True)
class Traffic:
    """What the programs of all ranks send, and when.

    ``events[rank]`` are its puts and reads in program order, each channel's once. ``members[channel][rank]`` are the
    ranks from which it receives, in the order in which their pieces lie; ``bytes[channel][rank]`` the sizes of those
    pieces, in the same order.
    """

    events: tuple[tuple[Event, ...], ...]
    members: tuple[tuple[tuple[int, ...], ...], ...]
    bytes: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        every = sorted((kind, c) for kind in (PUT, READ) for c in range(len(self.bytes)))
        for rank, events in enumerate(self.events):
            if sorted(events) != every:
                raise CheckError(f"rank {rank} does not put and read every channel exactly once")

    @property
    def ranks(self) -> int:
        return len(self.events)

    @property
    def channels(self) -> int:
        return len(self.bytes)

    @cached_property
    def place(self) -> dict[str, np.ndarray]:
        """[rank, channel] -> number of the rank's event that puts (reads) the channel."""
        out = {kind: np.zeros((self.ranks, self.channels), dtype=np.int64) for kind in (PUT, READ)}
        for rank, events in enumerate(self.events):
            for at, (kind, channel) in enumerate(events):
                out[kind][rank, channel] = at
        return out

    @cached_property
    def apart(self) -> np.ndarray:
        """[a, b]: on every rank ``a`` has been read before ``b`` is put."""
        read, put = self.place[READ], self.place[PUT]
        return np.all(read[:, :, None] < put[:, None, :], axis=0)

    def size(self, channel: int) -> int:
        """Bytes of the channel's slot."""
        return max((sum(pieces) for pieces in self.bytes[channel]), default=0)

    def pieces(self, channel: int, rank: int) -> dict[int, tuple[int, int]]:
        """Source -> (offset in the slot, bytes) of what ``rank`` receives; pieces of no bytes are left out."""
        return self._pieces[channel][rank]

    @cached_property
    def _pieces(self) -> list[list[dict[int, tuple[int, int]]]]:
        return [
            [_placed(members, sizes) for members, sizes in zip(*of_channel, strict=True)]
            for of_channel in zip(self.members, self.bytes, strict=True)
        ]


def _placed(members: Sequence[int], sizes: Sequence[int]) -> dict[int, tuple[int, int]]:
    out, at = {}, 0
    for source, size in zip(members, sizes, strict=True):
        if size:
            out[source] = (at, size)
        at += size
    return out


@dataclass(frozen=True)
class Slots:
    """``offsets[channel]`` and ``size`` of the whole heap, in bytes."""

    offsets: tuple[int, ...]
    size: int

    def sharing(self, traffic: Traffic) -> np.ndarray:
        """[a, b]: the two channels' slots have bytes in common."""
        low = np.array(self.offsets, dtype=np.int64)
        sizes = np.array([traffic.size(c) for c in range(traffic.channels)], dtype=np.int64)
        high, some = low + sizes, sizes > 0
        out: np.ndarray = (low[:, None] < high[None, :]) & (low[None, :] < high[:, None])
        return out & some[:, None] & some[None, :]


def assign(traffic: Traffic, apart: int = 0) -> Slots:
    """First fit, slots resting for ``apart`` channels between two uses."""
    free = traffic.apart & ~np.eye(traffic.channels, dtype=bool)
    if apart:
        # channels that start within the next few after a channel was read; they are numbered by their start
        first = np.array([np.flatnonzero(row)[0] if row.any() else traffic.channels for row in traffic.apart])
        free = free & (np.arange(traffic.channels)[None, :] >= (first + apart)[:, None])
    offsets: list[int] = []
    taken: list[tuple[int, int]] = []
    for channel in range(traffic.channels):
        size = -(-traffic.size(channel) // ALIGN) * ALIGN
        near = np.flatnonzero(~free[:channel, channel] & ~free[channel, :channel])
        busy = sorted(taken[other] for other in near)
        offsets.append(_gap(busy, size))
        taken.append((offsets[-1], offsets[-1] + size))
    return Slots(tuple(offsets), max((high for _, high in taken), default=0))


def _gap(busy: Sequence[tuple[int, int]], size: int) -> int:
    at = 0
    for low, high in busy:
        if low - at >= size:
            break
        at = max(at, high)
    return at
