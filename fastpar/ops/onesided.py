"""One-sided communication: ``put`` into the peers' memory, ``receive`` out of one's own.

Every rank has a *heap*, of the same size and cut alike on all. A message has a *channel*, which has a place in the
heap. The sender copies its piece to that place in the receiver's heap and then raises a flag there; the receiver waits
for its flags and reads. Nobody meets anybody (StreamFusion, section 4.4: put and signal instead of send and receive).

| operator | meaning |
|---|---|
| ``put(x, heap, channel, sends, awaits) -> token`` | pieces of ``x`` (1-D) to the peers' heaps, then their flags |
| ``receive(token, sent, heap, channel, ...) -> tensors`` | waits, then unpacks what came, into memory of its own |
| ``receive_sum(token, sent, heap, channel, ...) -> tensor`` | waits, then reduces equal terms, in rank order |

``sends`` are quadruples (peer, start and size in ``x`` in elements, offset in the peer's heap in bytes); ``awaits`` are
triples (reader, channel, lag): the put waits until ``reader`` has read that channel, in this call (lag 0) or in the
one before (lag 1). ``sources`` are the peers whose flags a receive waits for, ``credits`` the peers to whom it says
afterwards that it has read. Peers are ranks of the mesh. ``sent`` is what ``put`` was given: it stays alive until the
receive, which also waits for it to have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx.node import has_side_effect

from fastpar.core.errors import FastparError
from fastpar.ops.collectives import _LIB, _PT2, _unpack_fake, reduce_terms, unpack_boxes

_TAGS = (*_PT2, torch.Tag.needs_exact_strides)
_LIB.define("put(Tensor x, str heap, int channel, int[] sends, int[] awaits) -> Tensor", tags=_TAGS)
_ARRIVES = "Tensor token, Tensor sent, str heap, int channel, int[] sources, int[] credits, int offset"
_LIB.define(
    f"receive({_ARRIVES}, int numel, int[] shapes, int[] boxes, str dtypes='') -> Tensor[]", tags=_TAGS
)
_LIB.define(f"receive_sum({_ARRIVES}, int terms, int numel, str op) -> Tensor", tags=_TAGS)

put = torch.ops.fastpar.put.default
receive = torch.ops.fastpar.receive.default
receive_sum = torch.ops.fastpar.receive_sum.default
RECEIVES = (receive, receive_sum)
for _op in (put, *RECEIVES):  # flags are raised and waited for even where a rank has no use for what came
    has_side_effect(_op)

Read = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class HeapSpec:
    """What the ranks' programs need of a heap: a label per channel (for messages), and bytes for what travels."""

    name: str
    labels: tuple[str, ...]
    size: int

    @property
    def channels(self) -> int:
        return len(self.labels)


class Heap(Protocol):
    """What an operator asks of the heap that it names."""

    def put(self, x: torch.Tensor, channel: int, sends: Sequence[int], awaits: Sequence[int]) -> None: ...

    def receive(
        self,
        like: torch.Tensor,
        channel: int,
        sources: Sequence[int],
        credits: Sequence[int],
        offset: int,
        numel: int,
        read: Read,
    ) -> Any:
        """What ``read`` makes of the ``numel`` elements, of ``like``'s dtype, that came to ``offset`` (bytes)."""

    def unpack(
        self, buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str
    ) -> list[torch.Tensor]:
        """``fastpar::unpack`` out of the heap, as its device does it best."""


_live: dict[str, Heap] = {}


def register(name: str, heap: Heap) -> None:
    """From now on operators that name ``name`` use ``heap``."""
    if name in _live:
        raise FastparError(f"there is a heap {name!r} already; live: {', '.join(sorted(_live))}")
    _live[name] = heap


def release(name: str) -> None:
    """Forget a heap; no error if there is none."""
    _live.pop(name, None)


def heap_of(name: str) -> Heap:
    """Raises FastparError where no heap of this name is live: its program was freed, or never given one."""
    found = _live.get(name)
    if found is None:
        raise FastparError(
            f"no heap {name!r}: the program that it belongs to was freed, or compiled without a transport; "
            f"live: {', '.join(sorted(_live)) or 'none'}"
        )
    return found


def quadruples(flat: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """``sends`` of a put as (peer, start, size, offset)."""
    return [(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]) for i in range(0, len(flat), 4)]


def triples(flat: Sequence[int]) -> list[tuple[int, int, int]]:
    """``awaits`` of a put as (reader, channel, lag)."""
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def sum_of(terms: int, numel: int, op: str) -> Read:
    """How ``receive_sum`` reads: ``terms`` terms of ``numel`` elements, one behind the other, in rank order."""
    return lambda buffer: reduce_terms(list(buffer.view(terms, numel).unbind()), op)


def _token(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(1, dtype=torch.uint8)


def _put(x: torch.Tensor, heap: str, channel: int, sends: Sequence[int], awaits: Sequence[int]) -> torch.Tensor:
    heap_of(heap).put(x, channel, sends, awaits)
    return _token(x)


def _receive(
    token: torch.Tensor, sent: torch.Tensor, heap: str, channel: int, sources: Sequence[int], credits: Sequence[int],
    offset: int, numel: int, shapes: Sequence[int], boxes: Sequence[int], dtypes: str = "",
) -> list[torch.Tensor]:  # fmt: skip
    mine = heap_of(heap)

    def read(buffer: torch.Tensor) -> list[torch.Tensor]:
        return mine.unpack(buffer, shapes, boxes, dtypes)

    return list(mine.receive(sent, channel, sources, credits, offset, numel, read))


def _receive_sum(
    token: torch.Tensor, sent: torch.Tensor, heap: str, channel: int, sources: Sequence[int], credits: Sequence[int],
    offset: int, terms: int, numel: int, op: str,
) -> torch.Tensor:  # fmt: skip
    read = sum_of(terms, numel, op)
    out: torch.Tensor = heap_of(heap).receive(sent, channel, sources, credits, offset, terms * numel, read)
    return out


def _receive_fake(
    token: torch.Tensor, sent: torch.Tensor, heap: str, channel: int, sources: Sequence[int], credits: Sequence[int],
    offset: int, numel: int, shapes: Sequence[int], boxes: Sequence[int], dtypes: str = "",
) -> list[torch.Tensor]:  # fmt: skip
    return _unpack_fake(sent, shapes, boxes, dtypes)


def _receive_sum_fake(
    token: torch.Tensor, sent: torch.Tensor, heap: str, channel: int, sources: Sequence[int], credits: Sequence[int],
    offset: int, terms: int, numel: int, op: str,
) -> torch.Tensor:  # fmt: skip
    return sent.new_empty(numel)


_LIB.impl("put", _put, "CompositeExplicitAutograd")
_LIB.impl("receive", _receive, "CompositeExplicitAutograd")
_LIB.impl("receive_sum", _receive_sum, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::put", lambda x, *_: _token(x), lib=_LIB)
torch.library.register_fake("fastpar::receive", _receive_fake, lib=_LIB)
torch.library.register_fake("fastpar::receive_sum", _receive_sum_fake, lib=_LIB)


def is_onesided(node: Any) -> bool:
    """Whether a node of a localised program puts or receives."""
    return node.op == "call_function" and (node.target is put or node.target in RECEIVES)


def arrival(node: Any) -> tuple[str, int, list[int], list[int], int, int]:
    """Of a receive: (heap, channel, sources, credits, offset, elements)."""
    _, _, heap, channel, sources, credits, offset, *rest = node.args
    numel = rest[0] if node.target is receive else math.prod(rest[:2])
    return heap, channel, list(sources), list(credits), offset, numel


def reader(node: Any) -> Read:
    """How a receive reads what came, on the CPU."""
    if node.target is receive:
        _, shapes, boxes, *dtypes = node.args[7:]
        return lambda buffer: unpack_boxes(buffer, shapes, boxes, *dtypes)
    return sum_of(*node.args[7:10])
