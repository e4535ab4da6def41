"""Convolution, group norm, pads and pooling: batch (and channels) pass through, rows are whole.

Row-split convolutions with halos join here: the table has their place, and until then a
row that is split is gathered and reported. Patch embeddings never come here: capture
turns a convolution whose kernel is its stride into a matrix product over tokens.
"""

from __future__ import annotations

from fastpar.rules.factor import FactorRule, Factors, Names
from fastpar.rules.table import Call, register

_WINDOW = "a window reaches over the rows of other ranks"


def _convolution(call: Call) -> Factors:
    """convolution(x [N, C, *S], weight, bias, stride, padding, dilation, transposed, outpad, groups)"""
    spatial = len(call.shape) - 2
    inside = tuple(f"s{i}" for i in range(spatial))
    outside = tuple(f"o{i}" for i in range(spatial))
    kernel: Names = (None, "ci", *(f"k{i}" for i in range(spatial)))
    whole = {n: _WINDOW for n in (*inside, *outside, *kernel) if n}
    whole["c"] = whole["ci"] = whole["co"] = "channels are contracted"
    depthwise = call.arg(8, "groups") == call.shapes[0][1] == call.shape[1]
    channels = "co" if depthwise else "c"
    if depthwise:
        del whole["co"]
    operands: list[Names] = [("n", channels, *inside), ("co", *kernel[1:])]
    if len(call.shapes) == 3:
        operands.append(("co",))
    return Factors(tuple(operands), (("n", "co", *outside),), whole=whole)


def _group_norm(call: Call) -> Factors:
    """native_group_norm(x [N, C, *S], weight, bias, N, C, HxW, groups, eps) -> (y, mean, rstd)"""
    names = ("n", *(f"d{i}" for i in range(1, len(call.shapes[0]))))
    whole = {n: "statistics run over channels and rows" for n in names[1:]} | {"g": ""}
    operands = (names,) + (("d1",),) * (len(call.shapes) - 1)
    return Factors(operands, (names,) + (("n", "g"),) * (len(call.results) - 1), whole=whole)


def windowed(spatial: int) -> FactorRule:
    """Keeps all leading dimensions; the last ``spatial`` ones are whole and may change size."""

    def factors(call: Call) -> Factors:
        lead = tuple(f"d{i}" for i in range(len(call.shape) - spatial))
        inside = tuple(f"s{i}" for i in range(spatial))
        outside = tuple(f"o{i}" for i in range(spatial))
        whole = dict.fromkeys((*inside, *outside), _WINDOW)
        return Factors(((*lead, *inside),), ((*lead, *outside),) * len(call.results), whole=whole)

    return FactorRule(factors)


def _pad(call: Call) -> Factors:
    """constant_pad_nd: only the padded dimensions are whole."""
    pad = call.arg(1, "pad")
    rank = len(call.shape)
    padded = {rank - 1 - i // 2 for i, p in enumerate(pad) if p}
    names = tuple(f"d{i}" for i in range(rank))
    out = tuple(f"o{i}" if i in padded else n for i, n in enumerate(names))
    whole = {n: "padding moves rows across ranks" for i in padded for n in (names[i], out[i])}
    return Factors((names,), (out,), whole=whole)


register("aten::convolution", FactorRule(_convolution))
register("aten::native_group_norm", FactorRule(_group_norm))
register("aten::constant_pad_nd", FactorRule(_pad))
for _n in (1, 2, 3):
    register(
        [f"aten::avg_pool{_n}d", f"aten::replication_pad{_n}d", f"aten::reflection_pad{_n}d",
         f"aten::_adaptive_avg_pool{_n}d", f"aten::max_pool{_n}d_with_indices",
         f"aten::adaptive_avg_pool{_n}d"],  # fmt: skip
        windowed(_n),
    )
