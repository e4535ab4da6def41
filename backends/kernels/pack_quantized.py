"""``pack_quantized``: from q, k, v or o as they lie in memory straight to the bytes that are sent.

Equal bit for bit to ``pack([quantize(x) ...], boxes)``. A row of D numbers is read once, in any strides, and written
once, as D bytes of e4m3 and 4 of scale, to its place in the send buffer; torch needs a permuted copy, about ten
kernels for ``quantize``, and a concatenation. Tensors that are not rounded travel in the same buffer as they are.
Floor: a row's own bytes read, D + 4 written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpar.backends.kernels.copies import move, takes
from fastpar.backends.kernels.launch import FLOATS, jit, operator, power, tl, wrap_triton
from fastpar.backends.kernels.numbers import rows_of, store_quantized, widen
from fastpar.backends.kernels.table import groups, lanes_of, make_table, tiles
from fastpar.ops.collectives import pack_boxes
from fastpar.ops.quantize import quantize


@jit
def _lane(
    out, table, x, s0, s1, s2, s3, box, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    entry = table + box * 10
    row, i, j, k, keep = rows_of(
        first, tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
        tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), ROWS,
    )  # fmt: skip
    col = tl.arange(0, COLUMNS)
    mask = keep[:, None] & (col < WIDTH)[None, :]
    there = x + (i * s0 + j * s1 + k * s2)[:, None] + (col * s3)[None, :]
    rows = widen(tl.load(there, mask=mask, other=0.0))
    store_quantized(out + tl.load(entry + 1), rows, row, col, keep, WIDTH)


@jit
def _quantize(
    out, table, x0, x1, x2, x3, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3,
    LANE0: tl.constexpr, LANE1: tl.constexpr, LANE2: tl.constexpr, LANE3: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    box = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    lane = tl.load(table + box * 10)
    if lane == LANE0:
        _lane(out, table, x0, a0, a1, a2, a3, box, first, WIDTH, ROWS, COLUMNS)
    if LANE1 >= 0:
        if lane == LANE1:
            _lane(out, table, x1, b0, b1, b2, b3, box, first, WIDTH, ROWS, COLUMNS)
    if LANE2 >= 0:
        if lane == LANE2:
            _lane(out, table, x2, c0, c1, c2, c3, box, first, WIDTH, ROWS, COLUMNS)
    if LANE3 >= 0:
        if lane == LANE3:
            _lane(out, table, x3, d0, d1, d2, d3, box, first, WIDTH, ROWS, COLUMNS)


def reference(xs: Sequence[torch.Tensor], rounded: Sequence[bool], boxes: Sequence[int]) -> torch.Tensor:
    """What the kernel computes. ``boxes`` are those of ``pack``: of rounded tensors in bytes, rows of D + 4."""
    return pack_boxes([quantize(x) if is_rounded else x for x, is_rounded in zip(xs, rounded, strict=True)], boxes)


def sizes_of(xs: Sequence[torch.Tensor], rounded: Sequence[bool]) -> list[int]:
    """Bytes of a number in the buffer, which of rounded tensors is a byte."""
    return [1 if is_rounded else x.element_size() for x, is_rounded in zip(xs, rounded, strict=True)]


def _fake(xs: Sequence[torch.Tensor], rounded: Sequence[bool], boxes: Sequence[int]) -> torch.Tensor:
    sizes = sizes_of(xs, rounded)
    return xs[0].new_empty(sum(t.numel * sizes[t.lane] for t in tiles(boxes, sizes)), dtype=torch.uint8)


def launch(
    xs: Sequence[torch.Tensor], rounded: Sequence[bool], boxes: Sequence[int], table: torch.Tensor
) -> torch.Tensor:
    found = tiles(boxes, sizes_of(xs, rounded))
    out = _fake(xs, rounded, boxes)
    plain = [lane for lane, is_rounded in enumerate(rounded) if not is_rounded]
    move(out, table, list(xs), found, plain, True)
    kinds: dict[tuple[torch.dtype, int], list[int]] = {}
    for lane in sorted({t.lane for t in found if t.rows and rounded[t.lane]}):
        kinds.setdefault((xs[lane].dtype, xs[lane].shape[-1]), []).append(lane)
    for (_, width), lanes in kinds.items():
        for group in groups(lanes):
            columns = power(width)
            rows = max(1, 2048 // columns)
            tensors, strides, names = lanes_of(xs, group)
            grid = (-(-max(t.rows for t in found if t.lane in group) // rows), len(found))
            wrap_triton(_quantize)[grid](out, table, *tensors, *strides, *names, width, rows, columns)
    return out


@operator("pack_quantized")
def pack_quantized_operator(
    xs: Sequence[torch.Tensor], rounded: Sequence[bool], boxes: Sequence[int], table: torch.Tensor
) -> torch.Tensor:
    """The kernel where it can run, else ``reference``; ``table`` is ``make_table(boxes, sizes_of(xs, rounded))``."""
    if takes(*xs) and all(quantizable(x) for x, is_rounded in zip(xs, rounded, strict=True) if is_rounded):
        return launch(xs, rounded, boxes, table)
    return reference(xs, rounded, boxes)


pack_quantized_operator.register_fake(lambda xs, rounded, boxes, table: _fake(xs, rounded, boxes))


def quantizable(x: torch.Tensor) -> bool:
    """Whether the kernel computes on rows like these."""
    return x.dtype in FLOATS and x.dim() > 0 and 0 < x.shape[-1] <= 8192


def pack_quantized(xs: Sequence[torch.Tensor], rounded: Sequence[bool], boxes: Sequence[int]) -> torch.Tensor:
    """The operator, with its table made anew."""
    table = make_table(boxes, sizes_of(xs, rounded), xs[0].device)
    return pack_quantized_operator(xs, rounded, boxes, table)
