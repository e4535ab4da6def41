"""Rows as bytes: 8-bit floats with a scale each (``quantize``), or the same bits (``to_bytes``).

A row is the last dimension: of q, k, v and o ``[B, H, S, D]`` one token of one head. ``quantize`` gives bytes,
``[..., D + 4]``: D numbers in e4m3 (4 bits of exponent, 3 of mantissa, largest 448, no infinity) and the float32 by
which they are to be multiplied, which is the row's largest magnitude over 448. The scale travels behind its row, in
the same message: a receiver that took its own would be wrong by the ratio of the two (FastUSP, arXiv 2602.10940,
algorithm 1); one scale per row, sent along, is how cache-dit does it. Bytes, because gloo knows no 8-bit floats.

``to_bytes`` loses nothing. It is for what travels in one message with bytes: K, where V alone is quantized.

What ``dequantize(quantize(x))`` keeps of a row:

- A row of zeros has scale 0 and comes back as zeros.
- What is not finite comes back as NaN in its place (e4m3 has one NaN and no infinity), and does not count for the
  scale: the rest of the row is as good as without it.
- A finite x is off by at most half a unit in the last place (``error_bound``): 2^-4 of its magnitude, or 2^-10 of the
  scale where that is more. Of a Gaussian row that is 2.7% in the 2-norm.
- A scale is a normal float32, so what is below 2^-136 in a row of such numbers is lost. A row of float64 beyond
  float32 (1e41) comes back as NaN.
"""

from __future__ import annotations

import torch

LARGEST = 448.0
"""The largest number in e4m3."""
SCALE_BYTES = 4
_TINY = torch.finfo(torch.float32).tiny

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_LIB.define("quantize(Tensor x) -> Tensor", tags=_PT2)
_LIB.define("dequantize(Tensor y, ScalarType dtype) -> Tensor", tags=_PT2)
_LIB.define("to_bytes(Tensor x) -> Tensor", tags=_PT2)
_LIB.define("from_bytes(Tensor y, ScalarType dtype) -> Tensor", tags=_PT2)


def row_bytes(width: int, itemsize: int, quantized: bool = True) -> int:
    """Bytes of a row of ``width`` numbers on its way: a row that would not be shorter quantized is not."""
    return min(width + SCALE_BYTES, width * itemsize) if quantized else width * itemsize


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scales(x: torch.Tensor) -> torch.Tensor:
    """Scale per row of ``x`` (in float32 or float64), ``[..., 1]`` float32; 0 for rows of zeros."""
    largest = x.abs().masked_fill(~torch.isfinite(x), 0.0).amax(-1, keepdim=True)
    # by a tensor, since CUDA multiplies with the inverse of a Python number, which may be a bit off
    scale = (largest / largest.new_full((), LARGEST)).to(torch.float32)
    scale = scale.clamp_min(_TINY)  # without subnormals, which devices may flush
    return scale.masked_fill(largest == 0, 0.0)


def _quantize(x: torch.Tensor) -> torch.Tensor:
    shape = (*x.shape[:-1], x.shape[-1] + SCALE_BYTES)
    if x.numel() == 0:
        return x.new_zeros(shape, dtype=torch.uint8)
    x = x.to(_wide(x.dtype))
    scale = _scales(x)
    units = x / scale.masked_fill(scale == 0, 1.0)
    # devices differ in what they make of numbers beyond the largest, so none gets there; NaN stays NaN
    units = units.masked_fill(~torch.isfinite(x), torch.nan).clamp(-LARGEST, LARGEST)
    codes = units.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([codes, scale.view(torch.uint8)], -1)


def _dequantize(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    width = y.shape[-1] - SCALE_BYTES
    if y.numel() == 0:
        return y.new_empty((*y.shape[:-1], width), dtype=dtype)
    codes, scale = (_fresh(part) for part in y.split([width, SCALE_BYTES], -1))
    wide = _wide(dtype)
    units = codes.view(torch.float8_e4m3fn).to(torch.float32)
    return (units.to(wide) * scale.view(torch.float32).to(wide)).to(dtype)


def _to_bytes(x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], x.shape[-1] * x.element_size()), dtype=torch.uint8)
    return _fresh(x).view(torch.uint8)


def _from_bytes(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if y.numel() == 0:
        return y.new_empty((*y.shape[:-1], y.shape[-1] // dtype.itemsize), dtype=dtype)
    return _fresh(y).view(dtype)


def _fresh(x: torch.Tensor) -> torch.Tensor:
    """A copy, rows one after the other from the start of its storage: only then other dtypes can view it."""
    return x.clone(memory_format=torch.contiguous_format)


def error_bound(x: torch.Tensor) -> torch.Tensor:
    """How far ``dequantize(quantize(x), x.dtype)`` may be from ``x``, number by number (NaN where x is not finite).

    Half a unit in the last place of e4m3 (3 bits of mantissa, subnormals in steps of 2^-9 of the scale), and the
    rounding of what is computed with it: the scale, the quotient in float32, and the product in ``x.dtype``.
    """
    wide = x.to(torch.float64)
    scale = _scales(x.to(_wide(x.dtype))).to(torch.float64)
    half = torch.maximum(wide.abs() * 2.0**-4, scale * 2.0**-10)
    eps = torch.finfo(torch.float32).eps + torch.finfo(x.dtype).eps
    low = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps  # a step of the dtype's own subnormals
    return (half + eps * wide.abs() + low).masked_fill(~torch.isfinite(x), torch.nan)


_LIB.impl("quantize", _quantize, "CompositeExplicitAutograd")
_LIB.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_LIB.impl("to_bytes", _to_bytes, "CompositeExplicitAutograd")
_LIB.impl("from_bytes", _from_bytes, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastpar::quantize",
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] + SCALE_BYTES), dtype=torch.uint8),
    lib=_LIB,
)
torch.library.register_fake(
    "fastpar::dequantize",
    lambda y, dtype: y.new_empty((*y.shape[:-1], y.shape[-1] - SCALE_BYTES), dtype=dtype),
    lib=_LIB,
)
torch.library.register_fake(
    "fastpar::to_bytes",
    lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] * x.element_size()), dtype=torch.uint8),
    lib=_LIB,
)
torch.library.register_fake(
    "fastpar::from_bytes",
    lambda y, dtype: y.new_empty((*y.shape[:-1], y.shape[-1] // dtype.itemsize), dtype=dtype),
    lib=_LIB,
)

quantize = torch.ops.fastpar.quantize.default
dequantize = torch.ops.fastpar.dequantize.default
to_bytes = torch.ops.fastpar.to_bytes.default
from_bytes = torch.ops.fastpar.from_bytes.default
