"""Resampling (``fastpar::resample``): batch and channels pass through.

Nearest-neighbour up-sampling by a whole factor repeats rows, so split rows stay where they
are. Interpolation between rows, and other sizes, are written out as maps of few neighbouring
rows (``sharding/expand_resample.py``).
"""

from __future__ import annotations

import torch

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.rules.table import Call, Decision, Gather, Localised, Pos, Rule, register, rows_before


def whole_factor(call: Call, d: int) -> int:
    """Whole factor by which a resampling repeats rows of dimension ``d``; 0 where it does not."""
    before, after = call.shapes[0][d], call.shape[d]
    scales = call.arg(2, "scales")
    if before == after and (scales is None or scales[d - 2] == 1 or call.arg(6, "recompute", None)):
        return 1
    if before == 0 or after % before or not str(call.arg(3, "mode")).startswith("nearest"):
        return 0
    return after // before


class ResampleRule(Rule):
    """resample(x [N, C, *S], size?, scales?, mode, align_corners?, antialias, recompute?)"""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        want, dims, gathers = layouts[0].summed(), [], []
        for d, dim in enumerate(want.dims):
            factor = 1 if d < 2 else whole_factor(call, d)
            if dim.is_whole:
                dims.append(Dim.whole(call.shape[d]))
            elif factor and dim.single is not None:
                dims.append(Dim.of([dim.single.scaled(factor)]))
            elif factor == 1:
                dims.append(dim)
            else:
                gathers.append(Gather(0, "interpolation reaches over the rows of other ranks"))
                want = want.with_dim(d, Dim.whole(dim.size))
                dims.append(Dim.whole(call.shape[d]))
        return Decision((want,), (Layout(tuple(dims)),), tuple(gathers))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        return [(0, p) for p in rows_before(pos, call.shape[pos.dim], call.shapes[0][pos.dim])]

    def carries(self, call: Call, marked: list[set[int]]) -> set[int]:
        return set(marked[0])

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        shape = outs[0].local_shape(mesh, rank)
        if 0 in shape:  # a kernel has nothing to run on
            return torch.ops.aten.new_zeros.default, (call.args[0], list(shape)), {}
        args = list(call.args)
        if args[1] is not None:
            args[1] = list(shape[2:])
        return call.node.target, tuple(args), call.kwargs


register("fastpar::resample", ResampleRule())
