"""``merge``: two (output, logsumexp) pairs of blockwise attention to one, by online softmax.

As ``fastpar::merge``: an empty block (logsumexp -inf) weighs nothing, and a row that no block shows a key stays 0.
Blocks come as attention writes them, in 16 bits mostly; what is merged is kept in float32 (float64 for that), unless
it is merged in place into something narrower. Floor: both outputs read and one written.
"""

from __future__ import annotations

import torch

from fastpar.backends.kernels.launch import FLOATS, jit, on_gpu, operator, power, tl, wrap_triton
from fastpar.backends.kernels.numbers import narrow, widen
from fastpar.backends.kernels.table import strides4
from fastpar.ops.ring import merge as merge_in_torch


@jit
def _merge(
    x, xl, y, yl, z, zl, rows, M, N, x0, x1, x2, x3, xl0, xl1, xl2, y0, y1, y2, y3, yl0, yl1, yl2,
    z0, z1, z2, z3, zl0, zl1, zl2, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    i, j, k = row // (M * N), row // N % M, row % N
    a = tl.load(xl + i * xl0 + j * xl1 + k * xl2, mask=keep, other=0.0)
    b = tl.load(yl + i * yl0 + j * yl1 + k * yl2, mask=keep, other=0.0)
    # equal infinities have no difference
    total = tl.maximum(a, b) + tl.log(1.0 + tl.exp(tl.where(a == b, 0.0, -tl.abs(a - b))))
    total = tl.where((a != a) | (b != b), a + b, total)
    base = tl.where(total == -float("inf"), 0.0, total)
    p, q = tl.exp(a - base)[:, None], tl.exp(b - base)[:, None]
    col = tl.arange(0, COLUMNS)
    mask = keep[:, None] & (col < WIDTH)[None, :]
    here = tl.load(x + (i * x0 + j * x1 + k * x2)[:, None] + (col * x3)[None, :], mask=mask, other=0.0)
    other = tl.load(y + (i * y0 + j * y1 + k * y2)[:, None] + (col * y3)[None, :], mask=mask, other=0.0)
    there = z + (i * z0 + j * z1 + k * z2)[:, None] + (col * z3)[None, :]
    if x.dtype.element_ty == tl.float64:
        tl.store(there, here * p + other * q, mask=mask)
    else:
        tl.store(there, narrow(widen(here) * p + widen(other) * q, z.dtype.element_ty), mask=mask)
    tl.store(zl + i * zl0 + j * zl1 + k * zl2, total, mask=keep)


def reference(
    out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes: outputs ``[*lead, S, D]`` of any floats, ``lse`` ``[*lead, S]`` in at least float32."""
    return tuple(merge_in_torch(out, lse, block, block_lse))  # type: ignore[return-value]


def launch(
    out: torch.Tensor,
    lse: torch.Tensor,
    block: torch.Tensor,
    block_lse: torch.Tensor,
    to: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Merges into ``to``, which may be ``(out, lse)``."""
    if not out.numel():
        return
    m, n = (1, 1, *out.shape[:-1])[-2:]
    width, rows = out.shape[-1], out.numel() // out.shape[-1]
    tile = max(1, 2048 // power(width))
    pairs = [(out, lse), (block, block_lse), to]
    strides = [s for x, xl in pairs for s in (*strides4(x), *strides4(xl)[1:])]
    tensors = [x for pair in pairs for x in pair]
    wrap_triton(_merge)[(-(-rows // tile),)](*tensors, rows, m, n, *strides, width, tile, power(width))


def _takes(out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor) -> bool:
    same = lse.dtype == block_lse.dtype and out.shape == block.shape
    wide = {out.dtype, block.dtype, lse.dtype} == {torch.float64}
    known = wide or (out.dtype in FLOATS and block.dtype in FLOATS and lse.dtype == torch.float32)
    return on_gpu(out, lse, block, block_lse) and same and known and 0 < out.dim() and out.shape[-1] <= 8192


@operator("merge")
def merge(
    out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A new pair, in lse's dtype and in ``out``'s order in memory."""
    if not _takes(out, lse, block, block_lse):
        return reference(out, lse, block, block_lse)
    to = _like(out, lse)
    launch(out, lse, block, block_lse, to)
    return to


def _like(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(out, dtype=lse.dtype), torch.empty_like(lse)


@operator("merge_", mutates=("out", "lse"))
def merge_(out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor) -> None:
    """The same, written to ``out`` and ``lse``."""
    if _takes(out, lse, block, block_lse):
        launch(out, lse, block, block_lse, (out, lse))
    else:
        merged, total = reference(out, lse, block, block_lse)
        out.copy_(merged)
        lse.copy_(total)


merge.register_fake(lambda out, lse, block, block_lse: _like(out, lse))
merge_.register_fake(lambda out, lse, block, block_lse: None)
