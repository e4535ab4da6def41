"""The protocol of puts and receives, over whatever moves the bytes.

A transport supplies five things (the abstract methods of ``Heap``): writing into a peer's heap, raising a flag there,
awaiting one's own flags, seeing one's own heap, and closing. The rest is here, once.

Flags are int64 numbers that only grow: the number of the call (*epoch*) in which they were last raised. A flag of an
older call satisfies nobody, so a message that is late or lost is never taken for the next one, and nothing is ever
reset. A heap begins with its flags: per channel and rank one for "your piece is here", then one for "I have read".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastpar.backends.onesided.slots import ALIGN
from fastpar.ops.collectives import unpack_boxes
from fastpar.ops.onesided import HeapSpec, Read, quadruples, triples

FLAG = 8
"""Bytes of a flag."""


class Heap(ABC):
    """One rank's heap and its way to those of the others. ``rank`` and peers are ranks of the mesh."""

    def __init__(self, spec: HeapSpec, rank: int, ranks: int, timeout: float) -> None:
        self.spec, self.rank, self.ranks, self.timeout = spec, rank, ranks, timeout
        self.calls = 0  # begun on the host; under replay of a graph the device counts for itself

    # -- what a transport supplies

    @abstractmethod
    def write(self, peer: int, offset: int, piece: torch.Tensor) -> None:
        """Copy ``piece`` (contiguous bytes) to ``offset`` of the peer's heap, behind what was written before."""

    @abstractmethod
    def raise_flags(self, flags: Sequence[tuple[int, int]]) -> None:
        """Set each (peer, flag) to this call's number there, behind everything that was written before."""

    @abstractmethod
    def await_flags(self, flags: Sequence[int], lag: int, pieces: Sequence[tuple[int, int]] = ()) -> None:
        """Wait until each of the own flags has reached this call's number less ``lag``; no longer than ``timeout``.

        ``pieces``: (offset, bytes) in the own heap of what each flag announces, if it announces any.
        """

    @abstractmethod
    def slot(self, offset: int, size: int) -> torch.Tensor:
        """``size`` bytes of the own heap at ``offset``: a view."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all heaps; again is no error."""

    def begin(self) -> None:
        """A call of the program begins."""
        self.calls += 1

    def end(self) -> None:  # noqa: B027  (most have nothing to do)
        """All of the call has been launched."""

    @contextmanager
    def sending(self, channel: int) -> Iterator[None]:
        """Around the puts of a channel: on a stream of its own, where there are streams."""
        yield

    def settle(self, channel: int) -> None:  # noqa: B027
        """What ``put`` was given for this channel has left."""

    # -- flags

    def message_flag(self, channel: int, source: int) -> int:
        """Raised at the receiver by ``source``: its piece is here."""
        return channel * self.ranks + source

    def credit_flag(self, channel: int, reader: int) -> int:
        """Raised at a writer by ``reader``: it has read the channel."""
        return (self.spec.channels + channel) * self.ranks + reader

    def tell(self, flag: int) -> str:
        """What a flag that never came would have said."""
        number, rank = divmod(flag, self.ranks)
        read = number >= self.spec.channels
        channel = number - self.spec.channels if read else number
        what = f"channel {channel} ({self.spec.labels[channel]}) of {self.spec.name}"
        return f"rank {rank} to say that it has read {what}" if read else f"the message of rank {rank} in {what}"

    # -- the protocol

    def put(self, x: torch.Tensor, channel: int, sends: Sequence[int], awaits: Sequence[int]) -> None:
        data = x.contiguous().view(-1)
        data = data.view(torch.uint8)
        item = x.element_size()
        pieces = quadruples(sends)
        # the next rank first, and so on round: else all would write to rank 0 at once
        pieces.sort(key=lambda piece: (piece[0] - self.rank) % self.ranks)
        with self.sending(channel):
            for lag in (0, 1):
                flags = [self.credit_flag(read, who) for who, read, late in triples(awaits) if late == lag]
                if flags:
                    self.await_flags(flags, lag)
            for peer, start, size, offset in pieces:
                self.write(peer, offset, data.narrow(0, start * item, size * item))
            mine = self.message_flag(channel, self.rank)
            self.raise_flags([(peer, mine) for peer, *_ in pieces if peer != self.rank])

    def receive(
        self,
        like: torch.Tensor,
        channel: int,
        sources: Sequence[int],
        credits: Sequence[int],
        offset: int,
        numel: int,
        read: Read,
    ) -> object:
        self.settle(channel)
        size = numel * like.element_size()
        if sources:
            flags = [self.message_flag(channel, source) for source in sources]
            self.await_flags(flags, 0, [(offset, size)] * len(flags))
        out = read(self.slot(offset, size).view(like.dtype))
        mine = self.credit_flag(channel, self.rank)
        self.raise_flags([(writer, mine) for writer in credits])
        return out

    def unpack(
        self, buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str
    ) -> list[torch.Tensor]:
        return unpack_boxes(buffer, shapes, boxes, dtypes)


def flags_size(spec: HeapSpec, ranks: int) -> int:
    """Bytes in front of a heap's data."""
    return -(-2 * spec.channels * ranks * FLAG // ALIGN) * ALIGN
