"""``pack`` and ``unpack``: boxes of several tensors to one buffer and back, in one launch for four tensors.

What moves is not looked at: a row is words of 8, 4, 2 or 1 bytes, the widest that its place in the tensor and in
the buffer allows. Dtypes may differ, as in ``fastpar::pack``. Floor: every byte is read once and written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpar.backends.kernels.launch import jit, on_gpu, operator, power, tl, wrap_triton
from fastpar.backends.kernels.numbers import rows_of
from fastpar.backends.kernels.table import (
    RANK,
    Tile,
    groups,
    lanes_of,
    make_table,
    ranks,
    strides4,
    tiles,
)
from fastpar.ops.collectives import _pack_fake, _unpack_fake, dtypes_named, pack_boxes, unpack_boxes


@jit
def _lane(
    flat, table, x, s0, s1, s2, s3, box, first, PACK: tl.constexpr, ITEM: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and on of one box. Strides, like the table, count numbers of ITEM bytes."""
    if UNIT == 8:
        words, there = x.to(tl.pointer_type(tl.int64)), flat.to(tl.pointer_type(tl.int64))
    elif UNIT == 4:
        words, there = x.to(tl.pointer_type(tl.int32)), flat.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        words, there = x.to(tl.pointer_type(tl.int16)), flat.to(tl.pointer_type(tl.int16))
    else:
        words, there = x.to(tl.pointer_type(tl.int8)), flat.to(tl.pointer_type(tl.int8))
    entry = table + box * 10
    row, i, j, k, keep = rows_of(
        first, tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4),
        tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), ROWS,
    )  # fmt: skip
    width = tl.load(entry + 9) * ITEM // UNIT
    here = (i * s0 + j * s1 + k * s2) * ITEM // UNIT
    start = tl.load(entry + 5)
    if UNIT == ITEM:
        here += start * s3
        step = s3
    else:
        here += start * ITEM // UNIT
        step = 1
    packed = tl.load(entry + 1) // UNIT + row * width
    col = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mask = keep[:, None] & (col < width)[None, :]
    inside = words + here[:, None] + (col * step)[None, :]
    outside = there + packed[:, None] + col[None, :]
    if PACK:
        tl.store(outside, tl.load(inside, mask=mask), mask=mask)
    else:
        tl.store(inside, tl.load(outside, mask=mask), mask=mask)


@jit
def _copy(
    flat, table, x0, x1, x2, x3, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3,
    LANE0: tl.constexpr, LANE1: tl.constexpr, LANE2: tl.constexpr, LANE3: tl.constexpr, PACK: tl.constexpr,
    ITEM: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    box = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * ROWS
    lane = tl.load(table + box * 10)
    if lane == LANE0:
        _lane(flat, table, x0, a0, a1, a2, a3, box, first, PACK, ITEM, UNIT, ROWS, COLUMNS)
    if LANE1 >= 0:
        if lane == LANE1:
            _lane(flat, table, x1, b0, b1, b2, b3, box, first, PACK, ITEM, UNIT, ROWS, COLUMNS)
    if LANE2 >= 0:
        if lane == LANE2:
            _lane(flat, table, x2, c0, c1, c2, c3, box, first, PACK, ITEM, UNIT, ROWS, COLUMNS)
    if LANE3 >= 0:
        if lane == LANE3:
            _lane(flat, table, x3, d0, d1, d2, d3, box, first, PACK, ITEM, UNIT, ROWS, COLUMNS)


def _unit(x: torch.Tensor, boxes: Sequence[Tile]) -> int:
    """Bytes of the words in which rows of ``x`` can be moved; 0 where their last dimension lies apart."""
    item = x.element_size()
    dense = x.dim() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1  # a single number may have any stride
    bytes_ = [n for t in boxes for n in (t.offset, t.starts[-1] * item, t.sizes[-1] * item)]
    if dense:
        bytes_ += [x.storage_offset() * item, *(s * item for s in strides4(x)[:-1])]
    fits = [unit for unit in (8, 4, 2, 1) if all(n % unit == 0 for n in bytes_) and (dense or unit == item)]
    return fits[0] if fits else 0


def move(
    flat: torch.Tensor, table: torch.Tensor, xs: list[torch.Tensor], boxes: list[Tile], lanes: Sequence[int], pack: bool
) -> None:
    """Launches the copies between the buffer ``flat`` and those boxes that are of ``xs[lane]`` for these lanes."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for lane in lanes:
        mine = [t for t in boxes if t.lane == lane and t.numel]
        if not mine:
            continue
        unit = _unit(xs[lane], mine)
        if not unit:  # numbers apart from one another, and the buffer not at multiples of them: as bytes
            xs[lane] = xs[lane].contiguous()
            unit = _unit(xs[lane], mine)
        kinds.setdefault((xs[lane].element_size(), unit), []).append(lane)
    for (item, unit), same in kinds.items():
        for group in groups(same):
            mine = [t for t in boxes if t.lane in group]
            width = max(t.sizes[-1] for t in mine) * item // unit
            columns = min(power(width), 512)
            rows = max(1, 1024 // columns)
            tensors, strides, names = lanes_of(xs, group)
            grid = (-(-max(t.rows for t in mine) // rows), len(boxes), -(-width // columns))
            wrap_triton(_copy)[grid](flat, table, *tensors, *strides, *names, pack, item, unit, rows, columns)


def launch_pack(xs: Sequence[torch.Tensor], boxes: Sequence[int], table: torch.Tensor) -> torch.Tensor:
    sizes = [x.element_size() for x in xs]
    out = _pack_fake(xs, boxes)
    move(out, table, list(xs), tiles(boxes, sizes), range(len(xs)), True)
    return out


def launch_unpack(
    buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str, table: torch.Tensor
) -> list[torch.Tensor]:
    outs = _unpack_fake(buffer, shapes, boxes, dtypes)
    move(buffer, table, outs, tiles(boxes, [x.element_size() for x in outs]), range(len(outs)), False)
    return outs


def takes(*xs: torch.Tensor) -> bool:
    """Whether these tensors can be moved by the kernel."""
    return on_gpu(*xs) and all(movable(x.dtype) for x in xs)


def movable(dtype: torch.dtype) -> bool:
    """Whether numbers of this kind can be."""
    return not dtype.is_complex and dtype != torch.bool


@operator("pack")
def pack_operator(xs: Sequence[torch.Tensor], boxes: Sequence[int], table: torch.Tensor) -> torch.Tensor:
    """As ``fastpar::pack``; ``table`` is ``make_table`` of ``boxes``. ``dtypes`` below are text (``names_of``)."""
    return launch_pack(xs, boxes, table) if takes(*xs) else pack_boxes(xs, boxes)


@operator("unpack")
def unpack_operator(
    buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str, table: torch.Tensor
) -> list[torch.Tensor]:
    """As ``fastpar::unpack``."""
    if takes(buffer) and all(size <= RANK for size in ranks(shapes)):
        return launch_unpack(buffer, shapes, boxes, dtypes, table)
    return unpack_boxes(buffer, shapes, boxes, dtypes)


pack_operator.register_fake(lambda xs, boxes, table: _pack_fake(xs, boxes))
unpack_operator.register_fake(
    lambda buffer, shapes, boxes, dtypes, table: _unpack_fake(buffer, shapes, boxes, dtypes)
)


def pack(xs: Sequence[torch.Tensor], boxes: Sequence[int]) -> torch.Tensor:
    """``fastpar::pack`` by the kernel where it can run; makes the table anew."""
    return pack_operator(xs, boxes, make_table(boxes, [x.element_size() for x in xs], xs[0].device))


def unpack(
    buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str = ""
) -> list[torch.Tensor]:
    """``fastpar::unpack`` likewise."""
    sizes = [d.itemsize for d in dtypes_named(dtypes)] or [buffer.element_size()] * len(ranks(shapes))
    return unpack_operator(buffer, shapes, boxes, dtypes, make_table(boxes, sizes, buffer.device))
