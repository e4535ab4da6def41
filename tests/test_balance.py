"""Strides and shares for devices that are not equally fast (STADI's allocators)."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpar import balance
from fastpar.core.errors import PlanError
from fastpar.core.plan import Plan

SPEEDS = st.lists(st.floats(0.05, 20), min_size=2, max_size=6)


def seconds(speeds: list[float], plan: Plan) -> float:
    """Of a step in the mean, computing alone: a rank's share of the rows over its speed and its stride."""
    shares, strides = plan.speeds or (1.0,) * len(speeds), plan.steps or (1,) * len(speeds)
    return max(h / v / r for h, v, r in zip(shares, speeds, strides, strict=True)) / sum(shares)


@given(SPEEDS, st.sampled_from([1, 2, 3, 4, 8]))
def test_all_are_done_at_once_and_as_early_as_strides_allow(speeds: list[float], most: int) -> None:
    plan = balance(f"gather={len(speeds)},displaced", speeds, most)
    strides = plan.steps or (1,) * len(speeds)
    assert min(strides) == 1 and max(strides) <= most and all(r & (r - 1) == 0 for r in strides)
    best = 1 / sum(v * r for v, r in zip(speeds, strides, strict=True))  # nobody waits
    assert seconds(speeds, plan) == pytest.approx(best, rel=1e-4)
    for v, r in zip(speeds, strides, strict=True):  # no power of two is nearer to how much slower it is
        slower = max(speeds) / v
        assert all(abs(r / slower - 1) < 1e-9 or max(r / slower, slower / r) <= 1.0001 * max(s / slower, slower / s)
                   for s in (1, 2, 4, 8) if s <= most)  # fmt: skip
    for (v, r), (w, s) in product(zip(speeds, strides, strict=True), repeat=2):
        assert not v > w or r <= s  # who is faster takes no fewer steps


@given(st.integers(2, 6), st.floats(0.1, 10), st.integers(1, 4))
def test_equal_devices_need_neither(ranks: int, speed: float, most: int) -> None:
    assert balance(f"gather={ranks},displaced", [speed] * ranks, most) == Plan.parse(f"gather={ranks},displaced")


def test_rows_alone_are_exact() -> None:
    plan = balance("ulysses=2", (1, 0.5), most=1)
    assert str(plan) == "ulysses=2,speeds(1:0.5)" and not plan.lossy


@pytest.mark.parametrize(
    "plan, speeds, most, said",
    [("gather=2", (1, 0.5), 2, "'steps' needs 'displaced'"), ("gather=2,displaced", (1,), 2, "has 1 entries"),
     ("gather=2,displaced", (1, 0), 2, "finite numbers above 0"),
     ("gather=2,displaced", (1, 1), 0, "most is the largest stride"), ("tp=2", (1, 0.5), 1, "needs a split of tokens")],
)  # fmt: skip
def test_bad_input(plan: str, speeds: tuple[float, ...], most: int, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        balance(plan, speeds, most)
