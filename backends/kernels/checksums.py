"""``checksums``: what ``fastpar::checksums`` gives, of ``LANES`` tensors per launch.

The step waits behind the check on the device, so it should take no longer than reading does: words of eight bytes
where the tensor allows it, the numbers of the columns made once per program, one product per word beside its stirring,
one addition to the tensor's sum per program. Sums modulo 2^64 do not depend on their order, so neither does the
result. Floor: every byte read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpar.backends.kernels.launch import jit, operator, tl, wrap_triton
from fastpar.ops.checksum import COLUMNS, LANES, ROW, STEP, STIR, words_of
from fastpar.ops.checksum import checksums as checksums_in_torch

ROWS = 16
"""Rows of ``COLUMNS`` words that one program adds up."""


@jit
def _odd(place, step: tl.constexpr, by: tl.constexpr):
    """As ``fastpar.ops.checksum.odd``."""
    mixed = (place + 1) * step
    mixed = (mixed ^ (mixed >> 29)) * by
    return (mixed ^ (mixed >> 32)) | 1


@jit
def _add(
    to, words, count,
    STIRS: tl.constexpr, STEPS: tl.constexpr, ROW_STEPS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the share of this program's rows to the sum of one tensor."""
    first = tl.program_id(0).to(tl.int64) * HEIGHT
    col = tl.arange(0, WIDTH).to(tl.int64)
    if first * WIDTH < count:
        total = tl.zeros((WIDTH,), tl.int64)
        for i in range(HEIGHT):
            place = (first + i) * WIDTH + col
            word = tl.load(words + place, mask=place < count, other=0).to(tl.int64) * STIRS
            total += (word ^ (word >> 32)) * _odd(first + i, ROW_STEPS, STIRS)
        tl.atomic_add(to, tl.sum(total * _odd(col, STEPS, STIRS), axis=0))


@jit
def _checksums(
    sums, x0, x1, x2, x3, x4, x5, x6, x7, n0, n1, n2, n3, n4, n5, n6, n7,
    p0, p1, p2, p3, p4, p5, p6, p7,
    S: tl.constexpr, C: tl.constexpr, R: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1)
    if lane == 0:
        _add(sums + p0, x0, n0, S, C, R, H, W)
    if lane == 1:
        _add(sums + p1, x1, n1, S, C, R, H, W)
    if lane == 2:
        _add(sums + p2, x2, n2, S, C, R, H, W)
    if lane == 3:
        _add(sums + p3, x3, n3, S, C, R, H, W)
    if lane == 4:
        _add(sums + p4, x4, n4, S, C, R, H, W)
    if lane == 5:
        _add(sums + p5, x5, n5, S, C, R, H, W)
    if lane == 6:
        _add(sums + p6, x6, n6, S, C, R, H, W)
    if lane == 7:
        _add(sums + p7, x7, n7, S, C, R, H, W)


def launch(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The checksums, by kernels; tensors of one size travel together, for a grid is as large as the largest needs."""
    words = [words_of(x.detach()) for x in xs]
    alike: dict[torch.dtype, list[int]] = {}
    for i in sorted(range(len(xs)), key=lambda i: words[i].numel()):
        alike.setdefault(words[i].dtype, []).append(i)
    sums = torch.zeros(len(xs), dtype=torch.int64, device=xs[0].device)
    for same in alike.values():
        for at in range(0, len(same), LANES):
            places = same[at : at + LANES]
            group = [words[i] for i in places]
            counts = [x.numel() for x in group]
            grid = (max(1, -(-max(counts) // (ROWS * COLUMNS))), len(group))
            none = LANES - len(group)
            tensors, zeros = [*group, *[group[0]] * none], [0] * none
            wrap_triton(_checksums)[grid](
                sums, *tensors, *counts, *zeros, *places, *zeros, STIR, STEP, ROW, ROWS, COLUMNS
            )
    return sums


@operator("checksums")
def checksums_operator(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    """As ``fastpar::checksums``: from tensors of one device to int64 ``[tensors]``, the same numbers."""
    return launch(xs) if xs[0].device.type == "cuda" else checksums_in_torch(xs)


checksums_operator.register_fake(lambda xs: xs[0].new_empty((len(xs),), dtype=torch.int64))
