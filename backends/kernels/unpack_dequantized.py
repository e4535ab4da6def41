"""``unpack_dequantized``: from the bytes that arrived straight to numbers where attention wants them.

Equal bit for bit to ``dequantize`` of what ``unpack`` gives. A row of D + 4 bytes is read once and written once as D
numbers, at its place in a contiguous result. What travelled as it is comes back as it was, out of the same buffer.
Floor: D + 4 bytes of a row read, its own bytes written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpar.backends.kernels.copies import move, takes
from fastpar.backends.kernels.launch import FLOATS, jit, operator, power, tl, wrap_triton
from fastpar.backends.kernels.numbers import load_quantized, narrow, rows_of
from fastpar.backends.kernels.table import RANK, groups, lanes_of, make_table, ranks, tiles
from fastpar.ops.collectives import dtypes_named, names_of, shapes_of, unpack_boxes
from fastpar.ops.quantize import SCALE_BYTES, dequantize


@jit
def _lane(
    buffer, table, y, s0, s1, s2, s3, box, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    entry = table + box * 10
    row, i, j, k, keep = rows_of(
        first, tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
        tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), ROWS,
    )  # fmt: skip
    col = tl.arange(0, COLUMNS)
    mask = keep[:, None] & (col < WIDTH)[None, :]
    numbers = load_quantized(buffer + tl.load(entry + 1) + row * (WIDTH + 4), 1, col, keep, WIDTH)
    there = y + (i * s0 + j * s1 + k * s2)[:, None] + (col * s3)[None, :]
    tl.store(there, narrow(numbers, y.dtype.element_ty), mask=mask)


@jit
def _dequantize(
    buffer, table, y0, y1, y2, y3, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3,
    LANE0: tl.constexpr, LANE1: tl.constexpr, LANE2: tl.constexpr, LANE3: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    box = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    lane = tl.load(table + box * 10)
    if lane == LANE0:
        _lane(buffer, table, y0, a0, a1, a2, a3, box, first, WIDTH, ROWS, COLUMNS)
    if LANE1 >= 0:
        if lane == LANE1:
            _lane(buffer, table, y1, b0, b1, b2, b3, box, first, WIDTH, ROWS, COLUMNS)
    if LANE2 >= 0:
        if lane == LANE2:
            _lane(buffer, table, y2, c0, c1, c2, c3, box, first, WIDTH, ROWS, COLUMNS)
    if LANE3 >= 0:
        if lane == LANE3:
            _lane(buffer, table, y3, d0, d1, d2, d3, box, first, WIDTH, ROWS, COLUMNS)


def reference(
    buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str, rounded: Sequence[bool]
) -> list[torch.Tensor]:
    """What the kernel computes. ``shapes`` and ``boxes`` are those of ``unpack``: of rounded tensors in bytes.

    ``dtypes``: of the results, as text (``names_of``).
    """
    kinds = dtypes_named(dtypes)
    sent = [torch.uint8 if is_rounded else d for d, is_rounded in zip(kinds, rounded, strict=True)]
    ys = unpack_boxes(buffer, shapes, boxes, names_of(sent))
    return [dequantize(y, d) if r else y for y, d, r in zip(ys, kinds, rounded, strict=True)]


def sizes_of(dtypes: Sequence[torch.dtype], rounded: Sequence[bool]) -> list[int]:
    """Bytes of a number in the buffer, which of rounded tensors is a byte."""
    return [1 if is_rounded else d.itemsize for d, is_rounded in zip(dtypes, rounded, strict=True)]


def _fake(buffer: torch.Tensor, shapes: Sequence[int], dtypes: str, rounded: Sequence[bool]) -> list[torch.Tensor]:
    lanes = zip(shapes_of(shapes), dtypes_named(dtypes), rounded, strict=True)
    return [
        buffer.new_empty((*shape[:-1], shape[-1] - SCALE_BYTES) if is_rounded else shape, dtype=dtype)
        for shape, dtype, is_rounded in lanes
    ]


def launch(
    buffer: torch.Tensor,
    shapes: Sequence[int],
    boxes: Sequence[int],
    dtypes: str,
    rounded: Sequence[bool],
    table: torch.Tensor,
) -> list[torch.Tensor]:
    outs = _fake(buffer, shapes, dtypes, rounded)
    found = tiles(boxes, sizes_of(dtypes_named(dtypes), rounded))
    move(buffer, table, outs, found, [lane for lane, is_rounded in enumerate(rounded) if not is_rounded], False)
    kinds: dict[tuple[torch.dtype, int], list[int]] = {}
    for lane in sorted({t.lane for t in found if t.rows and rounded[t.lane]}):
        kinds.setdefault((outs[lane].dtype, outs[lane].shape[-1]), []).append(lane)
    for (_, width), lanes in kinds.items():
        for group in groups(lanes):
            columns = power(width)
            rows = max(1, 2048 // columns)
            tensors, strides, names = lanes_of(outs, group)
            grid = (-(-max(t.rows for t in found if t.lane in group) // rows), len(found))
            wrap_triton(_dequantize)[grid](buffer, table, *tensors, *strides, *names, width, rows, columns)
    return outs


@operator("unpack_dequantized")
def unpack_dequantized_operator(
    buffer: torch.Tensor,
    shapes: Sequence[int],
    boxes: Sequence[int],
    dtypes: str,
    rounded: Sequence[bool],
    table: torch.Tensor,
) -> list[torch.Tensor]:
    """The kernel where it can run, else ``reference``; ``table`` is ``make_table`` with this file's ``sizes_of``."""
    if takes(buffer) and _computes(shapes, dtypes, rounded):
        return launch(buffer, shapes, boxes, dtypes, rounded, table)
    return reference(buffer, shapes, boxes, dtypes, rounded)


unpack_dequantized_operator.register_fake(
    lambda buffer, shapes, boxes, dtypes, rounded, table: _fake(buffer, shapes, dtypes, rounded)
)


def _computes(shapes: Sequence[int], dtypes: str, rounded: Sequence[bool]) -> bool:
    widths, i = [], 0
    for rank in ranks(shapes):
        widths.append(shapes[i + rank] - SCALE_BYTES)
        i += 1 + rank
    lanes = zip(dtypes_named(dtypes), widths, rounded, strict=True)
    return max(ranks(shapes)) <= RANK and all(d in FLOATS and 0 < w <= 8192 for d, w, is_rounded in lanes if is_rounded)


def unpack_dequantized(
    buffer: torch.Tensor,
    shapes: Sequence[int],
    boxes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    rounded: Sequence[bool],
) -> list[torch.Tensor]:
    """The operator, with its table made anew; ``dtypes`` are the results'."""
    table = make_table(boxes, sizes_of(dtypes, rounded), buffer.device)
    return unpack_dequantized_operator(buffer, shapes, boxes, names_of(dtypes), rounded, table)
