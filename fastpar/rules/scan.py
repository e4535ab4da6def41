"""Scans in pieces (``fastpar.ops.scan``): rows of a dimension, or one row per piece of it; others pass through."""

from __future__ import annotations

from fastpar.core.layout import Atom, Dim, Layout, Seg
from fastpar.core.mesh import Mesh
from fastpar.rules.table import Call, Decision, Localised, Rule, register


def pieces(dim: Dim) -> list[int] | None:
    """Sizes of a dimension's parts in global order; None where some rows are on several ranks, or it is a product."""
    atom = dim.single
    if atom is None or any(not s.axes or s.offsets for s in atom.segs):
        return None
    return [part for seg in atom.segs for part in seg.parts]


def one_each(dim: Dim) -> Dim:
    """The pieces of ``dim`` themselves: as many rows as there are, each where its piece is."""
    return _dim([Seg(len(s.parts), s.axes, (1,) * len(s.parts)) for s in dim.atoms[0].segs])


def _dim(segs: list[Seg]) -> Dim:
    return Dim.of([Atom(tuple(segs))])


class PartsRule(Rule):
    """In and out, the scanned dimension is rows or pieces, as the operator's name says."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        d, sizes = call.args[1], list(call.args[2])
        x = layouts[0].summed()
        if x.dims[d].is_whole:
            return Decision((x,), (x.with_dim(d, Dim.whole(call.shape[d])),))
        if call.name == "fastpar::part_ends":
            return Decision((x,), (x.with_dim(d, one_each(x.dims[d])),))
        if call.name == "fastpar::part_expand":
            segs, at = [], 0
            for seg in x.dims[d].atoms[0].segs:
                parts = tuple(sizes[at : at + len(seg.parts)])
                segs.append(Seg(sum(parts), seg.axes, parts))
                at += len(parts)
            return Decision((x,), (x.with_dim(d, _dim(segs)),))
        return Decision((x,), (x,))

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        d = call.args[1]
        rows = outs[0] if call.name == "fastpar::part_expand" else ins[0]
        dim = rows.dims[d]
        sizes = call.args[2] if dim.is_whole else [s.local(mesh, rank)[1] for s in dim.atoms[0].segs]
        return call.node.target, (call.args[0], d, list(sizes)), {}


register(["fastpar::scan_parts", "fastpar::part_ends", "fastpar::part_expand"], PartsRule())
