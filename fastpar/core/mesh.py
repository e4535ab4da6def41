"""A mesh of virtual ranks: named axes, row-major coordinates, fibres.

This is the arithmetic only. Real process groups come from
``torch.distributed.device_mesh`` and are made in ``fastpar.run``; a layout, a rule
or a pass never needs more than the names and sizes here, which is what lets N ranks
be planned and simulated in one process.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache


@dataclass(frozen=True)
class Mesh:
    """Named axes in row-major order: the last axis varies fastest with the rank.

    ``Mesh((("ring", 2), ("ulysses", 4)))`` has 8 ranks; rank 5 is ring 1, ulysses 1. ``speeds`` has a number per rank
    where some are faster than others: what is split is shared out in these proportions (STADI's elastic patches).
    """

    axes: tuple[tuple[str, int], ...] = ()
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"mesh axis named twice: {names}")
        if self.speeds and (len(self.speeds) != self.ranks or min(self.speeds) <= 0):
            raise ValueError(f"a mesh of {self.ranks} ranks takes as many speeds above 0, not {self.speeds}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return math.prod(size for _, size in self.axes)

    def size(self, axes: tuple[str, ...]) -> int:
        """Number of coordinates of the sub-mesh over ``axes``."""
        sizes = dict(self.axes)
        return math.prod(sizes[name] for name in axes)

    def coordinate(self, rank: int, axes: tuple[str, ...]) -> int:
        """Row-major index of ``rank`` within the sub-mesh over ``axes`` (in the order given)."""
        return _coordinate(self, rank, axes)

    def group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` only along ``axes``, ordered by their coordinate there."""
        return _group(self, rank, axes)

    def ordered(self, axes: set[str] | frozenset[str]) -> tuple[str, ...]:
        """``axes`` in the mesh's own order."""
        return tuple(name for name in self.names if name in axes)

    def speed(self, rank: int) -> float:
        """How fast a rank is, compared with the others."""
        return self.speeds[rank] if self.speeds else 1.0

    def shares(self, axes: tuple[str, ...]) -> tuple[Fraction, ...]:
        """By coordinate of the sub-mesh over ``axes``, what its ranks are of all ranks' speed together."""
        return _shares(self, axes)

    def __str__(self) -> str:
        axes = ",".join(f"{name}:{size}" for name, size in self.axes) or "single"
        return axes + (";" + ":".join(map(repr, self.speeds)) if self.speeds else "")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Inverse of ``str``."""
        axes, _, row = text.partition(";")
        pairs = (item.rsplit(":", 1) for item in axes.split(",")) if axes != "single" else ()
        speeds = tuple(map(float, row.split(":"))) if row else ()
        return cls(tuple((name, int(size)) for name, size in pairs), speeds)


@cache
def _digits(mesh: Mesh, rank: int) -> dict[str, int]:
    out: dict[str, int] = {}
    for name, size in reversed(mesh.axes):
        rank, out[name] = divmod(rank, size)
    return out


@cache
def _coordinate(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> int:
    digits, sizes, index = _digits(mesh, rank), dict(mesh.axes), 0
    for name in axes:
        index = index * sizes[name] + digits[name]
    return index


@cache
def _group(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    digits, sizes = _digits(mesh, rank), dict(mesh.axes)
    members = []
    for coordinates in itertools.product(*(range(sizes[name]) for name in axes)):
        wanted = {**digits, **dict(zip(axes, coordinates, strict=True))}
        index = 0
        for name, size in mesh.axes:
            index = index * size + wanted[name]
        members.append(index)
    return tuple(members)


@cache
def _shares(mesh: Mesh, axes: tuple[str, ...]) -> tuple[Fraction, ...]:
    n = mesh.size(axes)
    if not mesh.speeds:
        return (Fraction(1, n),) * n
    totals = [Fraction(0)] * n  # of floats, exactly: equal ones must stay equal
    for rank, speed in enumerate(mesh.speeds):
        totals[mesh.coordinate(rank, axes)] += Fraction(speed)
    return tuple(total / sum(totals) for total in totals)
