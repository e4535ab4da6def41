"""One-sided messages in random interleavings: heaps that are really shared, and puts that land when they please.

A put lets go of a message per peer. At one random moment its bytes land in the peer's heap, at a later one its flag is
raised; what is in the send buffer at the first moment is what lands. A credit is raised at a random moment after its
read. Heaps start as NaN and what has been read is NaN again, so that reading too early shows, and a slot is written
whether or not its reader is done, so that writing too early shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastpar.core.errors import CheckError
from fastpar.ops.collectives import flat_bytes
from fastpar.ops.onesided import HeapSpec, arrival, put, quadruples, reader, triples

NAN = 0xFF  # as every byte of a floating point number


@dataclass
class Message:
    """On its way: ``data`` (None once it landed, or for a credit), then ``flag`` at ``to`` (None for own pieces)."""

    heap: str
    source: int
    to: int
    data: torch.Tensor | None
    offset: int
    flag: tuple[str, int, int] | None  # of which kind, channel, rank that raises it
    epoch: int
    put: int | None  # the channel, for a put


class Heaps:
    """Heaps and flags of all ranks, and the messages on their way."""

    def __init__(self, specs: Sequence[HeapSpec], ranks: int) -> None:
        self.memory = {
            spec.name: [torch.full((spec.size,), NAN, dtype=torch.uint8) for _ in range(ranks)] for spec in specs
        }
        self.labels = {spec.name: spec.labels for spec in specs}
        self.flags: dict[tuple[str, int, tuple[str, int, int]], int] = {}
        self.under_way: list[Message] = []
        self.sent: dict[tuple[str, int, int], torch.Tensor] = {}  # send buffers that have yet to leave

    def _flag(self, heap: str, rank: int, flag: tuple[str, int, int]) -> int:
        return self.flags.get((heap, rank, flag), 0)

    def can(self, node: fx.Node, rank: int, epoch: int) -> bool:
        """Whether the rank's put or receive may take place in its call number ``epoch``."""
        if node.target is put:
            heap, channel, _, awaits = node.args[1:5]
            return all(
                self._flag(str(heap), rank, ("read", read, source)) >= epoch - lag
                for source, read, lag in triples(awaits)  # type: ignore[arg-type]
            )
        heap, channel, sources, *_ = arrival(node)
        if any((m.heap, m.source, m.put) == (heap, rank, channel) for m in self.under_way):
            return False  # what it sent has yet to leave
        flags = [self._flag(heap, rank, ("put", channel, source)) for source in sources]
        if any(flag > epoch for flag in flags):
            raise CheckError(f"rank {rank} finds a message of a later call in {self.labels[heap][channel]} ({channel})")
        return all(flag == epoch for flag in flags)

    def start(self, node: fx.Node, x: torch.Tensor, rank: int, epoch: int) -> None:
        heap, channel, sends, _ = node.args[1:5]
        data = flat_bytes(x)
        self.sent[str(heap), rank, int(channel)] = x  # type: ignore[arg-type]
        for peer, first, size, offset in quadruples(sends):  # type: ignore[arg-type]
            piece = data.narrow(0, first * x.element_size(), size * x.element_size())
            flag = None if peer == rank else ("put", int(channel), rank)  # type: ignore[arg-type]
            self.under_way.append(Message(str(heap), rank, peer, piece, offset, flag, epoch, int(channel)))  # type: ignore[arg-type]

    def receive(self, node: fx.Node, like: torch.Tensor, rank: int, epoch: int) -> Any:
        heap, channel, _, credits, offset, numel = arrival(node)
        slot = self.memory[heap][rank].narrow(0, offset, numel * like.element_size())
        out = reader(node)(slot.clone().view(like.dtype))
        slot.fill_(NAN)
        for writer in credits:
            flag = ("read", channel, rank)
            self.under_way.append(Message(heap, rank, writer, None, 0, flag, epoch, None))
        return out

    def travel(self, message: Message) -> torch.Tensor | None:
        """The message's next moment. Returns a send buffer, if with this all of it has left."""
        gone = None
        if message.data is not None:
            self.memory[message.heap][message.to].narrow(0, message.offset, len(message.data)).copy_(message.data)
            message.data = None
            key = (message.heap, message.source, message.put)
            if not any(m.data is not None and (m.heap, m.source, m.put) == key for m in self.under_way):
                gone = self.sent.pop(key)  # type: ignore[arg-type]
            if message.flag is not None:
                return gone
        elif message.flag is not None:
            self.flags[message.heap, message.to, message.flag] = message.epoch
        self.under_way.remove(message)
        return gone


__all__ = ["Heaps", "Message"]
