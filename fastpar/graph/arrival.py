"""Rows stay in the order in which they arrived, where nothing depends on it: a localised program with fewer copies.

A rank gets the tokens of an attention from its peers, from each a share of the text and one of the picture. To put
them in the model's order is a copy of every tensor. But an attention without a mask computes the same for keys in any
order, as long as k and v have the same one, and its output has the order of its queries, also under a mask that is the
same for all of these or has a row for each in their order. So they stay as they came, and the message back takes each
peer's rows from where they are.

    arrived     text 0, picture 0, text 1, picture 1, ...      one piece from each peer
    in order    text 0, text 1, ..., picture 0, picture 1, ...

What travels, and where to, is not changed. A *region* is what has such rows: what an ``unpack`` gave, followed through
operators that treat rows alike, to attentions' k and v and to ``pack``. One that ends anywhere else is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastpar.core.transfer import Box
from fastpar.ops.attention import attention
from fastpar.ops.collectives import Piece, decode, encode, pack, shapes_of, unpack
from fastpar.ops.quantize import dequantize, from_bytes, quantize, to_bytes
from fastpar.ops.ring import attention_lse, merge

aten = torch.ops.aten
_ROWWISE = (quantize, dequantize, to_bytes, from_bytes, aten._to_copy.default)


@dataclass
class _Region:
    """Values with the rows of one value that came, and the dimension that these are in each."""

    source: fx.Node  # unpack
    lane: int
    order: tuple[tuple[int, int], ...]  # (first row, rows) as they arrived
    dims: dict[fx.Node, int] = field(default_factory=dict)
    needs: list[tuple[fx.Node, int]] = field(default_factory=list)  # values that must have their rows in this order too
    packs: list[tuple[fx.Node, int, int]] = field(default_factory=list)  # (pack, which of its values, dimension)


def in_arrival_order(graph: fx.Graph) -> None:
    """Rewrites the boxes of a localised graph so that rows stay as they arrived wherever they may."""
    regions = [region for node in graph.nodes if node.target is unpack for region in _regions(node)]
    while True:
        held = {(region.order, node): d for region in regions for node, d in region.dims.items()}
        kept = [r for r in regions if all(held.get((r.order, node)) == d for node, d in r.needs)]
        if len(kept) == len(regions):
            break
        regions = kept
    taken: dict[tuple[fx.Node, int], tuple[_Region, int]] = {}
    for region in regions:
        boxes = decode(region.source.args[2])  # type: ignore[arg-type]
        _set_boxes(region.source, 2, _moved(boxes, region.lane, 0, region.order))
        taken |= {(node, lane): (region, d) for node, lane, d in region.packs}
    for (node, lane), (region, d) in taken.items():
        _set_boxes(node, 1, _moved(decode(node.args[1]), lane, d, region.order))  # type: ignore[arg-type]


def _regions(node: fx.Node) -> Iterator[_Region]:
    """What the values of one ``unpack`` reach, of those whose rows do not arrive in their order."""
    boxes = decode(node.args[2])  # type: ignore[arg-type]
    for lane, shape in enumerate(shapes_of(node.args[1])):  # type: ignore[arg-type]
        came = [(starts, sizes) for i, starts, sizes in boxes if i == lane]
        if len(shape) < 2 or any(sizes[1:] != shape[1:] for _, sizes in came):
            continue
        order = tuple((starts[0], sizes[0]) for starts, sizes in came)
        if order == tuple(sorted(order)) or sum(n for _, n in order) != shape[0]:
            continue
        region = _Region(node, lane, order)
        if all(_follow(region, user, 0) for user in node.users if user.args[1] == lane):
            yield region


def _follow(region: _Region, node: fx.Node, dim: int) -> bool:
    """Notes ``node``, whose rows are its dimension ``dim``, and what is made of it; False where rows may not move."""
    if node in region.dims:
        return region.dims[node] == dim
    region.dims[node] = dim
    return all(_through(region, node, user, dim) for user in node.users)


def _through(region: _Region, node: fx.Node, user: fx.Node, dim: int) -> bool:
    """Whether ``user`` may have the rows of ``node`` in another order; with all that is computed of it."""
    args: Any = user.args
    if user.target is aten.permute.default:
        return _follow(region, user, [d % len(args[1]) for d in args[1]].index(dim))
    if user.target in (aten.select.int, aten.slice.Tensor):
        at = (args[1] if len(args) > 1 else 0) % _rank(node)
        gone = user.target is aten.select.int and at < dim
        return at != dim and _follow(region, user, dim - gone)
    if user.target is aten.clone.default:
        return _follow(region, user, dim)
    if user.target in _ROWWISE:
        return dim < _rank(node) - 1 and _follow(region, user, dim)
    if user.target in (attention, attention_lse):
        return _attended(region, node, user, dim)
    if user.target is merge:
        region.needs += [(arg, dim) for arg in args]
        return all(_follow(region, part, dim) for part in user.users)
    if user.target is pack:
        places = [i for i, x in enumerate(args[0]) if x is node]
        region.packs += [(user, i, dim) for i in places]
        return all(_cut_in_front(box, dim) for box in decode(args[1]) if box[0] in places)
    return False


def _attended(region: _Region, node: fx.Node, user: fx.Node, dim: int) -> bool:
    """``_through`` an attention or one of a block: rows of queries are rows of what it gives."""
    args: Any = (*user.args, None)
    q, k, v, mask, *rest = args
    unlike = rest[2:3] if user.target is attention_lse else rest[:1]  # keys that are still split; causal
    if any(unlike) or dim != _rank(node) - 2 or user.kwargs:
        return False
    if node is k or node is v:
        if mask is not None:  # has a column for each key
            return False
        region.needs += [(k, _rank(k) - 2), (v, _rank(v) - 2)]
    if node is mask:
        region.needs.append((q, _rank(q) - 2))
    if node is not q:
        return True
    if mask is not None and mask.meta["val"].shape[-2:-1] not in ((), (1,)):
        region.needs.append((mask, _rank(mask) - 2))
    dim = _rank(user) - 2  # which q has elsewhere where its leading dimensions are broadcast
    return all(_follow(region, x, dim) for x in (user.users if user.target is attention_lse else (user,)))


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    return int((value[0] if isinstance(value, (tuple, list)) else value).dim())


def _cut_in_front(box: Piece, dim: int) -> bool:
    """Whether rows of a box are one after the other in a message."""
    return math.prod(box[2][:dim]) == 1


def _moved(boxes: list[Piece], lane: int, dim: int, order: tuple[tuple[int, int], ...]) -> list[Piece]:
    """``boxes`` with the rows of one value where they are if they lie in ``order``."""
    starts = [sum(n for _, n in order[:i]) for i in range(len(order))]
    out: list[Piece] = []
    for box in boxes:
        if box[0] != lane or box[2][dim] == 0:
            out.append(box)
            continue
        for place, n in _places(box[1][dim], box[2][dim], order, starts):
            out.append((lane, _with(box[1], dim, place), _with(box[2], dim, n)))
    return out


def _places(row: int, count: int, order: tuple[tuple[int, int], ...], starts: list[int]) -> Iterator[tuple[int, int]]:
    """Where rows from ``row`` on are, run by run."""
    while count:
        first, size, place = next((f, n, p) for (f, n), p in zip(order, starts, strict=True) if f <= row < f + n)
        run = min(count, first + size - row)
        yield place + row - first, run
        row, count = row + run, count - run


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _set_boxes(node: fx.Node, index: int, boxes: list[Piece]) -> None:
    node.update_arg(index, encode([(i, Box(starts, starts, sizes)) for i, starts, sizes in boxes], "src"))
