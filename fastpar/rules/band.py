"""Maps of few neighbouring rows (``fastpar::band``): a rank reads the window of rows that its own are made of.

The operator itself says which rows of the result each rank has; what it reads follows. Windows are a layout like any
other (as for convolutions, ``rules/spatial.py``), so what is missing of them comes by a redistribute.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left

import torch

from fastpar.core.layout import Atom, Dim, Layout, Seg
from fastpar.core.mesh import Mesh
from fastpar.ops.band import Table, table
from fastpar.rules.table import Call, Decision, Gather, Localised, Pos, Rule, register, rows_before


def _axes(dim: Dim, ranks: int) -> tuple[str, ...] | None:
    """Axes along which a dimension is split for so many ranks; None for merged dimensions and other numbers."""
    atom = dim.single
    if atom is None or any(s.axes != atom.segs[0].axes for s in atom.segs) or len(atom.segs[0].parts) != ranks:
        return None
    return atom.segs[0].axes


def ends_of(dim: Dim, found: Table) -> list[int] | None:
    """Where each rank's rows of the result end: a row is made where its centre is. None for merged dimensions."""
    if dim.is_whole:
        return [0, len(found.centre)]
    atom = dim.single
    if atom is None or any(s.axes != atom.segs[0].axes or s.offsets for s in atom.segs):
        return None
    ends, total = [0], 0
    for c in range(len(atom.segs[0].parts)):
        total += sum(s.parts[c] for s in atom.segs)
        ends.append(bisect_left(found.centre, total))
    return [*ends[:-1], len(found.centre)]


class BandRule(Rule):
    """band(x, dim, kind, before, after, rows, first)"""

    def _window(self, call: Call, dim: Dim) -> tuple[Dim, Dim] | None:
        """What the ranks read and what they then have; None where their number is not that of ``rows``."""
        rows = list(call.arg(5, "rows"))
        axes = _axes(dim, len(rows) - 1)
        if axes is None:
            return None
        found = table(*call.args[2:5], call.operands[0].meta["val"].dtype == torch.float64)
        starts, lengths, counts = [], [], []
        for a, b in itertools.pairwise(rows):
            at = found.at[a:b]
            starts.append(min(at, default=0))
            lengths.append(max(at) + found.width - min(at) if at else 0)
            counts.append(b - a)
        window = Dim.of([Atom((Seg(dim.size, axes, tuple(lengths), tuple(starts)),))])
        return window, Dim.split(call.shape[self._dim(call)], axes, tuple(counts))

    def _dim(self, call: Call) -> int:
        return int(call.arg(1, "dim")) % len(call.shape)

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        want, d = layouts[0].summed(), self._dim(call)
        if want.dims[d].is_whole:
            return Decision((want,), (want.with_dim(d, Dim.whole(call.shape[d])),))
        found = self._window(call, want.dims[d])
        if found is None:
            whole = want.with_dim(d, Dim.whole(want.dims[d].size))
            gather = Gather(0, "a window over merged dimensions, or of rows of other ranks")
            return Decision((whole,), (whole.with_dim(d, Dim.whole(call.shape[d])),), (gather,))
        return Decision((want.with_dim(d, found[0]),), (want.with_dim(d, found[1]),))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        return [(0, p) for p in rows_before(pos, call.shape[pos.dim], call.shapes[0][pos.dim])]

    def carries(self, call: Call, marked: list[set[int]]) -> set[int]:
        return set(marked[0])

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        d, rows = self._dim(call), list(call.arg(5, "rows"))
        shape = outs[0].local_shape(mesh, rank)
        if 0 in shape:
            return torch.ops.aten.new_zeros.default, (call.args[0], list(shape)), {}
        if ins[0].dims[d].is_whole:
            return call.node.target, (*call.args[:5], [rows[0], rows[-1]]), {}
        atom = ins[0].dims[d].single
        assert atom is not None
        seg = atom.segs[0]
        at = mesh.coordinate(rank, seg.axes)
        return call.node.target, (*call.args[:5], rows[at : at + 2], seg.starts()[at]), {}


register("fastpar::band", BandRule())
