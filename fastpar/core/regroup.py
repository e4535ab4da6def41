"""The view algebra: what a reshape, a slice or a concatenation does to layouts.

All of it is about one fact: a local tensor holds, per dimension, a row-major product
of local parts. A view is local when every new boundary falls between atoms, or inside
an atom at a multiple that divides each of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastpar.core.layout import Atom, Dim, Seg


@dataclass(frozen=True)
class Misfit:
    """Why a view is not local: input dimension ``dim`` would have to be split in multiples of ``unit``.

    ``unit`` is 0 where no such multiple exists and the dimension must be whole.
    """

    dim: int
    unit: int


def split_atom(atom: Atom, major: int) -> tuple[Atom, Atom] | None:
    """``atom`` as ``major`` times the rest, or None where a part is no multiple of the rest."""
    if major <= 0 or atom.size % major:
        return None
    minor = atom.size // major
    segs = []
    for seg in atom.segs:
        if any(n % minor for n in (seg.size, *seg.parts, *seg.offsets)):
            return None
        parts, offsets = (tuple(n // minor for n in ns) for ns in (seg.parts, seg.offsets))
        segs.append(Seg(seg.size // minor, seg.axes, parts, offsets))
    return Atom(tuple(segs)), Atom((Seg(minor),))


def regroup(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...] | Misfit:
    """Layout of ``view(shape)`` of a tensor laid out as ``dims``, or what stands in the way."""
    if math.prod(shape) == 0:
        if all(d.is_whole for d in dims):
            return tuple(Dim.whole(s) for s in shape)
        return Misfit(next(i for i, d in enumerate(dims) if not d.is_whole), 0)
    queue: list[tuple[Atom, int]] = []  # atoms in row-major order, with the dimension they come from
    for index, dim in enumerate(dims):
        for atom in dim.atoms:
            if queue and atom.whole and queue[-1][0].whole:
                queue[-1] = (Atom((Seg(queue[-1][0].size * atom.size),)), index)
            else:
                queue.append((atom, index))
    queue.reverse()
    out: list[Dim] = []
    for position, size in enumerate(shape):
        taken: list[Atom] = []
        have = 1
        while have < size:
            atom, index = queue.pop()
            if size % have:
                return Misfit(index, 0)
            need = size // have
            if atom.size > need:
                pieces = split_atom(atom, need)
                if pieces is None:
                    # a multiple of the minor part would do, if the atom as a whole can be cut there
                    unit = atom.size // need if atom.size % need == 0 else 0
                    blocked = index if not atom.whole else _nearest_split(dims, index)
                    return Misfit(blocked, unit if not atom.whole and dims[index].single else 0)
                atom, rest = pieces
                queue.append((rest, index))
            taken.append(atom)
            have *= atom.size
        if have != size:
            blocked = next((i for i, d in enumerate(dims) if not d.is_whole), 0)
            return Misfit(blocked, 0)
        # a split atom of one row has no size to place it by: it goes to the next dimension where only that one
        # has one row (one token, batch before it), stays at its own position where that still has one row,
        # and goes with its left neighbour otherwise
        last = position + 1 == len(shape) or shape[position + 1] != 1
        while queue and queue[-1][0].size == 1 and (last or (size == 1 and position >= queue[-1][1])):
            taken.append(queue.pop()[0])
        out.append(Dim.of(taken))
    return tuple(out)


def _nearest_split(dims: Sequence[Dim], index: int) -> int:
    split = [i for i, d in enumerate(dims) if not d.is_whole]
    return min(split, key=lambda i: abs(i - index)) if split else index


def slice_dim(dim: Dim, start: int, stop: int, step: int = 1) -> Dim | None:
    """Rows ``start:stop:step`` with every rank keeping what it has of them; None where not local.

    Not local only where the dimension is a product with something in front of a split atom.
    """
    if dim.is_whole:
        return Dim.whole(max(0, -(-(stop - start) // step)))
    if start == 0 and stop >= dim.size and step == 1:
        return dim
    atom = dim.single
    if atom is None:
        return None
    segs, offset = [], 0
    for seg in atom.segs:
        if seg.offsets:
            return None
        intervals = [(0, seg.size)] if not seg.axes else list(zip(seg.starts(), seg.parts, strict=True))
        counts = [count_in(offset + a, offset + a + n, start, stop, step) for a, n in intervals]
        total = count_in(offset, offset + seg.size, start, stop, step)
        if total:
            segs.append(Seg(total, seg.axes, tuple(counts) if seg.axes else ()))
        offset += seg.size
    return Dim.of([Atom(tuple(segs))])


def count_in(low: int, high: int, start: int, stop: int, step: int) -> int:
    """How many of ``range(start, stop, step)`` lie in [low, high)."""
    first = start + max(0, -(-(low - start) // step)) * step
    last = min(high, stop)
    return max(0, -(-(last - first) // step))


def cat_dims(dims: Sequence[Dim]) -> Dim | None:
    """Concatenation of dimensions, each rank concatenating what it has; None where one is a product.

    Whole with whole stays whole; callers bring all operands to be split when one is.
    """
    segs: list[Seg] = []
    for dim in dims:
        if dim.size == 0:
            continue
        if len(dim.atoms) > 1:
            return None
        segs += dim.atoms[0].segs if dim.atoms else (Seg(1),)
    return Dim.of([Atom(tuple(segs))])


def disjoint(dim: Dim) -> bool:
    """True where no row of a split dimension is held twice: no segment that is whole, or split over fewer axes,
    beside a split one, and no windows."""
    return all({*seg.axes} == atom.axes and not seg.offsets for atom in dim.atoms for seg in atom.segs)
