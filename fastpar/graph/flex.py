"""Flex attention as attention with a mask that ordinary operators compute.

Flex attention (Dong et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
section 3) takes two functions of a score's place: ``mask_mod(b, h, q, k)`` says which scores count, and
``score_mod(score, b, h, q, k)`` changes them. Both are evaluated here over all places, by operators that have rules:
their rows are then split where the queries' are. A ``score_mod`` that scales the score by a number and adds what does
not depend on it is a bias, and the whole is ``fastpar::attention``, which every plan knows how to split. Any other one
is written out as scores, softmax and product.

What is computed is what eager computes: blocks that a block mask leaves out do not count, only its ``mask_mod`` does.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from fastpar.graph.program import source_line
from fastpar.ops.attention import attention

aten = torch.ops.aten

ARGUMENTS = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options",
             "score_mod_other_buffers", "mask_mod_other_buffers")  # fmt: skip
_ONE_BLOCK = 1 << 30  # the block size of the mask that torch makes where none is given


def is_flex(node: fx.Node) -> bool:
    """Whether a node of a Dynamo graph is the operator behind ``flex_attention``."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "flex_attention"


def replace_flex(gm: fx.GraphModule, node: fx.Node) -> list[str]:
    """Make ``node`` of a Dynamo graph a call of :func:`written_out`; what a report should say about it.

    Where its functions cannot be evaluated over all places at once, it stays as it is and the note says why.
    """
    given = dict(zip(ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    where = source_line(node)
    score_mod, mask_mod = [_module(gm, given["score_mod"]), _module(gm, given["block_mask"][-1])]
    more = any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users)
    notes = []
    try:
        values = fx.node.map_arg(given, _value)
        form = _form(score_mod, mask_mod, values, more)
        call = {**values, "score_mod": score_mod, "block_mask": (*values["block_mask"][:-1], mask_mod)}
        with _mode(values["query"]), torch.no_grad():
            written_out(**call, **form)
    except Exception as error:  # functions of the user's: anything may go wrong in them
        reason = " ".join(str(error).split())[:200]
        return [
            f"flex_attention at {where} stays one operator, which runs whole on every rank: its mask_mod and score_mod "
            f"cannot be evaluated over all places at once ({type(error).__name__}: {reason})"
        ]
    if form["slope"] is None:
        notes.append(
            f"flex_attention at {where} is written out as scores, softmax and product, whose keys are gathered: its "
            "score_mod does more than to scale by a number and to add"
        )
    if not form["masked"] and given["block_mask"][-2] != _ONE_BLOCK:
        notes.append(
            f"flex_attention at {where}: its block mask leaves out blocks that its mask_mod does not, and eager "
            "computes those; so do we. Torch's compiled kernel would skip them"
        )
    node.target, node.kwargs = written_out, {**node.kwargs, **form}
    return notes


def written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Any,
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: Any = None,
    score_mod_other_buffers: Sequence[Any] = (),
    mask_mod_other_buffers: Sequence[Any] = (),
    *,
    slope: float | None = 1.0,
    biased: bool = False,
    narrow: bool = False,
    masked: bool = True,
    more: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Flex attention of ``query [B, H, S, E]``, ``key [B or 1, G, T, E]`` and ``value [B or 1, G, T, Ev]``, where G
    divides H: (output ``[B, H, S, Ev]``, log-sum-exp and largest score ``[B, H, S]``, both over ln 2, or None).

    ``slope`` is the number by which ``score_mod`` scales a score before it adds to it, None where it does anything
    else. ``biased``: it adds something, or hides scores; ``narrow``: what it adds has the queries' dtype, and no
    rounding. ``masked``: ``mask_mod`` hides something. ``more``: the other two results are wanted.

    The output has the order of dimensions in memory that ``query`` has. A row that sees no key is 0.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(device, enabled=False):
        (batch, heads, rows), keys = query.shape[:3], key.shape[2]
        key, value = (x.expand(batch, *x.shape[1:]) for x in (key, value))
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        sizes = (batch, heads, rows, keys)

        shown = bias = None
        if masked:
            shown = _everywhere(block_mask[-1], sizes, mask_mod_other_buffers, query.device)
        if biased and slope is not None:
            zero = torch.zeros((), dtype=query.dtype if narrow else wide, device=query.device)
            bias = _everywhere(score_mod, sizes, score_mod_other_buffers, query.device, zero).to(zero.dtype)
        mask = bias if shown is None else shown if bias is None else torch.where(shown, bias, -math.inf)

        out = lse = top = None
        if slope is not None:
            # a bias that does not fit into the queries' dtype is added to scores that are as wide as it is
            dtype = wide if bias is not None and bias.dtype != query.dtype else query.dtype
            q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
            out = attention(q, k, v, mask, False, float(scale * slope), key.shape[1] != heads).to(query.dtype)
        if out is None or more:
            key, value = (_heads(x, heads).to(wide) for x in (key, value))
            scores = query.to(wide) @ key.transpose(-1, -2) * scale
            if slope is None or biased or slope != 1:
                scores = _everywhere(score_mod, sizes, score_mod_other_buffers, query.device, scores).to(wide)
            if shown is not None:
                scores = torch.where(shown, scores, -math.inf)
            if out is None:
                weights = torch._safe_softmax(scores, -1)
                out = weights.to(query.dtype) @ value.to(query.dtype)
            # the rows that see no key are -inf, as the kernels give them
            lse, top = torch.logsumexp(scores, -1) / math.log(2), torch.amax(scores, -1) / math.log(2)
        return _ordered_like(out, query), lse, top


def _everywhere(
    mod: Any, sizes: Sequence[int], buffers: Sequence[Any], device: torch.device, score: torch.Tensor | None = None
) -> torch.Tensor:
    """``mod([score,] b, h, q, k, *buffers)`` for all places: ``[B, H, S, T]``, of which dimensions that do not matter
    to it have size 1. ``score`` is one number for all places, or one for each."""
    every = score is not None and score.dim() > 0
    first = [] if score is None else [score]
    places = list(mod.graph.find_nodes(op="placeholder"))[len(first) : len(first) + 4]
    used = [d for d in range(4) if every or places[d].users]
    index = [torch.arange(n, device=device) if d in used else torch.zeros((), dtype=torch.int64, device=device)
             for d, n in enumerate(sizes)]  # fmt: skip

    def at(*args: Any) -> Any:
        return mod(*args, *buffers)

    evaluate: Callable[..., Any] = at
    for d in reversed(used):
        dims = [0 if every else None] * len(first) + [0 if i == d else None for i in range(4)]
        evaluate = torch.vmap(evaluate, in_dims=tuple(dims))
    with TransformGetItemToIndex():
        out: torch.Tensor = evaluate(*first, *index)
    return out.reshape([n if d in used else 1 for d, n in enumerate(sizes)])


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``x [B, G, T, E]`` with each head as often as there are query heads for it."""
    batch, groups, keys, width = x.shape
    if groups == heads:
        return x
    return x.unsqueeze(2).expand(batch, groups, heads // groups, keys, width).reshape(batch, heads, keys, width)


def _ordered_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` with its dimensions in memory in the order that those of ``like`` have: models view what they get."""
    order = sorted(range(x.dim()), key=lambda d: (-like.stride(d), d))
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


# -- what a call's functions do ------------------------------------------------------------


def _module(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    module: fx.GraphModule = gm.get_submodule(str(node.target))
    return module


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _mode(value: torch.Tensor) -> Any:
    return value.fake_mode if isinstance(value, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)


def _form(score_mod: fx.GraphModule, mask_mod: fx.GraphModule, values: dict[str, Any], more: bool) -> dict[str, Any]:
    query: torch.Tensor = values["query"]
    with _mode(query), TransformGetItemToIndex(), torch.no_grad():
        place = [torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(4)]
        score = torch.zeros((), device=query.device, dtype=torch.promote_types(query.dtype, torch.float32))
        scores = make_fx(score_mod)(score, *place, *values.get("score_mod_other_buffers", ()))
        shown = make_fx(mask_mod)(*place, *values.get("mask_mod_other_buffers", ()))
    reader = _ScoreMod(scores)
    slope = reader.slope(scores.graph.output_node().args[0])
    return {
        "slope": slope,
        "biased": reader.biased,
        "narrow": len(reader.terms) == 1 and reader.terms[0] == query.dtype,
        "masked": not _shows_all(shown),
        "more": more,
    }


_FILLED = {aten.new_ones.default, aten.ones_like.default, aten.new_full.default, aten.full_like.default}


def _shows_all(mask_mod: fx.GraphModule) -> bool:
    """Whether a traced ``mask_mod`` depends on no place and no captured tensor, and is true."""
    depends: set[fx.Node] = set()
    for node in mask_mod.graph.nodes:
        if node.op == "placeholder" or (node.target not in _FILLED and any(n in depends for n in node.all_input_nodes)):
            depends.add(node)
    if mask_mod.graph.output_node() in depends:
        return False
    mask_mod.graph.eliminate_dead_code()
    mask_mod.recompile()
    given = len(mask_mod.graph.find_nodes(op="placeholder"))
    with unset_fake_temporarily(), torch.no_grad():
        return bool(mask_mod(*[torch.zeros((), dtype=torch.int64)] * given))


class _ScoreMod:
    """Reads a traced ``score_mod`` (ATen on numbers) from its result to the score."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.score = next(iter(gm.graph.nodes))
        self.depends = {self.score}
        for node in gm.graph.nodes:
            if any(n in self.depends for n in node.all_input_nodes):
                self.depends.add(node)
        self.biased = False
        self.terms: list[torch.dtype | None] = []  # of what is added; None for numbers

    def slope(self, node: Any) -> float | None:
        """The number by which ``node`` scales the score before it adds to it or hides it; None for anything else."""
        if node is self.score:
            return 1.0
        if node not in self.depends:
            return None
        target, args = node.target, node.args
        if target in (aten.clone.default, aten.alias.default, aten.detach.default):
            return self.slope(args[0])
        if target is aten._to_copy.default and node.meta["val"].dtype in (torch.float32, torch.float64):
            return self.slope(args[0])
        if target is aten.neg.default:
            return _times(self.slope(args[0]), -1.0)
        if target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and not node.kwargs:
            x, by = args
            if target is aten.mul.Tensor and x not in self.depends:
                x, by = by, x
            return _times(self.slope(x), self._number(by), divide=target in (aten.div.Tensor, aten.div.Scalar))
        if target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
            return self._sum(node, -1.0 if target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0)
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and args[1] not in self.depends:
            self.biased = True
            return self.slope(args[0]) if self._number(args[2]) == -math.inf else None
        if target is aten.where.self and args[0] not in self.depends:
            self.biased = True
            found = {self.slope(x) for x in args[1:] if self._number(x) != -math.inf}
            return found.pop() if len(found) == 1 else None
        return None

    def _sum(self, node: fx.Node, sign: float) -> float | None:
        x, y = node.args[:2]
        self.biased = True
        if x in self.depends and y in self.depends:
            return None
        added = y if x in self.depends else x
        self.terms.append(added.meta["val"].dtype if isinstance(added, fx.Node) else None)
        if x in self.depends:
            return self.slope(x)
        return _times(self.slope(y), sign * float(node.kwargs.get("alpha", 1)))  # type: ignore[arg-type]

    def _number(self, value: Any) -> float | None:
        """A number, or the number that a node without inputs is."""
        if not isinstance(value, fx.Node):
            return float(value)
        if value.target in (aten.scalar_tensor.default, aten.full.default):
            return float(value.args[-1])  # type: ignore[arg-type]
        if value.op == "get_attr":
            constant = getattr(self.gm, str(value.target))
            constant = constant.constant if isinstance(constant, FakeTensor) else constant
            return float(constant) if isinstance(constant, torch.Tensor) and constant.numel() == 1 else None
        if value.target in (aten.lift_fresh_copy.default, aten._to_copy.default, aten.clone.default):
            return self._number(value.args[0])
        return None


def _times(slope: float | None, number: float | None, divide: bool = False) -> float | None:
    if slope is None or number is None or number == 0 or not math.isfinite(number):
        return None
    return slope / number if divide else slope * number
