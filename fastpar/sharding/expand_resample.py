"""Interpolation, averages and maxima over windows of split rows, dimension by dimension: maps of few neighbouring rows.

Each is one ``fastpar::band`` per dimension; an operator with no split rows stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.band import band, table
from fastpar.rules import Call
from fastpar.rules.band import ends_of
from fastpar.rules.resample import whole_factor
from fastpar.sharding.expand_spatial import per_dim

Written = Callable[..., Any]
aten = torch.ops.aten
_NAMES = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}


def _bands(call: Call, layout: Layout, kinds: dict[int, str]) -> Callable[[Tensor], Tensor] | None:
    """The maps ``kinds`` (by dimension), one after the other; None where one of the dimensions cannot stay split."""
    wide = call.operands[0].meta["val"].dtype == torch.float64
    steps = []
    for d, kind in kinds.items():
        before, after = call.shapes[0][d], call.shape[d]
        if 0 in (before, after):
            return None
        ends = ends_of(layout.dims[d], table(kind, before, after, wide))
        if ends is None:
            return None
        steps.append((d, kind, before, after, ends))

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = band(x, *step)
        return x

    return run


def resampled(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Interpolation but for repetition by whole factors, which leaves rows where they are."""
    layout = layouts[0].summed()
    dims = range(2, len(call.shape))
    if all(layout.dims[d].is_whole or whole_factor(call, d) for d in dims):
        return None
    mode, scales = str(call.arg(3, "mode")), call.arg(2, "scales")
    kind = _NAMES.get(mode, mode) + (" corners" if call.arg(4, "align_corners", None) else "")
    kind += " antialias" if call.arg(5, "antialias", False) else ""
    asked = scales is not None and not call.arg(6, "recompute", None)
    kinds = {d: kind + (f" by {scales[d - 2]!r}" if asked else "") for d in dims if whole_factor(call, d) != 1}
    found = _bands(call, layout, kinds)
    return (lambda x, *rest, **more: found(x)) if found is not None else None


def pooled(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Averages over windows."""
    each = _geometry(call)
    layout, lead = layouts[0].summed(), len(call.shape) - len(each)
    if all(d.is_whole for d in layout.dims[lead:]):
        return None
    ceil, include = call.arg(4, "ceil_mode", False), call.arg(5, "count_include_pad", True)
    divisor = call.arg(6, "divisor_override", None)
    if divisor is not None and (ceil or not include):
        return None  # what is left of a window at the edge is divided by the same number
    words = (" ceil" if ceil else "") + ("" if include else " inside")
    found = _bands(call, layout, {lead + i: f"average {k} {s} {p}{words}" for i, (k, s, p) in enumerate(each)})
    if found is None:
        return None
    factor = 1.0 if divisor is None else math.prod(k for k, _, _ in each) / divisor
    return lambda x, *rest, **more: found(x) if factor == 1 else found(x) * factor


def largest(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Maxima over windows, where nobody asks which row was the largest."""
    each = _geometry(call)
    layout, lead = layouts[0].summed(), len(call.shape) - len(each)
    asked = any(user.target is not getitem or user.args[1] != 0 for user in call.node.users)
    if asked or all(d.is_whole for d in layout.dims[lead:]) or any(n != 1 for n in call.arg(4, "dilation", [1])):
        return None
    words = " ceil" if call.arg(5, "ceil_mode", False) else ""
    found = _bands(call, layout, {lead + i: f"maximum {k} {s} {p}{words}" for i, (k, s, p) in enumerate(each)})
    if found is None:
        return None

    def written(x: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        out = found(x)
        return out, torch.zeros_like(out, dtype=torch.int64)  # nobody takes these

    return written


def adaptively_pooled(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Averages over as many windows as asked for; over all there is where that is one."""
    layout, lead = layouts[0].summed(), len(call.shape) - len(call.arg(1, "output_size"))
    dims = range(lead, len(call.shape))
    if all(layout.dims[d].is_whole for d in dims):
        return None
    ones = [d for d in dims if call.shape[d] == 1]
    several = [d for d in dims if d not in ones and call.shape[d] != call.shapes[0][d]]
    found = _bands(call, layout, dict.fromkeys(several, "adaptive"))
    if found is None:
        return None

    def written(x: Tensor, size: Any) -> Tensor:
        return aten.mean.dim(found(x), ones, True) if ones else found(x)

    return written


def _geometry(call: Call) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding of a pool, per dimension."""
    kernel = list(call.arg(1, "kernel_size"))
    given = (kernel, call.arg(2, "stride", ()) or kernel, call.arg(3, "padding", [0]))
    return list(zip(*(per_dim(g, len(kernel)) for g in given), strict=True))


TABLE: dict[str, Callable[[Call, Sequence[Layout], Mesh], Written | None]] = {
    "fastpar::resample": resampled,
    **{f"aten::avg_pool{n}d": pooled for n in (1, 2, 3)},
    **{f"aten::max_pool{n}d_with_indices": largest for n in (1, 2, 3)},
    **{f"aten::{kind}adaptive_avg_pool{n}d": adaptively_pooled for n in (1, 2, 3) for kind in ("", "_")},
}
