"""Who sends what to whom when a value changes its layout.

``transfer(src, dst, mesh, rank)`` is total: gathers, slices, all-to-alls, parts to other
parts, several split atoms in a dimension and several axes are all the same computation.
Every dimension is cut, independently of the others, into *cells*: runs of rows that one
source holds contiguously and the destination stores contiguously. A box is one cell per
dimension. Both sides enumerate the boxes of a destination in the same order, so a flat
buffer per peer is all that travels, and no element travels twice.

Where several ranks hold a row (a whole dimension, or replicas along an axis), the
destination takes it from itself if it can, else from the nearest such rank.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh


@dataclass(frozen=True)
class Box:
    """A block of rows: starts within the source's and the destination's local tensor, and sizes."""

    src: tuple[int, ...]
    dst: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class Transfer:
    """One rank's side of a change of layout within ``group`` (ranks of the mesh)."""

    group: tuple[int, ...]
    me: int  # index of this rank in the group
    sends: tuple[tuple[Box, ...], ...]  # per peer, what it takes from here
    receives: tuple[tuple[Box, ...], ...]  # per peer, what is taken from it
    shape: tuple[int, ...]  # of the local result

    @cached_property
    def send_splits(self) -> tuple[int, ...]:
        """Elements sent to each peer, this rank's own included."""
        return tuple(sum(b.numel for b in boxes) for boxes in self.sends)

    @cached_property
    def receive_splits(self) -> tuple[int, ...]:
        return tuple(sum(b.numel for b in boxes) for boxes in self.receives)

    @property
    def sent(self) -> int:
        """Elements that leave this rank for others."""
        return sum(self.send_splits) - self.send_splits[self.me]


@dataclass(frozen=True)
class _Cell:
    owner: int  # coordinate over the source dimension's axes
    src: int
    dst: int
    size: int


def runs(rows: np.ndarray) -> list[tuple[int, int, int]]:
    """(global start, local start, length) of every contiguous run of ``rows``."""
    if len(rows) == 0:
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = [0, *cuts.tolist()]
    ends = [*cuts.tolist(), len(rows)]
    return [(int(rows[a]), a, b - a) for a, b in zip(starts, ends, strict=True)]


@lru_cache(maxsize=8192)
def _pieces(dim: Dim, mesh: Mesh) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Elementary intervals of a dimension: their starts, and who holds each: (coordinate, local row)."""
    axes = mesh.ordered(dim.axes)
    held: list[tuple[int, int, int, int]] = []
    for rank in mesh.group(0, axes):
        coordinate = mesh.coordinate(rank, axes)
        held += [(g, n, coordinate, lo) for g, lo, n in runs(dim.rows(mesh, rank))]
    bounds = sorted({g for g, *_ in held} | {g + n for g, n, *_ in held})
    owners: list[list[tuple[int, int]]] = [[] for _ in bounds]
    index = {b: i for i, b in enumerate(bounds)}
    for g, n, coordinate, lo in held:
        for i in range(index[g], index[g + n]):
            owners[i].append((coordinate, lo + bounds[i] - g))
    return bounds, owners


@lru_cache(maxsize=65536)
def _cells(src: Dim, dst: Dim, mesh: Mesh, rank: int) -> tuple[_Cell, ...]:
    """How ``rank``'s rows of ``dst`` are found in ``src``, in local order."""
    axes = mesh.ordered(src.axes)
    bounds, owners = _pieces(src, mesh)
    own = mesh.coordinate(rank, axes)
    count = mesh.size(axes)
    out: list[_Cell] = []
    for start, local, length in runs(dst.rows(mesh, rank)):
        row, end = start, start + length
        i = bisect_right(bounds, row) - 1
        while row < end:
            stop = min(end, bounds[i + 1])
            # itself if it can, else the nearest coordinate behind: spreads the load over replicas
            owner, src_row = min(owners[i], key=lambda o: (own - o[0]) % count)
            out.append(_Cell(owner, src_row + row - bounds[i], local + row - start, stop - row))
            row, i = stop, i + 1
    return tuple(out)


@lru_cache(maxsize=16384)
def changed_axes(src: Layout, dst: Layout, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which a change of layout communicates, in mesh order.

    A dimension over several axes often moves along one of them (a ring inside a machine, whose rows are
    split between machines as well), and then only those ranks need to meet. Where nothing moves, the
    axes along which it could.
    """
    changed = [(a, b) for a, b in zip(src.dims, dst.dims, strict=True) if a != b]
    axes = {x for pair in changed for dim in pair for x in dim.axes}
    moved: set[str] = set()
    for a, b in changed if len(axes) > 1 else ():
        over = mesh.ordered(a.axes)
        members = mesh.group(0, over)  # by coordinate
        for rank in range(mesh.ranks):
            mine = members[mesh.coordinate(rank, over)]
            for owner in {cell.owner for cell in _cells(a, b, mesh, rank)}:
                moved |= {x for x in over if mesh.coordinate(mine, (x,)) != mesh.coordinate(members[owner], (x,))}
    return mesh.ordered(moved or axes)


@lru_cache(maxsize=65536)
def transfer(src: Layout, dst: Layout, mesh: Mesh, rank: int, axes: tuple[str, ...] | None = None) -> Transfer:
    """``rank``'s sends and receives for ``src -> dst`` (neither partial, same global shape).

    The group is over ``axes``, by default those along which something moves.
    """
    if src.partial or dst.partial or src.shape != dst.shape:
        raise ValueError(f"no transfer from {src} to {dst}: partial, or of another shape")
    group = mesh.group(rank, changed_axes(src, dst, mesh) if axes is None else axes)
    sends = tuple(_boxes(src, dst, mesh, rank, peer) for peer in group)
    receives = tuple(_boxes(src, dst, mesh, peer, rank) for peer in group)
    return Transfer(group, group.index(rank), sends, receives, dst.local_shape(mesh, rank))


def _boxes(src: Layout, dst: Layout, mesh: Mesh, source: int, target: int) -> tuple[Box, ...]:
    """What ``target`` takes from ``source``, in the target's local order."""
    constrained = {x for d in src.dims for x in d.axes}
    free = mesh.ordered(frozenset(mesh.names) - constrained)
    if mesh.coordinate(source, free) != mesh.coordinate(target, free):
        return ()  # replicas along an axis that the source layout does not use: taken from the own one
    per_dim = []
    for a, b in zip(src.dims, dst.dims, strict=True):
        mine = mesh.coordinate(source, mesh.ordered(a.axes))
        cells = [c for c in _cells(a, b, mesh, target) if c.owner == mine]
        if not cells:
            return ()
        per_dim.append(_joined(cells))
    return tuple(
        Box(tuple(c.src for c in cells), tuple(c.dst for c in cells), tuple(c.size for c in cells))
        for cells in itertools.product(*per_dim)
    )


def _joined(cells: list[_Cell]) -> list[_Cell]:
    """The same rows in as few cells: what lies side by side here and there (a ring's text and picture) is one."""
    out = cells[:1]
    for cell in cells[1:]:
        last = out[-1]
        if (cell.src, cell.dst) == (last.src + last.size, last.dst + last.size):
            out[-1] = _Cell(last.owner, last.src, last.dst, last.size + cell.size)
        else:
            out.append(cell)
    return out


@lru_cache(maxsize=16384)
def is_local(src: Layout, dst: Layout, mesh: Mesh) -> bool:
    """True where every rank already holds all rows that it needs."""
    if src.partial != dst.partial:
        return False
    if src.partial:
        src, dst = src.summed(), dst.summed()
    if changed_axes(src, dst, mesh) == ():
        return True
    return all(transfer(src, dst, mesh, rank).sent == 0 for rank in range(mesh.ranks))


@lru_cache(maxsize=16384)
def scattered(src: Layout, dst: Layout, mesh: Mesh) -> tuple[Layout, Layout] | None:
    """The exchange of a reduce-scatter: terms as rows of a dimension in front, split over ranks, then whole.

    None where ``src`` is not reduced along the way, or where an all-reduce sends no more.
    """
    gone = [p for p in src.partial if p not in dst.partial]
    if len(gone) != 1 or len(src.partial) != len(dst.partial) + 1:
        return None
    count = mesh.size(gone[0].axes)
    before = Layout((Dim.split(count, gone[0].axes, (1,) * count), *src.dims))
    after = Layout((Dim.whole(count), *dst.dims))
    sent = max(transfer(before, after, mesh, rank).sent for rank in range(mesh.ranks))
    return (before, after) if sent < max(_sent_reducing(src, dst, mesh)) else None


@lru_cache(maxsize=16384)
def elements_sent(src: Layout, dst: Layout, mesh: Mesh) -> tuple[int, ...]:
    """Elements that leave each rank for others in ``src -> dst``; an all-reduce counts 2(N-1)/N of its value."""
    by_terms = scattered(src, dst, mesh)
    return _sent_reducing(*(by_terms or (src, dst)), mesh)


def _sent_reducing(src: Layout, dst: Layout, mesh: Mesh) -> tuple[int, ...]:
    reduced = [0] * mesh.ranks
    if src.partial and src.partial != dst.partial:
        n = mesh.size(tuple(src.partial_axes - dst.partial_axes))
        for rank in range(mesh.ranks):
            numel = math.prod(src.local_shape(mesh, rank))
            reduced[rank] = -(-2 * (n - 1) * numel // n)
        src = Layout(src.dims, dst.partial)
    src, dst = src.summed(), dst.summed()
    return tuple(reduced[rank] + transfer(src, dst, mesh, rank).sent for rank in range(mesh.ranks))


@lru_cache(maxsize=16384)
def hands_over(src: Layout, dst: Layout, mesh: Mesh, rank: int) -> bool:
    """Whether a rank is left without rows, in some dimension, that others have after the exchange."""
    for a, b in zip(src.dims, dst.dims, strict=True):
        left = np.setdiff1d(a.rows(mesh, rank), b.rows(mesh, rank)) if a != b else ()
        if len(left) and any(np.isin(left, b.rows(mesh, other)).any() for other in range(mesh.ranks)):
            return True
    return False
