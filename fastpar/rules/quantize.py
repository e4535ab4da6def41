"""Rows as bytes (``fastpar.ops.quantize``): the row, which is the last dimension, is whole; all others pass."""

from __future__ import annotations

from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, register


def _rows(call: Call) -> Factors:
    lead = tuple(f"d{i}" for i in range(len(call.shape) - 1))
    return Factors(((*lead, "row"),), ((*lead, "bytes"),), whole={"row": "a row has one scale"})


register(
    ["fastpar::quantize", "fastpar::dequantize", "fastpar::to_bytes", "fastpar::from_bytes"], FactorRule(_rows)
)
