"""Resampling (``fastpar::resample``): batch and channels pass through.

Nearest-neighbour up-sampling by a whole factor repeats rows, so split rows stay where they
are. By nearly one (a U-Net's odd sizes) it is written out, as such a repetition of which few
rows are left out (``sharding/expand_resample.py``). Interpolation between rows, and other
factors, need them whole.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.rules.table import Call, Decision, Gather, Localised, Pos, Rule, register, rows_before

_RUNS = 8  # as many slices as a resampling may be written in


def runs(call: Call, d: int) -> list[tuple[int, int]] | None:
    """What nearest-neighbour up-sampling keeps of dimension ``d`` repeated by the next whole factor, as ranges.

    None where that is not what it does, or takes more than ``_RUNS`` ranges.
    """
    before, after = call.shapes[0][d], call.shape[d]
    if call.arg(1, "size") is None or not 0 < before < after:
        return None
    wide = call.operands[0].meta["val"].dtype == torch.float64
    found = _runs(before, after, str(call.arg(3, "mode")), torch.float64 if wide else torch.float32)
    return list(found) if found is not None else None


@lru_cache(maxsize=256)
def _runs(before: int, after: int, mode: str, dtype: torch.dtype) -> tuple[tuple[int, int], ...] | None:
    if not mode.startswith("nearest"):
        return None
    with unset_fake_temporarily():  # asked of the kernel, whose rounding of the scale decides
        rows = F.interpolate(torch.arange(before, dtype=dtype)[None, None], size=after, mode=mode)
        sources = [int(row) for row in rows.flatten().tolist()]
    factor = -(-after // before)
    out: list[tuple[int, int]] = []
    copy, last = 0, -1
    for source in sources:
        copy = copy + 1 if source == last else 0
        if copy >= factor or source < last:
            return None
        row, last = source * factor + copy, source
        if out and out[-1][1] == row:
            out[-1] = (out[-1][0], row + 1)
        elif len(out) == _RUNS:
            return None
        else:
            out.append((row, row + 1))
    return tuple(out)


class ResampleRule(Rule):
    """resample(x [N, C, *S], size?, scales?, mode, align_corners?, antialias, recompute?)"""

    def _factor(self, call: Call, d: int) -> int:
        """Whole factor by which rows of dimension ``d`` are repeated; 0 where they are not."""
        before, after = call.shapes[0][d], call.shape[d]
        if before == 0 or after % before or not str(call.arg(3, "mode")).startswith("nearest"):
            return 0
        return after // before

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        want, dims, gathers = layouts[0].summed(), [], []
        for d, dim in enumerate(want.dims):
            factor = 1 if d < 2 else self._factor(call, d)
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
        if pos.dim > 1 and not self._factor(call, pos.dim) and runs(call, pos.dim) is None:
            return [(0, pos)] if call.shapes[0][pos.dim] == call.shape[pos.dim] else []
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
