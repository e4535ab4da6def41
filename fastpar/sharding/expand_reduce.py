"""Reductions, norms and softmax over split rows, written out in sums and maxima.

What is normalised along split rows needs one or two numbers per row from the other ranks, not
their rows: every function here is the operator in terms of ``sum`` and ``amax``, which are
partial over ranks, and of operators that act on each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.moments import mean_and_variance, normalised
from fastpar.ops.redistribute import redistribute
from fastpar.ops.scan import part_ends, part_expand, scan_parts
from fastpar.rules import Call
from fastpar.rules.reduce import reduced_dims
from fastpar.rules.scan import one_each, pieces

Written = Callable[..., Any]
aten = torch.ops.aten


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32, as the kernels accumulate."""
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def _split(call: Call, layouts: Sequence[Layout], dims: Sequence[int]) -> bool:
    return any(not layouts[0].dims[d].is_whole for d in dims)


def mean(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    dims = sorted(reduced_dims(call))
    if not _split(call, layouts, dims):
        return None
    count = math.prod(call.shapes[0][d] for d in dims)

    def written(x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
        # the partial sums are scaled before they are added up: no larger values than a mean has
        return aten.mul.Tensor(aten.sum.dim_IntList(x, dims, keepdim, dtype=dtype), 1.0 / count)

    return written


def _shifted(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(exp(x - m), m) with m the finite maximum along ``dims``; a row without a finite value keeps m = 0."""
    top = aten.amax.default(x, dims, True)
    top = torch.where(top.abs() == math.inf, torch.zeros_like(top), top)
    return aten.exp.default(x - top), top


def softmax(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    d = call.arg(1, "dim") % max(1, len(call.shape))
    if not _split(call, layouts, [d]):
        return None
    log, safe = "log" in call.name, "safe" in call.name

    def written(x: torch.Tensor, dim: int, half_to_float: Any = False, **kwargs: Any) -> torch.Tensor:
        dtype = torch.float32 if half_to_float is True else x.dtype
        e, top = _shifted(_wide(x), [d])
        total = aten.sum.dim_IntList(e, [d], True)
        if log:
            return (_wide(x) - top - aten.log.default(total)).to(dtype)
        if safe:  # a row of nothing but -inf is 0, not NaN
            total = torch.where(total == 0, torch.ones_like(total), total)
        return (e / total).to(dtype)

    return written


def logsumexp(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    dims = sorted(reduced_dims(call))
    if not _split(call, layouts, dims):
        return None

    def written(x: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
        e, top = _shifted(_wide(x), dims)
        out = aten.log.default(aten.sum.dim_IntList(e, dims, True)) + top
        return out.reshape(call.shape).to(x.dtype)

    return written


def variance(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """var, std, var_mean and std_mean, all with ``dim`` and a correction (Bessel's is 1)."""
    dims = sorted(reduced_dims(call))
    if not _split(call, layouts, dims) or isinstance(call.arg(1, "dim", None), bool):
        return None
    count = math.prod(call.shapes[0][d] for d in dims)
    root, also_mean = "std" in call.name, call.name.endswith("_mean")

    def written(x: torch.Tensor, dim: Any = None, *args: Any, correction: Any = 1, keepdim: bool = False) -> Any:
        centre, out = mean_and_variance(_wide(x), dims, count)
        out = out * count / float(max(0, count - (1 if correction is None else correction)))
        out = aten.sqrt.default(out) if root else out
        out = out.reshape(call.shape).to(x.dtype)
        return (out, centre.reshape(call.shape).to(x.dtype)) if also_mean else out

    return written


def vector_norm(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    rank, given = len(call.shapes[0]), call.arg(2, "dim", None)
    given = [given] if isinstance(given, int) else range(rank) if given is None else given
    dims = sorted({d % rank for d in given})
    order = call.arg(1, "ord", 2)
    if not _split(call, layouts, dims) or order in (0, -math.inf):
        return None

    def written(x: torch.Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        size = _wide(x if dtype is None else x.to(dtype)).abs()
        if order == math.inf:
            out = aten.amax.default(size, dims, True)
        elif order == 2:
            out = aten.sqrt.default(aten.sum.dim_IntList(size * size, dims, True))
        else:
            out = aten.sum.dim_IntList(size**order, dims, True) ** (1.0 / order)
        return out.reshape(call.shape).to(x.dtype if dtype is None else dtype)

    return written


def layer_norm(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    shape = list(call.arg(1, "normalized_shape"))
    dims = list(range(len(call.shapes[0]) - len(shape), len(call.shapes[0])))
    if not _split(call, layouts, dims):
        return None
    count = math.prod(shape)

    def written(x: torch.Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        y, centre, rstd = normalised(_wide(x), dims, count, eps)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y.to(x.dtype), centre, rstd

    return written


def truth(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """any and all: the largest and the smallest of zeros and ones (int32, which every backend can reduce)."""
    dims = sorted(reduced_dims(call))
    if not _split(call, layouts, dims):
        return None
    reduce = aten.amax.default if call.name == "aten::any" else aten.amin.default

    def written(x: torch.Tensor, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
        return (reduce((x != 0).to(torch.int32), dims, True) != 0).reshape(call.shape)

    return written


def first_extreme(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """argmax, argmin, and max and min along a dimension: the extreme of all ranks, and the first row that has it."""
    given = call.arg(1, "dim", None)
    if not isinstance(given, int) or isinstance(given, bool) or not call.shapes[0]:
        return None
    d = given % len(call.shapes[0])
    if not _split(call, layouts, [d]):
        return None
    rows = call.shapes[0][d]
    reduce = aten.amax.default if "max" in call.name else aten.amin.default

    def written(x: torch.Tensor, dim: int, keepdim: bool = False) -> Any:
        top = reduce(x, [d], True)
        here = x == top
        if x.is_floating_point():
            here = here | aten.isnan.default(x)  # the extreme of a row with NaN is the first of them
        shape = [rows if i == d else 1 for i in range(x.dim())]
        number = torch.arange(rows, device=x.device).view(shape)
        at = aten.amin.default(torch.where(here, number, rows), [d], keepdim)
        return at if "arg" in call.name else (top if keepdim else aten.squeeze.dim(top, d), at)

    return written


def cumsum(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Running sums of each rank's own rows, and what came before them: one row per rank travels."""
    d = call.arg(1, "dim") % max(1, len(call.shape))
    layout = layouts[0].summed()
    sizes = pieces(layout.dims[d])
    if layout.dims[d].is_whole or sizes is None:
        return None
    cut = layout.with_dim(d, one_each(layout.dims[d]))
    whole = cut.with_dim(d, Dim.whole(len(sizes)))
    dtype = call.node.meta["val"].dtype

    def written(x: torch.Tensor, dim: int, **kwargs: Any) -> torch.Tensor:
        y = scan_parts(x.to(dtype), d, sizes)
        before = redistribute(part_ends(y, d, sizes), str(cut), str(whole))
        before = aten.slice.Tensor(aten.cumsum.default(before, d), d, 0, len(sizes) - 1)
        before = aten.cat.default([torch.zeros_like(aten.slice.Tensor(before, d, 0, 1)), before], d)
        return y + part_expand(redistribute(before, str(whole), str(cut)), d, sizes)

    return written


TABLE: dict[str, Callable[[Call, Sequence[Layout], Mesh], Written | None]] = {
    "aten::mean": mean,
    "aten::_softmax": softmax,
    "aten::_log_softmax": softmax,
    "aten::_safe_softmax": softmax,
    "aten::logsumexp": logsumexp,
    **dict.fromkeys(["aten::var", "aten::std", "aten::var_mean", "aten::std_mean"], variance),
    "aten::linalg_vector_norm": vector_norm,
    "aten::cumsum": cumsum,
    "aten::native_layer_norm": layer_norm,
    **dict.fromkeys(["aten::any", "aten::all"], truth),
    **dict.fromkeys(["aten::argmax", "aten::argmin", "aten::max", "aten::min"], first_extreme),
}
