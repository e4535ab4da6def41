"""Boxes as a table in device memory: which tensor, where in the buffer, where in the tensor, how large.

A row per box, int64: ``[lane, offset, *starts (4), *sizes (4)]``. ``offset`` is in bytes; starts and sizes are numbers
of the tensor, with ones in front of dimensions that it does not have. ``pack`` has its boxes as integers in the
graph. A kernel reads them from memory, so that one kernel serves all exchanges; a table is made before a program
runs, and is one of its inputs, because a copy from the host cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpar.ops.collectives import decode, shapes_of

ENTRIES = 10
RANK = 4
LANES = 4
"""Tensors that one launch takes; of more there are several launches."""


@dataclass(frozen=True)
class Tile:
    """A box: of tensor ``lane``, ``offset`` bytes into the buffer, ``starts`` and ``sizes`` of four dimensions."""

    lane: int
    offset: int
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.sizes[:-1])

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def tiles(boxes: Sequence[int], itemsizes: Sequence[int]) -> list[Tile]:
    """Boxes in buffer order (``collectives.encode``); ``itemsizes`` are bytes of a number, by lane."""
    out, offset = [], 0
    for lane, starts, sizes in decode(boxes):
        gap = RANK - len(starts)
        out.append(Tile(lane, offset, (0,) * gap + starts, (1,) * gap + sizes))
        offset += math.prod(sizes) * itemsizes[lane]
    return out


def make_table(boxes: Sequence[int], itemsizes: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """The table, ``[boxes, ENTRIES]``; at least one row, since nothing points into an empty tensor."""
    found = [[t.lane, t.offset, *t.starts, *t.sizes] for t in tiles(boxes, itemsizes)]
    return torch.tensor(found or [[-1] * ENTRIES], dtype=torch.int64, device=device)


def strides4(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of ``x`` with zeros in front; the index of a dimension that is not there is 0 anyway."""
    a, b, c, d = (0,) * (RANK - x.dim()) + x.stride()
    return a, b, c, d


def lanes_of(xs: Sequence[torch.Tensor], chosen: Sequence[int]) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Four tensors, their strides and their lanes for one launch over ``chosen``; lane -1 is nobody's."""
    spare = LANES - len(chosen)
    padded = [*chosen, *[chosen[0]] * spare]
    strides = [s for lane in padded for s in strides4(xs[lane])]
    return [xs[lane] for lane in padded], strides, [*chosen, *[-1] * spare]


def groups(lanes: Sequence[int]) -> list[list[int]]:
    """Lanes in fours."""
    return [list(lanes[i : i + LANES]) for i in range(0, len(lanes), LANES)]


def ranks(shapes: Sequence[int]) -> list[int]:
    """How many dimensions each of ``shapes`` has ([rank, *sizes] each)."""
    return [len(shape) for shape in shapes_of(shapes)]
