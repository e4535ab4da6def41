"""The axes of a product's result, followed through views: what is batch, row or key is known wherever it stands.

An axis is a factor of a dimension. A view that parts a dimension parts its axis, everywhere; a view that merges
dimensions makes one of several axes. Axes of one row have no place to be followed to and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Axis:
    """A factor of a dimension, whole or parted by a view into ``parts``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: tuple[Axis, ...] = ()

    def leaves(self) -> list[Axis]:
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]


Dims = tuple[tuple[Axis, ...], ...]
"""For each dimension of a tensor its axes, in row-major order; none where it has one row."""


def dims_of(shape: Iterable[int]) -> Dims:
    """A tensor whose dimensions are axes of their own."""
    return tuple((Axis(int(n)),) if n > 1 else () for n in shape)


def leaves(axes: Iterable[Axis]) -> list[Axis]:
    """``axes`` as they are parted by now."""
    return [leaf for axis in axes for leaf in axis.leaves()]


def size(axes: Iterable[Axis]) -> int:
    return math.prod(axis.size for axis in axes)


def viewed(dims: Sequence[Sequence[Axis]], shape: Sequence[int]) -> Dims | None:
    """``dims`` after a view to ``shape``; None where a dimension is no product of axes or of parts of them."""
    todo = leaves(axis for dim in dims for axis in dim)[::-1]
    if size(todo) != math.prod(shape):
        return None
    out: list[tuple[Axis, ...]] = []
    for rows in shape:
        taken: list[Axis] = []
        while (need := rows // size(taken)) > 1 and rows % size(taken) == 0:
            axis = todo.pop()
            if axis.size > need:
                if axis.size % need:
                    return None
                axis.parts = Axis(need), Axis(axis.size // need)
                axis, rest = axis.parts
                todo.append(rest)
            taken.append(axis)
        if size(taken) != rows:
            return None
        out.append(tuple(taken))
    return tuple(out)


def permuted(dims: Dims, order: Sequence[int]) -> Dims:
    return tuple(dims[d % len(dims)] for d in order)
