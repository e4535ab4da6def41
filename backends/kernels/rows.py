"""``quantize`` and ``dequantize``: rows to bytes and back where no message is next to them, in one launch each.

What a rank keeps of a ring's keys and values is rounded as what it sends, and used here. Equal bit for bit to
``fastpar::quantize`` and ``fastpar::dequantize``, which torch runs as about ten kernels. Floor: a row's own bytes and
D + 4, one read and the other written.
"""

from __future__ import annotations

import torch

from fastpar.backends.kernels.launch import FLOATS, jit, on_gpu, operator, power, tl, wrap_triton
from fastpar.backends.kernels.numbers import load_quantized, narrow, rows_of, store_quantized, widen
from fastpar.backends.kernels.table import RANK, strides4
from fastpar.ops.quantize import SCALE_BYTES, dequantize, quantize


@jit
def _quantize_rows(
    out, x, s0, s1, s2, s3, size, m, n, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, i, j, k, keep = rows_of(tl.program_id(0).to(tl.int64) * ROWS, 0, 0, 0, size, m, n, ROWS)
    col = tl.arange(0, COLUMNS)
    here = x + (i * s0 + j * s1 + k * s2)[:, None] + (col * s3)[None, :]
    rows = widen(tl.load(here, mask=keep[:, None] & (col < WIDTH)[None, :], other=0.0))
    store_quantized(out, rows, row, col, keep, WIDTH)


@jit
def _dequantize_rows(
    out, y, s0, s1, s2, s3, size, m, n, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, i, j, k, keep = rows_of(tl.program_id(0).to(tl.int64) * ROWS, 0, 0, 0, size, m, n, ROWS)
    col = tl.arange(0, COLUMNS)
    numbers = load_quantized(y + i * s0 + j * s1 + k * s2, s3, col, keep, WIDTH)
    there = out + (row * WIDTH)[:, None] + col[None, :]
    tl.store(there, narrow(numbers, out.dtype.element_ty), mask=keep[:, None] & (col < WIDTH)[None, :])


def launch(kernel: object, out: torch.Tensor, x: torch.Tensor, width: int) -> torch.Tensor:
    """Fills ``out``, which is contiguous, from the rows of ``x``, which may have any strides."""
    count = x.numel() // x.shape[-1]
    if count:
        size, m, n = (1, 1, 1, *x.shape[:-1])[-3:]
        rows = max(1, 2048 // power(width))
        wrap_triton(kernel)[(-(-count // rows),)](out, x, *strides4(x), size, m, n, width, rows, power(width))
    return out


def launch_quantize(x: torch.Tensor) -> torch.Tensor:
    return launch(_quantize_rows, _wider(x), x, x.shape[-1])


def launch_dequantize(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return launch(_dequantize_rows, _narrower(y, dtype), y, y.shape[-1] - SCALE_BYTES)


def _wider(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + SCALE_BYTES), dtype=torch.uint8)


def _narrower(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return y.new_empty((*y.shape[:-1], y.shape[-1] - SCALE_BYTES), dtype=dtype)


@operator("quantize")
def quantize_operator(x: torch.Tensor) -> torch.Tensor:
    """The kernel where it can run, else ``fastpar::quantize``."""
    return launch_quantize(x) if on_gpu(x) and _takes(x.dtype, x.dim(), x.shape[-1]) else quantize(x)


@operator("dequantize")
def dequantize_operator(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The kernel where it can run, else ``fastpar::dequantize``."""
    takes = on_gpu(y) and _takes(dtype, y.dim(), y.shape[-1] - SCALE_BYTES)
    return launch_dequantize(y, dtype) if takes else dequantize(y, dtype)


def _takes(dtype: torch.dtype, dims: int, width: int) -> bool:
    return dtype in FLOATS and 0 < dims <= RANK and 0 < width <= 8192


quantize_operator.register_fake(_wider)
dequantize_operator.register_fake(_narrower)
