"""``normed``: norm, modulation and rotary embedding of rows, written where the exchange takes them from.

What stands between a projection and its exchange in a diffusion transformer: an RMS norm per head and a rotary
embedding of q and k, or a layer norm and its modulation. Inductor makes one kernel of the chain, but ends it where
an opaque operator (``quantize``) or a permuted send layout begins; here a row is read once, worked on in float32,
rounded once, and stored in the send buffer, quantized or not. Floor: a row's bytes read, what is sent of it written;
cosines and sines are read again for every head, mostly from cache.

Numbers differ from eager's by what eager rounds between its steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpar.backends.kernels.launch import FLOATS, jit, on_gpu, operator, power, tl, wrap_triton
from fastpar.backends.kernels.numbers import narrow, rows_of, store_quantized, widen
from fastpar.backends.kernels.table import tiles
from fastpar.core.errors import OptionError
from fastpar.ops.collectives import block, decode, flat_bytes
from fastpar.ops.quantize import quantize

NORMS = ("none", "layer", "rms")


@jit
def _at(
    rows, keep, i, k, s3, col, mean, factor, weight, bias, scale, shift, m0, m2, h0, h2,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Normed and modulated numbers in columns ``col`` of some rows."""
    there = col < WIDTH
    mask = keep[:, None] & there[None, :]
    y = (widen(tl.load(rows[:, None] + (col * s3)[None, :], mask=mask, other=0.0)) - mean[:, None]) * factor[:, None]
    if WEIGHT:
        y = y * widen(tl.load(weight + col, mask=there, other=0.0))[None, :]
    if BIAS:
        y = y + widen(tl.load(bias + col, mask=there, other=0.0))[None, :]
    if SCALE:
        by = widen(tl.load(scale + (i * m0 + k * m2)[:, None] + col[None, :], mask=mask, other=0.0))
        to = widen(tl.load(shift + (i * h0 + k * h2)[:, None] + col[None, :], mask=mask, other=0.0))
        y = y * (1.0 + by) + to
    return y


@jit
def _normed(
    out, table, x, weight, bias, scale, shift, cos, sin, lane, s0, s1, s2, s3, m0, m2, h0, h2, c0, c2, r0, r2, eps,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, ROTARY: tl.constexpr,
    ROUNDED: tl.constexpr, ITEM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    box = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    entry = table + box * 10
    if tl.load(entry) == lane:
        row, i, j, k, keep = rows_of(
            first, tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
            tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), ROWS,
        )  # fmt: skip
        col = tl.arange(0, COLUMNS)
        mask = keep[:, None] & (col < WIDTH)[None, :]
        rows = x + i * s0 + j * s1 + k * s2
        mean = tl.zeros((ROWS,), tl.float32)
        factor = mean + 1.0
        if NORM > 0:
            numbers = widen(tl.load(rows[:, None] + (col * s3)[None, :], mask=mask, other=0.0))
            if NORM == 1:
                mean = tl.sum(numbers, axis=1) / WIDTH
                numbers = tl.where(mask, numbers - mean[:, None], 0.0)
            factor = 1.0 / tl.sqrt_rn(tl.sum(numbers * numbers, axis=1) / WIDTH + eps)
        y = _at(
            rows, keep, i, k, s3, col, mean, factor, weight, bias, scale, shift, m0, m2, h0, h2,
            WEIGHT, BIAS, SCALE, WIDTH,
        )  # fmt: skip
        if ROTARY > 0:
            if ROTARY == 1:  # neighbours
                other, sign = col ^ 1, tl.where(col % 2 == 0, -1.0, 1.0)
            else:  # halves
                other = tl.where(col < WIDTH // 2, col + WIDTH // 2, col - WIDTH // 2)
                sign = tl.where(col < WIDTH // 2, -1.0, 1.0)
            turned = _at(
                rows, keep, i, k, s3, other, mean, factor, weight, bias, scale, shift, m0, m2, h0, h2,
                WEIGHT, BIAS, SCALE, WIDTH,
            )  # fmt: skip
            c = widen(tl.load(cos + (i * c0 + k * c2)[:, None] + col[None, :], mask=mask, other=0.0))
            s = widen(tl.load(sin + (i * r0 + k * r2)[:, None] + col[None, :], mask=mask, other=0.0))
            y = y * c + turned * sign[None, :] * s
        offset = tl.load(entry + 1)
        low = narrow(y, x.dtype.element_ty)
        if ROUNDED:  # as quantize would: of numbers in x's own dtype
            store_quantized(out + offset, tl.where(mask, widen(low), 0.0), row, col, keep, WIDTH)
        else:
            there = out.to(tl.pointer_type(x.dtype.element_ty)) + offset // ITEM
            tl.store(there + (row * WIDTH)[:, None] + col[None, :], low, mask=mask)


def chain(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    half: bool = False,
) -> torch.Tensor:
    """The chain on ``x [B, H, S, D]``, in ``x``'s dtype, computed in float32 (float64 of float64).

    ``weight``, ``bias``: ``[D]``. ``scale``, ``shift``: ``[B or 1, S or 1, D]``, as ``x * (1 + scale) + shift``.
    ``cos``, ``sin``: ``[B or 1, S, D]``; ``half`` turns the halves of a row into one another, else neighbours.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    if scale is not None and shift is not None:
        y = y * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]
    if cos is not None and sin is not None:
        a, b = y.chunk(2, -1) if half else y.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.cat([-b, a], -1) if half else torch.stack([-b, a], -1).flatten(-2)
        y = y * cos.to(wide)[:, None] + turned * sin.to(wide)[:, None]
    return y.to(x.dtype)


def reference(
    out: torch.Tensor, rows: torch.Tensor, lane: int, boxes: Sequence[int], itemsizes: Sequence[int]
) -> None:
    """Writes ``rows``, of numbers or of bytes, to the boxes of ``lane`` in the send buffer ``out``."""
    for t, (_, starts, sizes) in zip(tiles(boxes, itemsizes), decode(boxes), strict=True):
        if t.lane == lane:
            piece = flat_bytes(block(rows, starts, sizes))
            out.view(torch.uint8)[t.offset : t.offset + piece.numel()] = piece


def launch(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None,
    norm: str, eps: float, half: bool, rounded: bool, lane: int, boxes: Sequence[int], itemsizes: Sequence[int],
    table: torch.Tensor,
) -> None:  # fmt: skip
    found = tiles(boxes, itemsizes)
    most = max((t.rows for t in found if t.lane == lane), default=0)
    if not most:
        return
    width = x.shape[-1]
    columns = power(width)
    rows = max(1, 2048 // columns)
    given = [None if t is None else t if t.stride(-1) == 1 else t.contiguous() for t in (scale, shift, cos, sin)]
    steps = [n for t in given for n in _steps(t)]
    operands = [x if t is None else t for t in (weight, bias, *given)]
    rotary = 0 if cos is None else 2 if half else 1
    flags = (NORMS.index(norm), weight is not None, bias is not None, scale is not None, rotary, rounded)
    wrap_triton(_normed)[(-(-most // rows), len(found))](
        out, table, x, *operands, lane, *x.stride(), *steps, eps, *flags, x.element_size(), width, rows, columns
    )


def _steps(t: torch.Tensor | None) -> tuple[int, int]:
    """Strides of ``[B or 1, S or 1, D]`` along B and S, 0 where it is the same for all."""
    if t is None:
        return 0, 0
    b, s = ((0 if size == 1 else stride) for size, stride in zip(t.shape[:2], t.stride()[:2], strict=True))
    return b, s


@operator("normed_", mutates=("out",))
def normed_(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm: str,
    eps: float,
    half: bool,
    rounded: bool,
    lane: int,
    boxes: Sequence[int],
    itemsizes: Sequence[int],
    table: torch.Tensor,
) -> None:
    """``chain`` of ``x``, written to the boxes of ``lane`` in a send buffer that several operators fill.

    ``boxes`` are those of ``pack``, ``itemsizes`` the bytes of a number by lane (1 of quantized ones), ``table`` is
    ``make_table(boxes, itemsizes)``. Raises OptionError where arguments do not go together.
    """
    if norm not in NORMS or (scale is None) != (shift is None) or (cos is None) != (sin is None):
        raise OptionError(f"norm is one of {', '.join(NORMS)}; scale comes with shift and cos with sin; got {norm!r}")
    aligned = rounded or all(t.offset % x.element_size() == 0 for t in tiles(boxes, itemsizes) if t.lane == lane)
    flat = all(t is None or t.is_contiguous() for t in (weight, bias))
    if on_gpu(out, x) and x.dtype in FLOATS and x.dim() == 4 and 0 < x.shape[-1] <= 8192 and aligned and flat:
        launch(out, x, weight, bias, scale, shift, cos, sin, norm, eps, half, rounded, lane, boxes, itemsizes, table)
        return
    rows = chain(x, weight, bias, scale, shift, cos, sin, norm, eps, half)
    reference(out, quantize(rows) if rounded else rows, lane, boxes, itemsizes)


normed_.register_fake(lambda *args: None)
