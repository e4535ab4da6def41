"""Operators that are written out in simpler ones where their rows are split.

Whole, each stays the one operator that it is. Split, its rule could only gather; written
out, every part has a rule: a mean is a sum (partial over ranks) times a number, a padded
convolution is a pad and a convolution over windows, group norm is its moments, a causal
attention is one with its mask. One function per operator, in plain torch, traced and put in
its place; the walk then goes over the new operators like over any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fastpar.core.inherit import inherited
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.moments import normalised
from fastpar.rules import Call, has_rule, rule_for
from fastpar.rules.spatial import CONVOLUTION, GroupNormRule, contracts, pad_arguments, padded
from fastpar.sharding import expand_reduce, expand_resample, expand_rows, expand_spatial

Written = Callable[..., Any]  # takes the operator's own arguments
aten = torch.ops.aten


def expansion(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """What to write instead of ``call`` when its operands come as ``layouts``; None: the operator itself."""
    if all(x.is_whole for x in layouts):
        return None
    if call.name in _TABLE:
        return _TABLE[call.name](call, layouts, mesh)
    return None if has_rule(call) else _as_torch_does(call)


Key = tuple[Any, ...]


def traced(
    call: Call, written: Written, layouts: Sequence[Layout], mesh: Mesh, known: dict[Key, fx.Graph] | None = None
) -> fx.Graph:
    """``written`` as a graph with one placeholder per tensor operand, values in ``meta``.

    Tracing takes longer than all else that is done for an operator, and a model has the same norm at the same size
    many times; ``known`` keeps what has been traced. The graph is the caller's own in any case.
    """
    key = _key(call, layouts, mesh)
    if known is None or key not in known:
        made = _trace(call, written)
        if known is not None:
            known[key] = made
    else:
        made = known[key]
    graph = fx.Graph()
    graph.output(graph.graph_copy(made, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta.update(inherited(call.node.meta))
    return graph


def _key(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Key:
    """All that a function of the table below may look at: the call, but not its place in the graph."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
    operands = set(call.operands)
    tensor = [isinstance(x, fx.Node) and x in operands for x in leaves]
    # by type and text: 1 is not 1.0 is not True
    given = tuple("" if t else f"{type(x).__name__} {x!r}" for t, x in zip(tensor, leaves, strict=True))
    values = [n.meta["val"] for n in call.operands]
    values += [v for v in pytree.tree_leaves(call.node.meta["val"]) if isinstance(v, torch.Tensor)]
    kinds = tuple((v.shape, v.stride(), v.dtype, v.device) for v in values)
    return call.node.target, repr(spec), given, kinds, tuple(layouts), mesh, call.tail


def _trace(call: Call, written: Written) -> fx.Graph:
    values = [n.meta["val"] for n in call.operands]
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
    operands = set(call.operands)

    def run(*xs: torch.Tensor) -> Any:
        queue = iter(xs)
        given = [next(queue) if isinstance(x, fx.Node) and x in operands else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(given, spec)
        found = written(*args, **kwargs)
        return tuple(found) if isinstance(found, tuple) else found  # no type of torch's own, which would be a call

    with values[0].fake_mode:
        return make_fx(run)(*values).graph


def _as_torch_does(call: Call) -> Written | None:
    """Torch's own decomposition, where it leads to operators that have rules and writes into nothing."""
    written: Written | None = decomposition_table.get(call.node.target)  # type: ignore[call-overload]
    if written is None:
        return None
    try:
        graph = _trace(call, written)
    except Exception:  # it need not take all that the operator does; then this one stays whole, and the report says so
        return None
    inside = [Call.of(n) for n in graph.nodes if n.op == "call_function" and n.target is not getitem]
    if any(c.node.target is call.node.target for c in inside):
        return None
    return written if all(_has_functional_rule(c) or _as_torch_does(c) is not None for c in inside) else None


def _has_functional_rule(call: Call) -> bool:
    schema = getattr(call.node.target, "_schema", None)
    return has_rule(call) and schema is not None and not schema.is_mutable


def _convolution(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    if call.arg(6, "transposed"):
        return expand_spatial.transposed(call, layouts, mesh)
    layout = layouts[0].summed()
    pads = CONVOLUTION.padding(call, layout)
    if any(padded(d, n, n) is None for d, n in zip(layout.dims, pads, strict=True)):
        pads = [0] * len(pads)
    channels = layout.dims[1], layouts[1].dims[1]
    summed = contracts(call) and len(layouts) > 2 and not all(d.is_whole for d in channels)
    if not any(pads) and not summed:
        return None

    def written(x: torch.Tensor, w: torch.Tensor, b: Any, stride: Any, padding: Any, *rest: Any) -> torch.Tensor:
        if summed:  # the bias is added once, to the whole sum
            out = written_padded(x, w, None, stride, padding, *rest)
            return out + b.reshape([1, -1] + [1] * (x.dim() - 2))
        return written_padded(x, w, b, stride, padding, *rest)

    def written_padded(x: torch.Tensor, w: torch.Tensor, b: Any, stride: Any, padding: Any, *rest: Any) -> torch.Tensor:
        if not any(pads):
            return aten.convolution.default(x, w, b, stride, padding, *rest)
        padding = list(padding) * (len(pads) - 2) if len(padding) == 1 else list(padding)
        left = [0 if done else p for p, done in zip(padding, pads[2:], strict=True)]
        x = aten.constant_pad_nd.default(x, pad_arguments(pads), 0)
        return aten.convolution.default(x, w, b, stride, left, *rest)

    return written


def _group_norm(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    rule = rule_for(call)
    assert isinstance(rule, GroupNormRule)
    if all(d.is_whole for d in layouts[0].dims[1:]) or rule.groups(call, layouts[0], mesh) is not None:
        return _in_order(call, layouts[0], mesh)

    def written(
        x: torch.Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
    ) -> tuple[torch.Tensor, ...]:
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        y = x.to(wide).reshape(n, groups, c // groups, *x.shape[2:])
        y, mean, rstd = normalised(y, list(range(2, y.dim())), c // groups * hw, eps)
        y = y.reshape(x.shape)
        shape = [1, c] + [1] * (x.dim() - 2)
        if weight is not None:
            y = y * weight.to(wide).reshape(shape)
        if bias is not None:
            y = y + bias.to(wide).reshape(shape)
        return y.to(x.dtype), mean.reshape(n, groups), rstd.reshape(n, groups)

    return written


def _in_order(call: Call, layout: Layout, mesh: Mesh) -> Written | None:
    """The kernel insists on a contiguous operand. Where a rank has a single row of some dimension, operators before it
    may choose another order in memory than they do for the whole value."""
    alone = any(not dim.is_whole and min(dim.local(mesh, r) for r in range(mesh.ranks)) <= 1 for dim in layout.dims)
    before = call.operands[0]
    if not alone or (
        before.target is aten.clone.default and before.kwargs.get("memory_format") is torch.contiguous_format
    ):
        return None

    def written(x: torch.Tensor, *rest: Any) -> Any:
        return aten.native_group_norm.default(aten.clone.default(x, memory_format=torch.contiguous_format), *rest)

    return written


def _addmm(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    if layouts[1].dims[-1].is_whole and layouts[2].dims[-2].is_whole:
        return None

    def written(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
        product = aten.mm.default(a, b)
        product = product if alpha == 1 else product * alpha
        return product + (bias if beta == 1 else bias * beta)

    return written


def _causal(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Rows of a causal attention are no longer where the kernel would think.

    The mask is ``arange(S)[:, None] >= arange(T)``, of which each rank makes the rows that it
    ends up with: cuts move up (``cut_early``), and where all rows come back (Ulysses) there is none.
    """
    if not call.arg(4, "causal", False):
        return None
    split = rule_for(call).decide(call, tuple(layouts), mesh).outputs[0].dims[-2]
    rows, keys = call.shapes[0][-2], call.shapes[1][-2]
    if split.is_whole:
        return None

    def written(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any = None, causal: bool = True,
                scale: Any = None, gqa: bool = False) -> torch.Tensor:  # fmt: skip
        mask = torch.arange(rows, device=q.device).view(rows, 1) >= torch.arange(keys, device=q.device)
        return torch.ops.fastpar.attention.default(q, k, v, mask, False, scale, gqa)

    return written


_TABLE: dict[str, Callable[[Call, Sequence[Layout], Mesh], Written | None]] = {
    **expand_reduce.TABLE,
    **expand_resample.TABLE,
    **expand_rows.TABLE,
    **expand_spatial.TABLE,
    "aten::convolution": _convolution,
    "aten::native_group_norm": _group_norm,
    "aten::addmm": _addmm,
    "fastpar::attention": _causal,
}
