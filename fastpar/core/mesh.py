"""A mesh of virtual ranks: named axes, row-major coordinates, fibres.

This is the arithmetic only. Real process groups come from
``torch.distributed.device_mesh`` and are made in ``fastpar.run``; a layout, a rule
or a pass never needs more than the names and sizes here, which is what lets N ranks
be planned and simulated in one process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache


@dataclass(frozen=True)
class Mesh:
    """Named axes in row-major order: the last axis varies fastest with the rank.

    ``Mesh((("ring", 2), ("ulysses", 4)))`` has 8 ranks; rank 5 is ring 1, ulysses 1. ``speeds`` has a number per rank
    where some are faster than others: what is split is shared out in these proportions (STADI's elastic patches).
    ``strides`` has a number per rank where some run the model in one of so many steps only (STADI's step strides).
    """

    axes: tuple[tuple[str, int], ...] = ()
    speeds: tuple[float, ...] = ()
    strides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise ValueError(f"mesh axis named twice: {names}")
        if self.speeds and (len(self.speeds) != self.ranks or min(self.speeds) <= 0):
            raise ValueError(f"a mesh of {self.ranks} ranks takes as many speeds above 0, not {self.speeds}")
        if self.strides and (len(self.strides) != self.ranks or min(self.strides) < 1):
            raise ValueError(f"a mesh of {self.ranks} ranks takes as many strides from 1, not {self.strides}")

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
        """Ranks that differ from ``rank`` only along ``axes``, ordered by their coordinate there.

        Of an axis that is written ``gather@0+2`` only the ranks with these coordinates (``some``).
        """
        return _group(self, rank, axes)

    def ordered(self, axes: set[str] | frozenset[str]) -> tuple[str, ...]:
        """``axes`` in the mesh's own order."""
        return tuple(name for name in self.names if name in axes)

    def speed(self, rank: int) -> float:
        """How fast a rank is, compared with the others."""
        return self.speeds[rank] if self.speeds else 1.0

    def stride(self, rank: int) -> int:
        """A rank runs the model in one of so many steps."""
        return self.strides[rank] if self.strides else 1

    def meets(self, rank: int, peer: int) -> int:
        """Two ranks run the model at the same step in one of so many."""
        return math.lcm(self.stride(rank), self.stride(peer))

    def met(self, axes: tuple[str, ...]) -> float:
        """Of what the busiest rank would send its peers over ``axes`` if all ran the model in every step, what it sends
        in the mean of all steps: with each peer it meets in some of them."""
        return _met(self, axes)

    def shares(self, axes: tuple[str, ...]) -> tuple[Fraction, ...]:
        """By coordinate of the sub-mesh over ``axes``, what its ranks are of all ranks' speed together."""
        return _shares(self, axes)

    def __str__(self) -> str:
        axes = ",".join(f"{name}:{size}" for name, size in self.axes) or "single"
        rows = [":".join(map(repr, row)) for row in (self.speeds, self.strides)]
        return ";".join([axes, *(rows if self.strides else rows[:1] if self.speeds else [])])

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Inverse of ``str``."""
        axes, speeds, strides = (text.split(";") + ["", ""])[:3]
        pairs = (item.rsplit(":", 1) for item in axes.split(",")) if axes != "single" else ()
        return cls(
            tuple((name, int(size)) for name, size in pairs),
            tuple(map(float, speeds.split(":"))) if speeds else (),
            tuple(map(int, strides.split(":"))) if strides else (),
        )


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


def some(axis: str, coordinates: Iterable[int]) -> str:
    """The name of a group of some of an axis's ranks.

    >>> some("gather", (0, 2))
    'gather@0+2'
    """
    return f"{axis}@{'+'.join(map(str, sorted(coordinates)))}"


def is_some(name: str) -> bool:
    """Whether a name is that of some of an axis's ranks (``some``)."""
    return "@" in name


@cache
def _group(mesh: Mesh, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    digits, sizes = _digits(mesh, rank), dict(mesh.axes)
    named = [axis.partition("@") for axis in axes]
    along = [map(int, few.split("+")) if few else range(sizes[name]) for name, _, few in named]
    members = []
    for coordinates in itertools.product(*along):
        wanted = {**digits, **{name: at for (name, _, _), at in zip(named, coordinates, strict=True)}}
        index = 0
        for name, size in mesh.axes:
            index = index * size + wanted[name]
        members.append(index)
    return tuple(members)


@cache
def _met(mesh: Mesh, axes: tuple[str, ...]) -> float:
    shares = mesh.shares(mesh.names)
    sent = [Fraction(0)] * mesh.ranks
    for rank in range(mesh.ranks):
        peers = [peer for peer in mesh.group(rank, axes) if peer != rank]
        sent[rank] = shares[rank] * sum(Fraction(1, mesh.meets(rank, peer)) for peer in peers) / max(1, len(peers))
    return float(max(sent) / max(shares))


@cache
def _shares(mesh: Mesh, axes: tuple[str, ...]) -> tuple[Fraction, ...]:
    n = mesh.size(axes)
    if not mesh.speeds:
        return (Fraction(1, n),) * n
    totals = [Fraction(0)] * n  # of floats, exactly: equal ones must stay equal
    for rank, speed in enumerate(mesh.speeds):
        totals[mesh.coordinate(rank, axes)] += Fraction(speed)
    return tuple(total / sum(totals) for total in totals)
