"""What it means that two runs agree: the float64 reference, the measure of a difference, equal bits."""

from __future__ import annotations

from typing import Any

import torch

from fastpar.graph.capture import Recorded
from fastpar.graph.program import Program
from fastpar.graph.promote import promote, promote_args

FLOAT64_TOLERANCE = 1e-9
"""Largest relative difference of a float64 run: far above rounding, far below any wrong term."""


def float64_reference(recorded: Recorded) -> tuple[Program, list[Any], tuple[Any, ...]]:
    """The graph in float64, its arguments and outputs; kept, for one capture serves many plans."""
    if recorded.promoted is None:
        promoted, args = promote(recorded.program), promote_args(recorded.args)
        with torch.no_grad():
            recorded.promoted = (promoted, args, tuple(promoted.gm(*args)))
    return recorded.promoted


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(torch.nan_to_num(a) if a.is_floating_point() else a,
                       torch.nan_to_num(b) if b.is_floating_point() else b)  # fmt: skip


def difference(value: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and that over the largest absolute reference value."""
    if value.shape != reference.shape:
        return float("inf"), float("inf")
    if value.numel() == 0:
        return 0.0, 0.0
    if not (value.is_floating_point() or value.is_complex()):
        same = torch.equal(value, reference.to(value.dtype))
        return (0.0, 0.0) if same else (float("inf"), float("inf"))
    wide = torch.complex128 if value.is_complex() else torch.float64
    value, reference = value.to(wide), reference.to(wide)
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(value)):
        return float("inf"), float("inf")
    apart = (value - reference)[finite].abs()
    if apart.numel() == 0:
        return 0.0, 0.0
    absolute, scale = float(apart.max()), float(reference[finite].abs().max())
    return absolute, absolute / scale if scale else absolute
