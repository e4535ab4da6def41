"""Blocks that act along the tokens: over all of them, in their order, by number, and as a picture.

``BLOCKS`` has these too once this is imported, behind those of ``tests/blocks.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.blocks import BLOCKS, NO_YES, PICK, State, attend, divisors, into, merge_heads, picked

__all__ = ["BLOCKS"]


@into(BLOCKS, weight=2, how=("mean", "sum", "amax", "all", "frames", "softmax", "var", "amin"), pick=PICK)
def reduce_tokens(s: State, how: str = "mean", pick: int = 0) -> None:
    """Something over all tokens, fed back by broadcast (squeeze and excite, global context)."""
    b, n, c = s.x.shape
    if how == "mean":
        r = s.linear(s.x.mean(1), c).sigmoid()[:, None]
    elif how == "sum":
        r = torch.tanh(s.x.sum(1, keepdim=True) / n)
    elif how in ("amax", "amin"):
        r = torch.tanh((s.x.amax if how == "amax" else s.x.amin)(1, keepdim=True))
    elif how == "all":
        r = s.x.abs().mean() + s.x.mean((1, 2), keepdim=True)
    elif how == "frames":
        f = picked(divisors(n), pick)
        r = s.x.view(b, f, n // f, c).mean(2, keepdim=True).expand(b, f, n // f, c).reshape(b, n, c)
    elif how == "softmax":
        r = (s.linear(s.x, 1).softmax(1) * s.x).sum(1, keepdim=True)
    else:
        r = s.x.var(1, keepdim=True, correction=0)
    s.x = s.x + 0.5 * r


@into(BLOCKS, how=("cumsum", "both", "logcumsumexp"))
def scan(s: State, how: str = "cumsum") -> None:
    """Along the tokens, forward or both ways (state space layers)."""
    n = s.x.shape[1]
    if how == "logcumsumexp":
        s.x = s.x + 0.1 * torch.logcumsumexp(s.x, 1)
        return
    total = s.x.cumsum(1)
    if how == "both":
        total = total + s.x.flip(1).cumsum(1).flip(1)
    s.x = s.x + total / n


@into(BLOCKS, weight=2, how=("tile", "interleave", "expand", "tile_cut", "interleave_cut"), pick=PICK,
       attention=NO_YES)  # fmt: skip
def repeated(s: State, how: str = "tile", pick: int = 0, attention: bool = False) -> None:
    """Copies of the tokens as a product of dimensions, cut or averaged again."""
    b, n, c = s.x.shape
    r = 2 + pick % 2
    if how.startswith("tile"):
        y = s.x.repeat(1, r, 1)
    elif how.startswith("interleave"):
        y = s.x[:, :, None].expand(b, n, r, c).reshape(b, n * r, c)
    else:
        y = s.x[:, None].expand(b, r, n, c).reshape(b, r * n, c)
    y = s.linear(y + s.make.user(r * n, c), c)
    if attention:
        q, k, v = (s.split_heads(s.linear(y, c)) for _ in range(3))
        y = y + merge_heads(attend(q, k, v))
    if how.endswith("cut"):
        at = pick % (r * n - n + 1)
        s.x = s.x + y[:, at : at + n]
    elif how == "interleave":
        s.x = s.x + y.view(b, n, r, c).mean(2)
    else:
        s.x = s.x + y.view(b, r, n, c).sum(1)


@into(BLOCKS, pick=PICK, mix=("rows", "columns", "frames"))
def merge_tokens(s: State, pick: int = 0, mix: str = "rows") -> None:
    """Several tokens as one row of more channels, mixed, and back (pixel unshuffle, token merging)."""
    b, n, c = s.x.shape
    k = picked(divisors(n), pick + 1)
    if mix == "rows":
        s.x = s.x + s.linear(s.x.reshape(b, n // k, k * c), k * c).reshape(b, n, c)
    elif mix == "columns":
        y = s.x.view(b, k, n // k, c).permute(0, 2, 1, 3).reshape(b, n // k, k * c)
        s.x = s.x + s.linear(y, k * c).view(b, n // k, k, c).permute(0, 2, 1, 3).reshape(b, n, c)
    else:
        y = s.x.view(b, k, n // k, c).permute(1, 0, 2, 3).reshape(k * b * (n // k), c)
        s.x = s.x + s.linear(y, c).view(k, b, n // k, c).permute(1, 0, 2, 3).reshape(b, n, c)


@into(BLOCKS, weight=2, how=("rows", "select", "gather", "order", "put", "masked", "few", "two", "copy", "add",
                             "scatter", "largest"))
def lookup(s: State, how: str = "rows") -> None:
    """Rows by index: of a table, of the tokens themselves, written into them."""
    b, n, c = s.x.shape
    if how == "rows":
        s.x = s.x + s.make.weight(9, c)[s.make.index((n,), 9)]
    elif how == "select":
        s.x = s.x + s.x.index_select(1, s.make.index((n,), n))
    elif how == "gather":
        s.x = s.x + s.x.gather(1, s.make.index((b, n, 1), n).expand(b, n, c))
    elif how == "order":
        s.x = s.x[:, torch.arange(n - 1, -1, -1)] * 0.5 + s.x
    elif how == "few":
        s.x = torch.cat([s.x, s.linear(s.x[:, s.make.index((2,), n)], c)], 1)
    elif how == "two":
        s.x = s.x * (1 + 0.1 * s.x[torch.arange(b), s.make.index((b,), n)][:, None])
    elif how == "copy":
        s.x = s.x.index_copy(1, s.make.index((1,), n), s.linear(s.t[:, :1], c))
    elif how == "add":
        s.x = s.x.index_add(1, s.make.index((s.t.shape[1],), n), s.t)
    elif how in ("scatter", "largest"):
        to = s.make.index((b, 1, c), n)
        s.x = s.x.scatter_add(1, to, s.t[:, :1]) if how == "scatter" else s.x.scatter_reduce(1, to, s.t[:, :1], "amax")
    elif how == "masked":
        s.x = torch.ops.aten.index_put(s.x, [s.make.flags(b, n)], s.make.user(c))
    else:
        s.x = torch.ops.aten.index_put(s.x, [None, s.make.index((1,), n)], s.make.user(b, 1, c))


@into(BLOCKS, weight=2, how=("sort", "cumprod", "loop", "triangle", "hardswish"))
def all_tokens(s: State, how: str = "sort") -> None:
    """What needs all tokens at once or one after the other, and operators that are written out as torch does."""
    b, n, c = s.x.shape
    if how == "sort":
        y = s.x.sort(1).values
    elif how == "cumprod":
        y = (1 + 0.1 * s.x.tanh()).cumprod(1)
    elif how == "loop":
        x, state, rows = s.split_heads(s.x), torch.zeros_like(s.split_heads(s.x)[:, :, 0]), []
        for i in range(n):
            state = 0.5 * state + x[:, :, i]
            rows.append(state)
        y = torch.stack(rows, 2).transpose(1, 2).flatten(2)
    elif how == "triangle":
        y = s.x.tril(-1) + s.x.mT.triu(1).mT
    else:
        y = F.hardswish(s.x) * F.logsigmoid(s.x)
    s.x = s.x + y


@into(BLOCKS, how=("first", "replace", "drop", "stride", "roll", "pad", "swap", "every"), pick=PICK)
def move_tokens(s: State, how: str = "first", pick: int = 0) -> None:
    """Rows taken out, put back, dropped, shifted."""
    b, n, c = s.x.shape
    at = pick % n
    if how == "first":
        s.x = s.x + s.x[:, at][:, None]
    elif how == "replace":  # as in-place writes come out of functionalisation
        s.x = torch.slice_scatter(s.x, s.make.user(b, n - at, c), 1, at, n)
    elif how == "drop":
        s.x = s.x[:, at:]
    elif how == "stride":
        s.x = s.x[:, at % 2 :: 2] if n > 1 else s.x
    elif how == "roll":
        s.x = s.x + s.x.roll(at, 1)
    elif how == "pad":
        s.x = s.x + F.pad(s.x, (0, 0, 1, 2))[:, 2 : 2 + n]
    elif how == "swap":
        s.x = torch.cat([s.x[:, at:], s.x[:, :at]], 1)
    else:
        a, b_ = s.x[:, 0::2], s.x[:, 1::2]
        s.x = torch.cat([b_, a, s.linear(b_, c)], 1)


@into(BLOCKS, pick=PICK, how=("depthwise", "full", "line", "pool", "up", "down", "transposed", "wide",
                                   "largest", "mirrored", "between", "averages"))
def spatial(s: State, pick: int = 0, how: str = "depthwise") -> None:
    """The tokens as a picture [B, C, h, w], through a window, and back."""
    b, n, c = s.x.shape
    h = picked(divisors(n), pick)
    x = s.x.transpose(1, 2)
    if how == "line":
        y = F.conv1d(x, s.make.weight(c, c, 3), padding=1)
    else:
        x = x.reshape(b, c, h, n // h)
        if how == "depthwise":
            y = F.conv2d(x, s.make.weight(c, 1, 3, 3), s.make.weight(c), padding=1, groups=c)
        elif how == "full":
            y = F.conv2d(x, s.make.weight(c, c, 3, 3), padding=1)
        elif how == "wide":
            y = F.conv2d(x, s.make.weight(c, c, 5, 1), s.make.weight(c), padding=(4, 0), dilation=(2, 1))
        elif how == "pool":
            y = F.avg_pool2d(x, 3, stride=1, padding=1)
        elif how == "largest":
            y = F.max_pool2d(x, 3, 1, 1)
        elif how == "mirrored":
            y = F.pad(x, (0, 0, 1, 1), mode="reflect" if h > 1 else "replicate")
            y = F.conv2d(y, s.make.weight(c, 1, 3, 1), groups=c)
        elif how == "between":
            y = torch.ops.fastpar.resample(x, [2 * h + 1, n // h], None, "bilinear", False, False)
            y = torch.ops.fastpar.resample(y, [h, n // h], None, "bicubic", True, False)
        elif how == "averages":
            y = F.avg_pool2d(x, (2, 1), (2, 1), ceil_mode=True)
            y = F.adaptive_avg_pool2d(y, (h, n // h))
        elif how == "down":
            y = F.conv2d(x, s.make.weight(c, c, 3, 3), s.make.weight(c), stride=2, padding=1)
            y = torch.ops.fastpar.resample(y, [h, n // h], None, "nearest", None, False)
        elif how == "transposed":
            y = F.conv_transpose2d(x, s.make.weight(c, c, 2, 2), stride=2).view(b, c, h, 2, n // h, 2).amax((3, 5))
        else:
            y = torch.ops.fastpar.resample(x, [2 * h, 2 * (n // h)], None, "nearest", None, False)
            y = y.view(b, c, h, 2, n // h, 2).mean((3, 5))
        y = y.flatten(2)
    s.x = s.x + y.transpose(1, 2)
