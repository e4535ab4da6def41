"""Blockwise attention: ``attention_lse`` (output and logsumexp of one block of keys) and ``merge``.

The softmax over all keys is the merge of softmaxes over blocks of keys, weighted by their
sums of exponentials (online softmax). A block's output is in q's dtype and in the order in memory of ``attention``'s,
as the fused kernels write it; ``lse`` is ``[*lead, S]`` in at least float32, and so is what is merged. A row to
which a block shows no key has lse -inf, decided from the mask and not by the kernel (the CPU
flash kernel returns 0 for such a row), so the block weighs nothing; a row that no block shows
a key stays 0, as eager gives it.

In a sharded program the block's keys may still be split ``over`` mesh axes (dotted names). It then means: as if
every rank had its group's keys, of a mask with the columns of all keys, merged; ``attention-ring`` gives it a schedule.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import register_flop_formula

from fastpar.ops.attention import empty_output, in_order

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_LIB.define(
    "attention_lse(Tensor q, Tensor k, Tensor v, Tensor? mask=None, float? scale=None, bool gqa=False, "
    "str over='') -> (Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define("merge(Tensor out, Tensor lse, Tensor block, Tensor block_lse) -> (Tensor, Tensor)", tags=_TAGS)
_LIB.define("redistribute_all(Tensor[] xs, str[] srcs, str[] dsts) -> Tensor[]", tags=_TAGS[1:])


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What sums of scores are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    gqa: bool = False,
    over: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, wide = q.shape[:-1], accumulated(q.dtype)
    if gqa and q.dim() > 2 and k.shape[-3] != q.shape[-3] and k.shape[-3]:
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    if 0 in shape or k.shape[-2] == 0:
        empty = q.new_full(shape, -math.inf, dtype=wide)
        return _block_output(q, v, over).zero_(), empty
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    out, lse = _kernel(q, k, v, bias, scale)
    if mask is not None:
        shown = mask if mask.dtype == torch.bool else mask > -math.inf
        blind = ~shown.any(-1).broadcast_to(shape)
        lse = lse.masked_fill(blind, -math.inf)
        out = out.masked_fill(blind[..., None], 0.0)
    return in_order(out.to(wide if over else q.dtype)), lse.to(wide).contiguous()


def _kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused kernel that returns a logsumexp for these operands, else the products written out."""
    aten = torch.ops.aten
    # Called directly, a fused kernel takes the last dimension for dense, and the CPU's does not look. Queries of an
    # image are often transposed: channels are its second dimension.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    same = q.shape[-1] == v.shape[-1] and q.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if same and q.device.type == "cpu" and q.shape[-1] > 0:
        if bias is not None:
            bias = bias.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if same and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        if bias is None and torch._fused_sdp_choice(q, k, v, scale=scale) == SDPBackend.CUDNN_ATTENTION.value:
            return _cudnn(q, k, v, scale)
        if bias is None and q.shape[-1] <= 256:
            out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
            return out[0], out[1][..., : q.shape[-2]]
        if bias is None or k.shape[-2] % 8 == 0:
            if bias is not None:
                bias = bias.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
            out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)
            return out[0], out[1][..., : q.shape[-2]]
    wide = accumulated(q.dtype)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if bias is not None:
        scores = scores + bias.to(wide)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return weights @ v.to(wide), lse


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's kernel, which torch prefers on Hopper and Blackwell: a block takes what the whole attention would take.
    Its logsumexp has a last dimension of one."""
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    return out[0], out[1].reshape(q.shape[:-1])


def _merge(
    out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.logaddexp(lse, block_lse)
    # where neither has a key, -inf minus -inf: nothing is weighed
    base = total.masked_fill(total == -math.inf, 0.0)
    return (
        out * (lse - base).exp()[..., None] + block * (block_lse - base).exp()[..., None],
        total,
    )


def _attention_lse_fake(
    q: Any, k: Any, v: Any, mask: Any = None, scale: Any = None, gqa: bool = False, over: str = ""
) -> Any:
    return _block_output(q, v, over), q.new_empty(q.shape[:-1], dtype=accumulated(q.dtype))


def _block_output(q: Any, v: Any, over: str) -> Any:
    """Uninitialised memory for the output of one block, or of several that are merged."""
    dtype = accumulated(q.dtype) if over else q.dtype
    return empty_output((*q.shape[:-1], v.shape[-1]), q.new_empty(0, dtype=dtype))


_LIB.impl("attention_lse", _attention_lse, "CompositeExplicitAutograd")
_LIB.impl("merge", _merge, "CompositeExplicitAutograd")
_LIB.impl("redistribute_all", lambda xs, a, b: [x.clone() for x in xs], "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::attention_lse", _attention_lse_fake, lib=_LIB)
torch.library.register_fake(
    "fastpar::merge",
    lambda out, lse, block, block_lse: (torch.empty_like(out, dtype=lse.dtype), torch.empty_like(lse)),
    lib=_LIB,
)
torch.library.register_fake(
    "fastpar::redistribute_all", lambda xs, a, b: [torch.empty_like(x) for x in xs], lib=_LIB
)

attention_lse = torch.ops.fastpar.attention_lse.default
merge = torch.ops.fastpar.merge.default
redistribute_all = torch.ops.fastpar.redistribute_all.default


@register_flop_formula(torch.ops.fastpar.attention_lse)
def attention_lse_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """As attention's: two products per score."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
