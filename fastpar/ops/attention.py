"""``fastpar::attention``: every attention of a captured graph as one operator.

PyTorch lowers ``F.scaled_dot_product_attention`` to a different ATen operator
for each device, dtype and kind of mask, with different extra outputs. Sharding
rules must not depend on that, so capture replaces all of them, and the
operators of other attention libraries that :data:`ATTENTION_OPS` knows, by this
one operator.

Shapes: ``q [..., S, E]``, ``k [..., T, E]``, ``v [..., T, Ev]``, ``mask``
broadcastable to ``[..., S, T]``, result ``[..., S, Ev]``. The heads are
dimension -3. With ``gqa``, k and v may have fewer heads, which divide those of q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool causal=False, "
    "float? scale=None, bool gqa=False) -> Tensor",
    # The order of dimensions in memory of q, k and v decides which kernel runs and so the
    # last bits of the result: Inductor must hand over what the traced graph had.
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
)


def output_shape(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], mask: Sequence[int] | None, gqa: bool
) -> list[int]:
    """Shape ``[..., S, Ev]`` of the result for these argument shapes.

    Leading dimensions broadcast as in a matrix product; with ``gqa`` the heads are q's.
    Raises ``RuntimeError`` (as eager does) when they do not fit.
    """
    if min(len(q), len(k), len(v)) < 2:
        raise RuntimeError(f"attention needs at least 2 dimensions: q {q}, k {k}, v {v}")
    lead_q, lead_k, lead_v = list(q[:-2]), list(k[:-2]), list(v[:-2])
    if gqa and lead_q and lead_k and lead_v:
        lead_k[-1] = lead_v[-1] = lead_q[-1]
    # A mask never adds or widens leading dimensions: SDPA expands it to the scores.
    return [*torch.broadcast_shapes(lead_q, lead_k, lead_v), q[-2], v[-1]]


def empty_output(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory in the layout that the operator promises for ``shape``."""
    if len(shape) == 4:  # tokens before heads: what the flash kernels write and models read next
        b, h, s, d = shape
        return like.new_empty([b, s, h, d]).transpose(1, 2)
    return like.new_empty(shape)


def in_order(out: torch.Tensor) -> torch.Tensor:
    """``out`` in the layout of ``empty_output``."""
    if out.dim() == 4:
        # Models make q by transposing heads and tokens, fused kernels copy q's layout: then this is free.
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
) -> torch.Tensor:
    shape = output_shape(q.shape, k.shape, v.shape, mask.shape if mask is not None else None, gqa)
    if 0 in shape or k.shape[-2] == 0 or q.shape[-1] == 0:
        # The fused kernels divide by sizes; no keys means no terms in the sum, hence zero.
        return empty_output(shape, q).zero_()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return in_order(out)


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    gqa: bool = False,
) -> torch.Tensor:
    return empty_output(output_shape(q.shape, k.shape, v.shape, None, gqa), q)


_LIB.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::attention", _attention_fake, lib=_LIB)

attention = torch.ops.fastpar.attention.default


def _autocast(device: str, key: str) -> Callable[..., torch.Tensor]:
    """What autocast does to SDPA: float tensors, except float64, are cast to its dtype."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        low = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if low else value

    def attention_autocast(*args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            args = tuple(cast(a, dtype) for a in args)
            return attention(*args, **{name: cast(a, dtype) for name, a in kwargs.items()})

    return attention_autocast


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _LIB.impl("attention", _autocast(_device, _key), _key)


@register_flop_formula(torch.ops.fastpar.attention)
def attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products per score; like torch's own formulas, masks and causality save nothing."""
    *lead, s, ev = out_shape if out_shape is not None else output_shape(q, k, v, None, _gqa(args, kwargs))
    return 2 * math.prod(lead) * s * k[-2] * (q[-1] + ev)


def _gqa(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("gqa", args[3] if len(args) > 3 else False))


@dataclass(frozen=True)
class AttentionCall:
    """One call of some attention operator, named in ``fastpar::attention``'s terms.

    ``layout`` is the order of dimensions of q, k, v and of the result: ``BHSD``
    or ``BSHD`` (which is transposed on the way in and out). ``result`` is the
    index of the attention's output among the operator's results, None where it
    returns a tensor. ``unsupported`` says why this call cannot be normalised.
    """

    q: Any
    k: Any
    v: Any
    mask: Any = None
    causal: Any = False
    scale: Any = None
    gqa: Any = False
    dropout: Any = 0.0
    layout: str = "BHSD"
    result: int | None = None
    unsupported: str | None = None


Adapter = Callable[[Sequence[Any], Mapping[str, Any]], AttentionCall]


def _adapter(
    names: str,
    *,
    layout: str = "BHSD",
    result: int | None = None,
    gqa: bool | None = None,
    neutral: Mapping[str, Any] | None = None,
) -> Adapter:
    """An adapter for an operator whose positional parameters are ``names``, in order.

    Parameters called q, k, v, mask, causal, scale, gqa and dropout mean what they mean here.
    ``neutral`` gives, for others that change the result, the value at which they do not.
    """
    order = names.split()
    known = {"q", "k", "v", "mask", "causal", "scale", "gqa", "dropout"}

    def adapt(args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionCall:
        given = dict(zip(order, args, strict=False))
        for key, value in kwargs.items():
            given[_ALIASES.get(key, key)] = value
        why = None
        for key, value in (neutral or {}).items():
            if key in given and given[key] != value:
                why = f"{key}={given[key]!r} has no counterpart"
        fields = {key: value for key, value in given.items() if key in known}
        if gqa is not None:
            fields.setdefault("gqa", gqa)
        return AttentionCall(**fields, layout=layout, result=result, unsupported=why)

    return adapt


_ALIASES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "attn_mask": "mask",
    "attn_bias": "mask",
    "is_causal": "causal",
    "enable_gqa": "gqa",
    "dropout_p": "dropout",
    "softmax_scale": "scale",
}

_SDPA = _adapter("q k v mask dropout causal scale gqa")
_FLASH_NEUTRAL = {
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "attention_chunk": 0,
    "softcap": 0.0,
}

ATTENTION_OPS: dict[str, Adapter] = {
    # The Python function, by the name it has on a Dynamo graph, and the operators it becomes.
    "torch._C._nn.scaled_dot_product_attention": _SDPA,
    "aten.scaled_dot_product_attention": _SDPA,
    "aten._scaled_dot_product_attention_math": _adapter(
        "q k v mask dropout causal dropout_mask", result=0, neutral={"dropout_mask": None}
    ),
    "aten._scaled_dot_product_flash_attention_for_cpu": _adapter("q k v dropout causal", result=0, gqa=True),
    "aten._scaled_dot_product_flash_attention": _adapter("q k v dropout causal return_debug_mask", result=0, gqa=True),
    "aten._scaled_dot_product_efficient_attention": _adapter("q k v mask compute_log_sumexp dropout causal", result=0),
    "aten._scaled_dot_product_cudnn_attention": _adapter(
        "q k v mask compute_log_sumexp dropout causal return_debug_mask", result=0, gqa=True
    ),
    "aten._scaled_dot_product_fused_attention_overrideable": _adapter(
        "q k v mask dropout causal return_debug_mask", result=0, gqa=True
    ),
    # Attention libraries behind diffusers' attention_dispatch. Add one line per operator.
    "_diffusers_flash_attn_3._flash_attn_forward": _adapter(
        "q k v scale causal qv q_descale k_descale v_descale attention_chunk softcap",
        layout="BSHD",
        result=0,
        gqa=True,
        neutral=_FLASH_NEUTRAL,
    ),
}
"""Known attention operators: name (namespace.operator, without overload) -> adapter.

Operators that are not in the table stay in the graph as they are.
"""


def attention_adapter(target: Any) -> Adapter | None:
    """The adapter for an fx ``call_function`` target, or None when it is no known attention."""
    if isinstance(target, torch._ops.OpOverload):
        return ATTENTION_OPS.get(f"{target.namespace}.{target._schema.name.split('::')[-1]}")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return ATTENTION_OPS.get(target._qualified_op_name.replace("::", "."))
    if target is F.scaled_dot_product_attention:
        return _SDPA
    return None
