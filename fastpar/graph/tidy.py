"""``tidy``: remove from a functional ATen graph what does nothing, after AOT made it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from fastpar.graph.normalise import replace_attention
from fastpar.graph.ranges import without_ranges

aten = torch.ops.aten

_ALIASES = {aten.detach.default, aten.alias.default, aten.lift.default, aten.lift_fresh.default}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default}
_VIEWS = {aten.view.default, aten.expand.default, aten.slice.Tensor, aten.permute.default}


def tidy(gm: fx.GraphModule) -> None:
    """Remove, in place, what does nothing on a functional ATen graph, and dead nodes.

    These are aliases, copies that change neither dtype nor memory layout, views,
    expansions and permutations to the same, slices of everything, slices
    that give back a piece of a concatenation, and indices that name every row in
    turn. Strides stay what ``meta["val"]`` says, and results that are new tensors
    stay new. Linear in the number of nodes.
    """
    escapes = escaping(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or replace_attention(node, lambda n: n.meta["val"].dim()):
            continue
        _plain_arguments(node)
        same = _same_as(node, node in escapes) or (None if node in escapes else without_ranges(node))
        if same is not None:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
    dead_code(gm.graph)


def escaping(graph: fx.Graph) -> set[fx.Node]:
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
    if target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format:
        source = _without_copy(node, source)
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


def _without_copy(node: fx.Node, source: fx.Node) -> fx.Node:
    """What to make contiguous in place of ``source``, where that is a copy, or a permutation of one."""
    if source.target is aten.clone.default:
        node.args = source.args
    elif source.target is aten.permute.default and source.args[0].target is aten.clone.default:  # type: ignore[union-attr]
        copied: fx.Node = source.args[0].args[0]  # type: ignore[union-attr, assignment]
        with node.graph.inserting_before(node):
            turned = node.graph.call_function(aten.permute.default, (copied, source.args[1]))
        turned.meta = {k: v for k, v in source.meta.items() if k != "tensor_meta"}
        turned.meta["val"] = copied.meta["val"].permute(source.args[1])
        node.args = (turned,)
    return node.args[0]  # type: ignore[return-value]


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
