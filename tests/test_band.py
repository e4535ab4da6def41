"""``fastpar::band``: torch's own interpolations and averages, as maps of few neighbouring rows."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpar.ops.band import band, table

SIZES = (1, 2, 3, 5, 8, 13, 17)
MODES = {
    "nearest": {"mode": "nearest"},
    "nearest-exact": {"mode": "nearest-exact"},
    "linear": {"mode": "bilinear"},
    "linear corners": {"mode": "bilinear", "align_corners": True},
    "cubic": {"mode": "bicubic"},
    "cubic corners": {"mode": "bicubic", "align_corners": True},
    "linear antialias": {"mode": "bilinear", "antialias": True},
    "cubic antialias": {"mode": "bicubic", "antialias": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", MODES)
def test_interpolation(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for before, after in itertools.product(SIZES, (*SIZES, 40)):
        x = torch.randn(2, 3, before, 5, dtype=dtype)
        want = F.interpolate(x, size=(after, 5), **MODES[kind])
        torch.testing.assert_close(band(x, 2, kind, before, after, [0, after]), want)


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.5, 2.3])
@pytest.mark.parametrize("kind", ["nearest", "linear", "cubic"])
def test_a_scale_that_is_given_is_not_that_of_the_sizes(kind: str, scale: float) -> None:
    x = torch.randn(2, 3, 17, 5, dtype=torch.float64)
    want = F.interpolate(x, scale_factor=(scale, 1.0), **MODES[kind])
    after = want.shape[2]
    torch.testing.assert_close(band(x, 2, f"{kind} by {scale}", 17, after, [0, after]), want)


@pytest.mark.parametrize("before", [5, 6, 9, 13])
def test_averages_and_maxima(before: int) -> None:
    x = torch.randn(2, 3, before, dtype=torch.float64)
    both = (True, False)
    for kernel, stride, padding, ceil, include in itertools.product(range(1, 6), (1, 2, 3), (0, 1, 2), both, both):
        if padding > kernel // 2:
            continue
        want = F.avg_pool1d(x, kernel, stride, padding, ceil, include)
        kind = f"average {kernel} {stride} {padding}" + " ceil" * ceil + " inside" * (not include)
        torch.testing.assert_close(band(x, 2, kind, before, want.shape[2], [0, want.shape[2]]), want)
        if include:
            want = F.max_pool1d(x, kernel, stride, padding, ceil_mode=ceil)
            kind = f"maximum {kernel} {stride} {padding}" + " ceil" * ceil
            torch.testing.assert_close(band(x, 2, kind, before, want.shape[2], [0, want.shape[2]]), want)
    for after in (1, 2, 4, 7, 16):
        torch.testing.assert_close(band(x, 2, "adaptive", before, after, [0, after]), F.adaptive_avg_pool1d(x, after))


def test_a_window_of_rows_is_enough() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    whole = band(x, 1, "linear", 9, 23, [0, 23])
    found = table("linear", 9, 23, True)
    first, last = found.at[7], found.at[12] + found.width
    torch.testing.assert_close(band(x[:, first:last], 1, "linear", 9, 23, [7, 13], first), whole[:, 7:13])
    assert band(x, 1, "linear", 9, 23, [7, 7]).shape == (2, 0, 4)


def test_what_is_no_part_of_a_row_may_be_infinite() -> None:
    x = torch.ones(1, 1, 9)
    x[..., 6] = torch.inf
    torch.testing.assert_close(band(x, 2, "adaptive", 9, 4, [0, 4]), F.adaptive_avg_pool1d(x, 4))


def test_tables_are_made_while_a_compile_is_under_way() -> None:
    table.cache_clear()
    with FakeTensorMode():
        found = table("linear", 9, 23, True)
    table.cache_clear()
    assert found == table("linear", 9, 23, True)


def test_it_is_registered_well() -> None:
    torch.library.opcheck(band, (torch.randn(2, 9, 4), 1, "cubic", 9, 7, [0, 3, 7]))
