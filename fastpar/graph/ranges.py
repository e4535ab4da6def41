"""An index that names every row in turn is no index: ``x[arange(B)[:, None], arange(S)]`` is ``x``.

Functions of places (flex attention's) read captured tensors so. As a view, rows that are split stay where they are; an
index would need all of them on every rank, for it may point to any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten


def without_ranges(node: fx.Node) -> fx.Node | None:
    """What to use in place of ``node``, where it is an ``aten::index`` whose indices are the places of its result, one
    dimension of ``x`` after the other; None where it is not. The result has the strides that ``node`` had."""
    if node.target is not aten.index.Tensor or not isinstance(node.args[0], fx.Node):
        return None
    x, indices = node.args
    shape, out = x.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    found = [_range(index, len(out)) for index in indices]  # type: ignore[union-attr]
    if len(found) != len(shape) or any(f is None for f in found):
        return None
    places = [(place, d) for d, (place, _) in enumerate(found) if place is not None]  # type: ignore[misc]
    if len({place for place, _ in places}) != len(places) or any(n > s for (_, n), s in zip(found, shape, strict=True)):  # type: ignore[misc]
        return None
    ones = [d for d, (place, _) in enumerate(found) if place is None]  # type: ignore[misc]
    order = [*ones, *(d for _, d in sorted(places))]
    with node.graph.inserting_before(node):
        result: fx.Node = x  # type: ignore[assignment]
        for d, (_, size) in enumerate(found):  # type: ignore[misc]
            if size < shape[d]:
                result = _emit(node, aten.slice.Tensor, result, d, 0, size, 1)
        if order != sorted(order):
            result = _emit(node, aten.permute.default, result, order)
        if result.meta["val"].shape != out or result.meta["val"].stride() != node.meta["val"].stride():
            result = _emit(node, aten.clone.default, result, memory_format=torch.contiguous_format)
            result = _emit(node, aten.view.default, result, list(out))
    return result


def _emit(node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    new = node.graph.call_function(target, args, kwargs)
    new.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    new.meta["val"] = target(*values, **kwargs)
    return new


def _range(index: Any, rank: int) -> tuple[int | None, int] | None:
    """(dimension of a result of ``rank`` dimensions along which it counts, rows) of an index that counts from 0 by 1;
    the dimension is None for one row. None for any other index."""
    if not isinstance(index, fx.Node):
        return None
    shape = index.meta["val"].shape
    wide = [d for d, n in enumerate(shape) if n != 1]
    if len(wide) > 1:
        return None
    while index.target in (aten.view.default, aten.unsqueeze.default, aten._to_copy.default):
        index = index.args[0]  # type: ignore[assignment]
    if index.target is not aten.arange.start_step or index.args[0] != 0 or index.args[2:] not in ((), (1,)):
        return None
    size = int(index.meta["val"].numel())
    return (wide[0] + rank - len(shape) if wide else None), size
