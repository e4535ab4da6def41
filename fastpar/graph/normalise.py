"""Rewrites before and after AOT: one attention operator, whole resampling, nothing that does nothing.

Before (:func:`keep_whole`), on Dynamo's graph, ``F.scaled_dot_product_attention``
and ``F.interpolate`` are still calls; AOT would take them apart. After
(:func:`tidy`), attention operators that only appeared inside AOT are replaced
and operators that only rename a value are removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from fastpar.core.errors import CaptureError
from fastpar.graph.program import source_line
from fastpar.ops.attention import AttentionCall, attention, attention_adapter
from fastpar.ops.resample import from_interpolate, resample

aten = torch.ops.aten


def keep_whole(gm: fx.GraphModule) -> None:
    """Replace attention and interpolation on a Dynamo graph, in place, in all its subgraphs.

    Raises :class:`CaptureError` for attention with dropout.
    """
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op == "call_function" and not _replace_attention(node, _example_rank):
                _replace_interpolate(node)
        module.recompile()


def _example(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def _example_rank(node: Any) -> int:
    return _example(node).dim()


def _replace_attention(node: fx.Node, rank: Callable[[Any], int]) -> bool:
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
    graph, meta = node.graph, dict(node.meta)
    with graph.inserting_before(node):
        new, value = _emit(graph, call, _example(node), meta)
    if call.result is None:
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return True
    users = list(node.users)
    if any(u.target is not operator.getitem or (u.args[1] != call.result and u.users) for u in users):
        graph.erase_node(new)  # the log-sum-exp is used as well: keep the operator
        return False
    for user in users:
        if user.args[1] == call.result:
            user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def _emit(graph: fx.Graph, call: AttentionCall, value: Any, meta: dict[str, Any]) -> tuple[fx.Node, Any]:
    """Insert ``fastpar::attention`` for ``call`` with the metadata of the node that it replaces."""
    if call.result is not None and isinstance(value, (list, tuple)):
        value = value[call.result]
    key = "val" if "val" in meta else "example_value"
    qkv = [call.q, call.k, call.v]
    if call.layout == "BSHD":
        qkv = [_permuted(graph, x, key, meta) for x in qkv]
    args = (*qkv, call.mask, bool(call.causal), call.scale, bool(call.gqa))
    new = graph.call_function(attention, args)
    new.meta = {k: v for k, v in meta.items() if k not in ("val", "example_value", "tensor_meta")}
    if call.layout == "BSHD":
        value = value.permute(0, 2, 1, 3) if value is not None else None
        new.meta[key] = value
        return _permuted(graph, new, key, meta), value
    new.meta[key] = value
    return new, value


def _permuted(graph: fx.Graph, x: fx.Node, key: str, meta: dict[str, Any]) -> fx.Node:
    new = graph.call_function(aten.permute.default, (x, [0, 2, 1, 3]))
    new.meta = {k: v for k, v in meta.items() if k not in ("val", "example_value", "tensor_meta")}
    value = x.meta.get(key)
    if value is not None:
        new.meta[key] = value.permute(0, 2, 1, 3)
    return new


def _replace_interpolate(node: fx.Node) -> bool:
    if node.target is not F.interpolate:
        return False
    x = node.args[0] if node.args else node.kwargs["input"]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n if n is x else _number(n))
    kwargs = {("x" if key == "input" else key): value for key, value in kwargs.items()}
    spatial = _example_rank(x) - 2
    with node.graph.inserting_before(node):
        new = node.graph.call_function(resample, from_interpolate(*args, **kwargs, spatial=spatial))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _number(node: fx.Node) -> Any:
    """A size or scale that Dynamo computed on its graph (shapes are already specialised)."""
    value = _example(node)
    return int(value) if isinstance(value, torch.SymInt) else float(value)


_ALIASES = {aten.detach.default, aten.alias.default, aten.lift.default, aten.lift_fresh.default}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default}
_VIEWS = {aten.view.default, aten.expand.default, aten.slice.Tensor, aten.permute.default}


def tidy(gm: fx.GraphModule) -> None:
    """Remove, in place, what does nothing on a functional ATen graph, and dead nodes.

    These are aliases, copies that change neither dtype nor memory layout, views,
    expansions and permutations to the same, slices of everything, and slices
    that give back a piece of a concatenation. Strides stay what ``meta["val"]``
    says, and results that are new tensors stay new. Linear in the number of nodes.
    """
    escaping = _escaping(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or _replace_attention(node, lambda n: n.meta["val"].dim()):
            continue
        _plain_arguments(node)
        same = _same_as(node, node in escaping)
        if same is not None:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
    dead_code(gm.graph)


def _escaping(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory the caller gets: outputs, and what outputs are views of."""
    found: set[fx.Node] = set()
    for node in graph.output_node().all_input_nodes:
        while node not in found:
            found.add(node)
            schema = getattr(node.target, "_schema", None)
            if schema is None or not node.all_input_nodes or all(r.alias_info is None for r in schema.returns):
                break
            node = node.all_input_nodes[0]
    return found


def _plain_arguments(node: fx.Node) -> None:
    """Spell slices and selects one way: ``slice(x, dim, start, end, step)`` within bounds, no negatives."""
    if node.target is torch.ops.prims.convert_element_type.default:  # from AOT's pass over float inputs
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
    elif node.target is aten.mul.Tensor and isinstance(node.args[0], fx.Node) and _is_one(node.args[0]):
        node.args = node.args[::-1]
    elif node.target is aten.slice.Tensor:
        given: list[Any] = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
        x, dim, start, end, step = given
        size = x.meta["val"].shape
        dim %= len(size)
        start, end, step = slice(start, end, step).indices(size[dim])
        node.args = (x, dim, start, max(start, end), step)
    elif node.target is aten.select.int:
        x, dim, index = node.args
        size = x.meta["val"].shape
        dim %= len(size)
        node.args = (x, dim, index % size[dim])
    elif node.target is aten.permute.default:
        x, dims = node.args
        dims = [d % len(dims) for d in dims]
        if x.target is aten.permute.default and isinstance(x, fx.Node):
            x, inner = x.args
            dims = [inner[d] for d in dims]
        node.args = (x, dims)


def _same_as(node: fx.Node, escapes: bool) -> fx.Node | None:
    """The earlier node that ``node`` only repeats, or None."""
    target, value = node.target, node.meta.get("val")
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor):
        return None
    if target is aten.slice.Tensor:
        piece = _piece_of_cat(node, source)
        if piece is not None and not escapes:
            return piece
    if target is aten.view.default and source.target is aten.view.default and not escapes:
        origin = source.args[0]
        if origin.meta["val"].shape == value.shape:  # there and back
            node.args, source = (origin, *node.args[1:]), origin
    before = source.meta.get("val")
    if not isinstance(before, torch.Tensor) or not _same_memory(before, value):
        return None
    if target in _ALIASES or target in _VIEWS:
        return source
    if target in _COPIES:
        # What the model returns as a copy must not be one of its inputs, nor two results the same memory.
        return None if escapes else source
    if target is aten.mul.Tensor and before.dim() == 0:
        one = node.args[1]  # floats_as_tensors multiplies inputs by one
        return source if isinstance(one, fx.Node) and _is_one(one) and not escapes else None
    return None


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _is_one(node: fx.Node) -> bool:
    return node.target is aten.full.default and list(node.args) == [[], 1]


def _piece_of_cat(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """For ``cat([a, b, c], d)[start:end]``: the one piece that this is, if it is one."""
    _, dim, start, end, step = node.args
    if source.target is not aten.cat.default or step != 1:
        return None
    if (source.args[1] if len(source.args) > 1 else 0) % node.meta["val"].dim() != dim:
        return None
    at = 0
    for piece in source.args[0]:
        size = piece.meta["val"].shape[dim] if piece.meta["val"].dim() > dim else 0
        if at >= start:
            fits = at == start and at + size == end
            return piece if fits and _stands_in(piece.meta["val"], node) else None
        at += size
    return None


def _stands_in(piece: torch.Tensor, node: fx.Node) -> bool:
    """Whether a piece may replace the slice although it lies in memory otherwise: strides are promised."""
    value = node.meta["val"]
    if _same_memory(piece, value):
        return True
    cats = all(user.target is aten.cat.default and user.meta["val"].is_contiguous() for user in node.users)
    return cats and piece.is_contiguous() and piece.dtype == value.dtype


def dead_code(graph: fx.Graph) -> None:
    """Erase nodes without users, except inputs and operators with effects."""
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            graph.erase_node(node)
