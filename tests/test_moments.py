"""Norms along split rows: one exchange, and as near to the truth as torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastpar
from fastpar.ops.moments import mean_and_variance, moments

NORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "group": lambda x: F.group_norm(x, 4),
    "layer": lambda x: F.layer_norm(x, x.shape[1:]),
    "variance": lambda x: x * torch.var(x, dim=(2, 3), keepdim=True, correction=1),
}


def image(norm: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, w: F.conv2d(NORMS[norm](F.conv2d(x, w, padding=1)), w, padding=1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", ["gather=2", "gather=5"])
def test_one_all_reduce_for_mean_and_variance(norm: str, plan: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(1, 8, 17, 6).double(), torch.randn(8, 8, 3, 3).double()
    report = fastpar.verify(image(norm), (x, w), plan=plan)
    assert report.ok and not report.fallbacks
    assert [c.count for c in report.collectives if c.kind == "all_reduce"] == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_zero_it_is_as_exact_as_whole(dtype: torch.dtype) -> None:
    """The mean of squares less the squared mean would leave nothing of a deviation of a thousandth in float32."""
    torch.manual_seed(0)
    x = (torch.randn(2, 4, 64) * (1.0 if dtype == torch.bfloat16 else 1e-3) + 30).to(dtype)
    truth = torch.var_mean(x.double(), (1, 2), correction=0, keepdim=True)
    parts = [moments(part, [1, 2]) for part in x.split([1, 3, 0], 1)]
    assert all(part.dtype == torch.float64 and part.shape == (2, 2, 1, 1) for part in parts)
    total = sum(parts)
    mean = total[0] / 256
    assert torch.allclose(mean, truth[1], rtol=1e-6)
    assert torch.allclose(total[1] / 256 - mean * mean, truth[0], rtol=1e-2 if dtype == torch.float32 else 1e-4)
    alone, variance = mean_and_variance(x.float(), [1, 2], 256)
    assert torch.allclose(alone, truth[1]) and torch.allclose(variance, truth[0], rtol=1e-4)


def test_constants_have_no_deviation() -> None:
    assert mean_and_variance(torch.full((3, 5), 1e4), [1], 5)[1].tolist() == [[0.0]] * 3
