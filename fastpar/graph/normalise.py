"""``keep_whole``: attention and resampling as one operator each, before AOT takes them apart.

On Dynamo's graph ``F.scaled_dot_product_attention`` and ``F.interpolate`` are
still calls. AOT would make of them a kernel that depends on device and mask, or
index arithmetic; and it refuses the view through which a diagonal is filled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from fastpar.core.errors import CaptureError
from fastpar.graph.flex import is_flex, replace_flex
from fastpar.graph.program import source_line
from fastpar.ops.attention import AttentionCall, attention, attention_adapter
from fastpar.ops.resample import UPSAMPLE_OPS, from_interpolate, from_upsample, resample

aten = torch.ops.aten


def keep_whole(gm: fx.GraphModule) -> list[str]:
    """Replace attention, interpolation and filled diagonals on a Dynamo graph, in place, in all its subgraphs.

    Returns what a report should say about that. Raises :class:`CaptureError` for attention with dropout.
    """
    notes: list[str] = []
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if is_flex(node):
                notes += replace_flex(module, node)
            elif node.op == "call_method" and node.target == "fill_diagonal_":
                _replace_diagonal(node)
            elif node.op == "call_function" and not replace_attention(node, _example_rank):
                _replace_resampling(node)
        module.recompile()
    return list(dict.fromkeys(notes))


def _example(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def _example_rank(node: Any) -> int:
    return _example(node).dim()


def replace_attention(node: fx.Node, rank: Callable[[Any], int]) -> bool:
    """Replace ``node`` by ``fastpar::attention`` if it is a known attention operator; whether it was.

    It stays where it has options without a counterpart, and where its other
    results, such as the log-sum-exp, are used.
    """
    adapter = attention_adapter(node.target)
    if adapter is None:
        return False
    call = adapter(node.args, node.kwargs)
    if call.dropout != 0:
        raise CaptureError(
            f"attention with dropout_p={call.dropout} at {source_line(node)}: fastpar compiles inference "
            "only; call model.eval(), or pass dropout_p=0"
        )
    if call.unsupported is not None or (call.layout != "BHSD" and rank(call.q) != 4):
        return False
    users = list(node.users) if call.result is not None else []
    if any(u.target is not operator.getitem or (u.args[1] != call.result and u.users) for u in users):
        return False
    with node.graph.inserting_before(node):
        new = _emit(node, call)
    if call.result is None:
        node.replace_all_uses_with(new)
    for user in users:
        if user.args[1] == call.result:
            user.replace_all_uses_with(new)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _emit(node: fx.Node, call: AttentionCall) -> fx.Node:
    """Insert the nodes that stand for ``call``; the last one has the strides of the old result."""

    def insert(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = node.graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "example_value", "tensor_meta")}
        if "val" in node.meta:
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            new.meta["val"] = target(*values[0], **values[1])
        return new

    q, k, v = call.q, call.k, call.v
    if call.layout == "BSHD":
        q, k, v = (insert(aten.permute.default, x, [0, 2, 1, 3]) for x in (q, k, v))
    new = insert(attention, q, k, v, call.mask, bool(call.causal), call.scale, bool(call.gqa))
    if call.layout == "BSHD":
        new = insert(aten.permute.default, new, [0, 2, 1, 3])
    value = _example(node)
    value = value[call.result] if call.result is not None and value is not None else value
    if "val" not in node.meta:
        new.meta["example_value"] = value
    elif new.meta["val"].stride() != value.stride():  # a kernel with another layout than ours
        order = sorted(range(value.dim()), key=lambda d: -value.stride(d))  # of dimensions in memory
        moved = order != sorted(order)
        new = insert(aten.permute.default, new, order) if moved else new
        new = insert(aten.clone.default, new, memory_format=torch.contiguous_format)
        new = insert(aten.permute.default, new, [order.index(d) for d in sorted(order)]) if moved else new
    return new


def _replace_resampling(node: fx.Node) -> None:
    new_args: tuple[Any, ...] | None
    if node.target is F.interpolate:
        x = node.args[0] if node.args else node.kwargs["input"]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n if n is x else _number(n))
        kwargs = {("x" if key == "input" else key): value for key, value in kwargs.items()}
        new_args = from_interpolate(*args, **kwargs, spatial=_example_rank(x) - 2)
    else:
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
        if name not in UPSAMPLE_OPS or node.kwargs:
            return
        x = node.args[0]
        args = fx.node.map_arg(node.args, lambda n: n if n is x else _number(n))
        new_args = from_upsample(name, _example(x).shape, *args)
    if new_args is None:
        return
    with node.graph.inserting_before(node):
        new = node.graph.call_function(resample, new_args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _replace_diagonal(node: fx.Node) -> None:
    """``fill_diagonal_`` of a matrix, as masks of perturbed attention have it, as ``masked_fill_``.

    torch writes through ``as_strided``, which AOT does not take for what was written in a part of something else.
    """
    given = {**dict(zip(("x", "fill_value", "wrap"), node.args, strict=False)), **node.kwargs}
    x = given["x"]
    shape, device = _example(x).shape, _example(x).device
    if len(shape) != 2 or given.get("wrap"):  # which begins again below the square
        return
    with node.graph.inserting_before(node):
        rows, columns = (node.graph.call_function(torch.arange, (n,), {"device": device}) for n in shape)
        rows = node.graph.call_method("unsqueeze", (rows, 1))
        diagonal = node.graph.call_function(torch.eq, (rows, columns))
        new = node.graph.call_method("masked_fill_", (x, diagonal, given["fill_value"]))
    for made in (rows, columns, diagonal, new):
        made.meta = {k: v for k, v in node.meta.items() if made is new or k not in ("val", "example_value")}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _number(node: fx.Node) -> Any:
    """A size or scale that Dynamo computed on its graph (shapes are already specialised)."""
    value = _example(node)
    return int(value) if isinstance(value, torch.SymInt) else float(value)
