"""Layouts: which part of a tensor each rank holds.

A tensor dimension is a row-major product of **atoms**, an atom is a concatenation of
**segments**, and a segment is whole on every rank or split over an ordered tuple of
mesh axes into ``parts``: one size per coordinate of that sub-mesh, uneven and empty
parts included. A value may also be **partial** over axes: the true value is the sum
(max, min) of what those ranks hold.

    FLUX joint tokens on 8 ranks     512@sp(64*8)+4096@sp(512*8)
    batch 2 flattened into tokens    2*1025@sp(257,256*3)
    a whole dimension                3072

Layouts are values: frozen, hashable, and equal exactly when every rank holds the same
rows in the same order (``Dim.of`` brings products to one normal form). Their text
round-trips, because it is what a dumped program carries as node arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property, lru_cache

import numpy as np

from fastpar.core.errors import TextError
from fastpar.core.mesh import Mesh


@dataclass(frozen=True)
class Seg:
    """A run of rows of one dimension: whole, or split over ``axes`` into ``parts``.

    Parts follow each other, unless ``offsets`` says where each begins: then they are windows,
    which may overlap (what a convolution reads of its input).
    """

    size: int
    axes: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.axes and not self.offsets and sum(self.parts) != self.size:
            raise ValueError(f"parts {self.parts} do not sum to {self.size}")
        if self.offsets and any(o < 0 or o + p > self.size for o, p in zip(self.offsets, self.parts, strict=True)):
            raise ValueError(f"windows {self.offsets}, {self.parts} reach outside {self.size} rows")

    def scaled(self, k: int) -> Seg:
        """The same segment with every row standing for ``k`` rows."""
        return Seg(self.size * k, self.axes, tuple(p * k for p in self.parts), tuple(o * k for o in self.offsets))

    def starts(self) -> tuple[int, ...]:
        """First row of each coordinate's part, relative to the segment."""
        if self.offsets:
            return self.offsets
        out, total = [], 0
        for part in self.parts:
            out.append(total)
            total += part
        return tuple(out)

    def local(self, mesh: Mesh, rank: int) -> tuple[int, int]:
        """(start within the segment, length) of what ``rank`` holds."""
        if not self.axes:
            return 0, self.size
        c = mesh.coordinate(rank, self.axes)
        return (self.offsets[c] if self.offsets else sum(self.parts[:c])), self.parts[c]

    def __str__(self) -> str:
        if not self.axes:
            return str(self.size)
        windows = f";{_runs(self.offsets)}" if self.offsets else ""
        return f"{self.size}@{'.'.join(self.axes)}({_runs(self.parts)}{windows})"


@dataclass(frozen=True)
class Atom:
    """A concatenation of segments, in global row order."""

    segs: tuple[Seg, ...]

    @cached_property
    def size(self) -> int:
        return sum(s.size for s in self.segs)

    @cached_property
    def axes(self) -> frozenset[str]:
        return frozenset(a for s in self.segs for a in s.axes)

    @property
    def whole(self) -> bool:
        return not self.axes

    def local(self, mesh: Mesh, rank: int) -> int:
        return sum(s.local(mesh, rank)[1] for s in self.segs)

    def scaled(self, k: int) -> Atom:
        return Atom(tuple(s.scaled(k) for s in self.segs))

    def __str__(self) -> str:
        return "+".join(map(str, self.segs)) or "0"


def _normal_segs(segs: Iterable[Seg]) -> tuple[Seg, ...]:
    out: list[Seg] = []
    for seg in segs:
        if seg.size == 0:
            continue
        if not seg.axes and out and not out[-1].axes:
            out[-1] = Seg(out[-1].size + seg.size)
        else:
            out.append(seg)
    return tuple(out)


@dataclass(frozen=True)
class Dim:
    """One tensor dimension: a row-major product of atoms, in normal form (see ``of``)."""

    atoms: tuple[Atom, ...] = ()

    @staticmethod
    def of(atoms: Iterable[Atom]) -> Dim:
        """Normal form: a whole atom stands only first; others absorb the whole atoms behind them.

        ``h@sp * w`` and ``(h*w)@sp`` with parts times ``w`` are the same rows in the same
        order; keeping only the second makes equality of layouts mean equality of contents.
        """
        out: list[Atom] = []
        for atom in atoms:
            atom = Atom(_normal_segs(atom.segs))
            if atom.size == 0:
                return Dim((Atom(()),))
            if atom.whole and atom.size == 1:
                continue
            if atom.whole and out:
                out[-1] = Atom(_normal_segs(out[-1].scaled(atom.size).segs))
            else:
                out.append(atom)
        return Dim(tuple(out))

    @staticmethod
    def whole(size: int) -> Dim:
        return _whole_dim(size)

    @staticmethod
    def split(size: int, axes: tuple[str, ...], parts: Sequence[int]) -> Dim:
        """One segment split over ``axes``; a sub-mesh of one rank gives a whole dimension."""
        if len(parts) == 1:
            return Dim.whole(size)
        return Dim.of([Atom((Seg(size, axes, tuple(parts)),))])

    @staticmethod
    def shared(size: int, axes: tuple[str, ...], mesh: Mesh, unit: int = 1) -> Dim:
        """One segment shared out over ``axes``, evenly or by the ranks' speeds, in multiples of ``unit``."""
        return Dim.split(size, axes, shared_parts(size, mesh.shares(axes), unit))

    @cached_property
    def size(self) -> int:
        return math.prod(a.size for a in self.atoms)

    @cached_property
    def axes(self) -> frozenset[str]:
        return frozenset(x for a in self.atoms for x in a.axes)

    @cached_property
    def is_whole(self) -> bool:
        return not self.axes

    @property
    def single(self) -> Atom | None:
        """The only atom, where the dimension is not a product (None where it is)."""
        if len(self.atoms) == 1:
            return self.atoms[0]
        return None

    def local(self, mesh: Mesh, rank: int) -> int:
        """Rows that ``rank`` holds."""
        return math.prod(a.local(mesh, rank) for a in self.atoms)

    def rows(self, mesh: Mesh, rank: int) -> np.ndarray:
        """Global index of every row that ``rank`` holds, in local order (the row-order function)."""
        return _rows(self, mesh, rank)

    def __str__(self) -> str:
        if not self.atoms:
            return "1"
        return "*".join(str(a) for a in self.atoms)


@cache
def _whole_dim(size: int) -> Dim:
    return Dim.of([Atom((Seg(size),))])


@lru_cache(maxsize=4096)
def _rows(dim: Dim, mesh: Mesh, rank: int) -> np.ndarray:
    index = np.zeros(1, dtype=np.int64)
    for atom in dim.atoms:
        pieces, offset = [], 0
        for seg in atom.segs:
            start, length = seg.local(mesh, rank)
            pieces.append(np.arange(offset + start, offset + start + length, dtype=np.int64))
            offset += seg.size
        local = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        index = (index[:, None] * atom.size + local[None, :]).reshape(-1)
    index.setflags(write=False)
    return index


@dataclass(frozen=True)
class Partial:
    """The true value is the ``op`` (sum, max, min) over ``axes`` of what the ranks hold."""

    op: str
    axes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op}:{'.'.join(self.axes)}"

    @staticmethod
    def parse(text: str) -> Partial:
        """Inverse of ``str``."""
        op, _, axes = text.partition(":")
        return Partial(op, tuple(axes.split(".")))


@dataclass(frozen=True)
class Layout:
    """One ``Dim`` per tensor dimension, and the axes over which the value is partial."""

    dims: tuple[Dim, ...]
    partial: tuple[Partial, ...] = ()

    @staticmethod
    def whole(shape: Iterable[int]) -> Layout:
        return Layout(tuple(Dim.whole(int(s)) for s in shape))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return tuple(d.size for d in self.dims)

    @cached_property
    def split_axes(self) -> frozenset[str]:
        return frozenset(x for d in self.dims for x in d.axes)

    @cached_property
    def windowed(self) -> bool:
        """Whether parts are windows: rows with their halos, or a ring's blocks."""
        return any(seg.offsets for dim in self.dims for atom in dim.atoms for seg in atom.segs)

    @cached_property
    def partial_axes(self) -> frozenset[str]:
        return frozenset(x for p in self.partial for x in p.axes)

    @cached_property
    def axes(self) -> frozenset[str]:
        return self.split_axes | self.partial_axes

    @cached_property
    def is_whole(self) -> bool:
        return not self.axes

    def local_shape(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        """Shape of what ``rank`` holds."""
        return _local_shape(self, mesh, rank)

    def with_dim(self, index: int, dim: Dim) -> Layout:
        dims = list(self.dims)
        dims[index] = dim
        return Layout(tuple(dims), self.partial)

    def summed(self) -> Layout:
        """The same layout with nothing partial."""
        return Layout(self.dims) if self.partial else self

    def without(self, axes: Collection[str]) -> Layout | None:
        """The same layout, but whole along ``axes``; None where rows are split over these and others together."""
        if self.partial_axes & set(axes):
            return None
        dims = []
        for dim in self.dims:
            if any(atom.axes & set(axes) and not atom.axes <= set(axes) for atom in dim.atoms):
                return None
            dims.append(Dim.of(Atom((Seg(a.size),)) if a.axes & set(axes) else a for a in dim.atoms))
        return Layout(tuple(dims), self.partial)

    def differing(self, other: Layout) -> frozenset[str]:
        """Axes along which ranks hold something else of a value in this and in the ``other`` layout."""
        out = self.partial_axes ^ other.partial_axes
        for a, b in zip(self.dims, other.dims, strict=True):
            alike = [x.size for x in a.atoms] == [x.size for x in b.atoms]
            pairs: Iterable[tuple[Atom | Dim, Atom | Dim]] = zip(a.atoms, b.atoms, strict=True) if alike else [(a, b)]
            out = out.union(*(x.axes | y.axes for x, y in pairs if x != y))
        return out

    def check(self, mesh: Mesh) -> None:
        """Raise ValueError unless every axis exists, has one part per coordinate and is used once."""
        used: list[str] = [x for p in self.partial for x in p.axes]
        for dim in self.dims:
            for atom in dim.atoms:
                # windows say what a rank sees, not what it owns: a mask's own rows times its current keys
                used += sorted({x for seg in atom.segs if not seg.offsets for x in seg.axes})
                for seg in atom.segs:
                    if seg.axes and len(seg.parts) != mesh.size(seg.axes):
                        raise ValueError(f"{seg} has {len(seg.parts)} parts on mesh {mesh}")
        unknown = [a for a in self.axes if a not in mesh.names]
        if unknown:
            raise ValueError(f"layout {self} names axes {unknown}; mesh {mesh} has {list(mesh.names)}")
        if len(set(used)) != len(used):
            raise ValueError(f"layout {self} uses a mesh axis for two of its factors")

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial))

    def __hash__(self) -> int:  # kept: layouts are keys all over the compiler, and deep
        return self._hash

    @cached_property
    def _text(self) -> str:
        body = f"[{', '.join(map(str, self.dims))}]"
        return body + (f" partial({', '.join(map(str, self.partial))})" if self.partial else "")

    def __str__(self) -> str:
        return self._text

    @staticmethod
    def parse(text: str) -> Layout:
        """Inverse of ``str``; raises TextError."""
        return _parse_layout(text)


@lru_cache(maxsize=16384)
def _local_shape(layout: Layout, mesh: Mesh, rank: int) -> tuple[int, ...]:
    return tuple(d.local(mesh, rank) for d in layout.dims)


def _runs(parts: Sequence[int]) -> str:
    out: list[str] = []
    i = 0
    while i < len(parts):
        j = i
        while j < len(parts) and parts[j] == parts[i]:
            j += 1
        out.append(f"{parts[i]}*{j - i}" if j - i > 1 else str(parts[i]))
        i = j
    return ",".join(out)


_SEG = re.compile(r"(\d+)(?:@([\w.]+)\(([\d*,]+)(?:;([\d*,]+))?\))?$")


def _parse_seg(text: str) -> Seg:
    match = _SEG.match(text)
    if not match:
        raise TextError(f"{text!r} is no segment; valid: '4096' or '4096@sp(512*8)'")
    size, axes, parts, offsets = match.groups()
    if axes is None:
        return Seg(int(size))
    return Seg(int(size), tuple(axes.split(".")), _numbers(parts), _numbers(offsets) if offsets else ())


def _numbers(runs: str) -> tuple[int, ...]:
    """Inverse of ``_runs``."""
    out: list[int] = []
    for run in runs.split(","):
        number, _, times = run.partition("*")
        out += [int(number)] * int(times or 1)
    return tuple(out)


def _outside(text: str, separator: str) -> list[str]:
    """Split at ``separator`` where no bracket is open."""
    out, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        depth += (ch == "(") - (ch == ")")
        if ch == separator and depth == 0:
            out.append(text[start:i])
            start = i + 1
    return [*out, text[start:]]


@lru_cache(maxsize=16384)
def _parse_layout(text: str) -> Layout:
    match = re.match(r"\[(.*)\](?: partial\((.*)\))?$", text)
    if not match:
        raise TextError(f"{text!r} is no layout; valid: '[2, 512@sp(64*8), 3072] partial(sum:tp)'")
    dims = []
    for item in _outside(match[1], ",") if match[1] else []:
        atoms = [Atom(tuple(map(_parse_seg, _outside(a, "+")))) for a in _outside(item.strip(), "*")]
        dims.append(Dim.of(atoms))
    partial = []
    for item in match[2].split(", ") if match[2] else []:
        partial.append(Partial.parse(item))
    return Layout(tuple(dims), tuple(partial))


def even_parts(size: int, n: int, unit: int = 1, before: int = 0) -> tuple[int, ...]:
    """``size`` rows over ``n`` ranks as evenly as multiples of ``unit`` allow, larger parts first.

    Behind ``before`` rows that were shared out in the same way, the first larger part is the next rank's: concatenated
    they are as even as one.

    >>> even_parts(1025, 4), even_parts(1, 4), even_parts(64, 3, unit=8), even_parts(2, 4, before=1025)
    ((257, 256, 256, 256), (1, 0, 0, 0), (24, 24, 16), (0, 1, 1, 0))
    """
    return shared_parts(size, (Fraction(1, n),) * n, unit, before)


@lru_cache(maxsize=4096)
def shared_parts(size: int, shares: tuple[Fraction, ...], unit: int = 1, before: int = 0) -> tuple[int, ...]:
    """``even_parts`` for ranks that get these shares of the rows: of speeds 1 and 0.6, say, 5/8 and 3/8.

    >>> shared_parts(1025, (Fraction(5, 8), Fraction(3, 8))), shared_parts(64, (Fraction(5, 8), Fraction(3, 8)), unit=8)
    ((641, 384), (40, 24))
    """
    if size % unit:
        raise ValueError(f"{size} rows are no multiple of {unit}")
    held = filling_parts(before // unit, shares, (0,) * len(shares))
    return tuple(n * unit for n in filling_parts(size // unit, shares, held))


def filling_parts(size: int, shares: Sequence[Fraction], held: Sequence[int]) -> tuple[int, ...]:
    """``size`` rows over ranks by their ``shares``; what does not divide, to those that are soonest done with it, with
    what they hold of other rows (``held``).

    >>> filling_parts(6, (Fraction(1, 4),) * 4, (20, 20, 19, 19))
    (1, 1, 2, 2)
    """
    parts = [int(size * share) for share in shares]  # rounded down
    ready = sorted(range(len(parts)), key=lambda rank: ((held[rank] + parts[rank] + 1) / shares[rank], rank))
    for rank in ready[: size - sum(parts)]:
        parts[rank] += 1
    return tuple(parts)
