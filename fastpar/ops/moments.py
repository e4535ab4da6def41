"""``fastpar::moments``: sums of values and of their squares along some dimensions, as one float64 value ``[2, ...]``.

What a norm along split rows needs from the other ranks, in one exchange: both are sums over ranks, so one all-reduce
gives every rank the mean and the variance of all rows. Each rank computes the mean and the variance of its own rows as
its kernels do, in one pass that subtracts what it has seen so far; only then are they made sums. In float64 the squared
mean, subtracted again later, costs a relative error of 2^-53 times mean^2 / variance. DistriFusion exchanges both, too,
but in the dtype of its activations, where the difference can come out negative (its ``corrected_async_gn`` mends that).

Shapes: ``x`` of any floats, ``dims`` in ascending order; result ``[2, *x.shape]`` with 1 in the place of ``dims``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define("moments(Tensor x, int[] dims) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def written(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The operator in torch's: what Inductor gets."""
    count = math.prod(x.shape[d] for d in dims)
    if count == 0:
        return _like(x, dims).zero_()
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    variance, mean = torch.var_mean(wide, list(dims), correction=0, keepdim=True)
    mean, variance = mean.to(torch.float64), variance.to(torch.float64)
    return torch.stack([mean * count, (variance + mean * mean) * count])


def _like(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    return x.new_empty([2, *(1 if d in dims else n for d, n in enumerate(x.shape))], dtype=torch.float64)


_LIB.impl("moments", written, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::moments", _like, lib=_LIB)

moments = torch.ops.fastpar.moments.default


def normalised(x: torch.Tensor, dims: Sequence[int], count: int, eps: float) -> tuple[torch.Tensor, ...]:
    """(x less its mean, over its standard deviation; the mean; one over the deviation) along ``dims``, where ``x`` is
    at least float32 and has ``count`` numbers along them on all ranks together."""
    mean, variance = mean_and_variance(x, dims, count)
    rstd = torch.ops.aten.rsqrt.default(variance + eps).to(x.dtype)
    mean = mean.to(x.dtype)
    return (x - mean) * rstd, mean, rstd


def mean_and_variance(x: torch.Tensor, dims: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float64, with 1 in the place of ``dims``; the variance is that of the population."""
    # rescaled before anything is taken apart, so that one exchange has both
    total = torch.ops.aten.div.Tensor(moments(x, list(dims)), float(count))
    mean, square = total.unbind(0)
    return mean, (square - mean * mean).clamp_min(0.0)
