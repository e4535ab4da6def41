"""Resampling (``fastpar::resample``): batch and channels pass through, rows are whole for now."""

from __future__ import annotations

from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, register


def _resample(call: Call) -> Factors:
    spatial = len(call.shape) - 2
    inside = tuple(f"s{i}" for i in range(spatial))
    outside = tuple(f"o{i}" for i in range(spatial))
    whole = dict.fromkeys((*inside, *outside), "interpolation reaches over the rows of other ranks")
    return Factors((("n", "c", *inside),), (("n", "c", *outside),), whole=whole)


register("fastpar::resample", FactorRule(_resample))
