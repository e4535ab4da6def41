"""``arrange``: in messages to and from attentions, tokens come first.

Boxes of a message are written in the order of a value's dimensions. Of q, k and v, ``[B, H, S, D]``, what a peer sends
of every head would be a block: what comes from N peers lies in N pieces, ``[N, B, H/N, S/N, D]``, and tokens have to be
put together by a copy. With tokens in front, ``[N, S/N, B, H/N, D]``, pieces adjoin, however uneven they are: what came
is a view of the message, and an attention reads it there. The way back is the same: what goes to a peer of an output
that lies in memory tokens first is one piece of it.

So a value that an attention takes or gives is permuted before and after its exchange, which is free, to the order
that it has in memory, with the outermost of the dimensions that the exchange changes in front. Rows (the last
dimension) stay rows: they may be rounded (``quantize``), which is done to what is permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Layout
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.collectives import all_gather, all_to_all, layouts_of, local
from fastpar.ops.quantize import dequantize, quantize
from fastpar.sharding.blockwise import attended, blockwise

permute = torch.ops.aten.permute.default
_HANDED_ON = (all_to_all, all_gather, local, getitem, dequantize, permute)


@dataclass(frozen=True)
class Arrange(Pass):
    """Permutes what travels to and from attentions, tokens first."""

    name: ClassVar[str] = "arrange"
    stage_in: ClassVar[str] = "lowered"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        for node in list(program.graph.nodes):
            if node.target in (all_to_all, all_gather):
                _arrange(node)
        program.graph.eliminate_dead_code()
        program.gm.recompile()
        return program


def _arrange(node: fx.Node) -> None:
    """Permutes those of the values of one exchange that an attention takes or gives."""
    xs, srcs, dsts = (list(arg) for arg in node.args[:3])  # type: ignore[arg-type]
    parts = {int(user.args[1]): user for user in node.users}  # type: ignore[call-overload]
    layouts = list(zip(*layouts_of(node), strict=True))
    for i, (x, (src, dst)) in enumerate(zip(xs, layouts, strict=True)):
        part = parts.get(i)
        if part is None or not (attended(_source(x)) or _is_attended(part)):
            continue
        order = _order(_source(x), src, dst)
        if order == tuple(range(len(order))):
            continue
        srcs[i], dsts[i] = (str(_permuted(layout, order)) for layout in (src, dst))
        xs[i] = _before(x, order, node)
        node.meta["val"] = [_arranged(v, order) if j == i else v for j, v in enumerate(node.meta["val"])]
        node.meta["layout"] = tuple(_permuted(d, order) if j == i else d for j, d in enumerate(node.meta["layout"]))
        _after(part, order)
    node.args = (xs, srcs, dsts)


def _source(x: fx.Node) -> fx.Node:
    """The value whose rows ``x`` has, rounded or not."""
    return x.args[0] if x.target is quantize else x  # type: ignore[return-value]


def _is_attended(value: fx.Node) -> bool:
    """Whether it is attentions that use a value that came, here or wherever it is sent on to."""
    return bool(value.users) and all(
        blockwise(user) or (user.target in _HANDED_ON and _is_attended(user)) for user in value.users
    )


def _order(x: fx.Node, src: Layout, dst: Layout) -> tuple[int, ...]:
    """Dimensions as a message has them: as they lie in memory, of those that change the outermost in front."""
    value: torch.Tensor = x.meta["val"]
    last = value.dim() - 1
    memory = sorted(range(last), key=lambda d: (-value.stride(d), d))
    changed = [d for d in memory if src.dims[d] != dst.dims[d]]
    first = changed[:1]
    return (*first, *(d for d in memory if d not in first), last)


def _permuted(layout: Layout, order: tuple[int, ...]) -> Layout:
    return Layout(tuple(layout.dims[d] for d in order), layout.partial)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=lambda d: order[d]))


def _before(x: fx.Node, order: tuple[int, ...], user: fx.Node) -> fx.Node:
    """``x`` permuted, where it is computed, for ``user``; what was permuted the other way is taken as it was."""
    if x.target is permute and tuple(x.args[1]) == _inverse(order):  # type: ignore[arg-type]
        return x.args[0]  # type: ignore[return-value]
    graph, layout = x.graph, _permuted(x.meta["layout"], order)
    if x.target is quantize:
        inner = _before(x.args[0], order, x)  # type: ignore[arg-type]
        with graph.inserting_after(x):
            return _emit(x, quantize, (inner,), _arranged(x.meta["val"], order), layout)
    with graph.inserting_before(user) if x.op == "placeholder" else graph.inserting_after(x):
        return _emit(x, permute, (x, list(order)), x.meta["val"].permute(order), layout)


def _after(part: fx.Node, order: tuple[int, ...]) -> None:
    """Users of a value that came permuted get it as it was; what makes numbers of bytes does so before."""
    users = list(part.users)
    for user in users:
        if user.target is dequantize:
            _given_back(user, list(user.users), order)
    _given_back(part, [user for user in users if user.target is not dequantize], order)


def _given_back(node: fx.Node, users: list[fx.Node], order: tuple[int, ...]) -> None:
    """``node`` is permuted from here on, and ``users`` get it in its own order."""
    layout: Layout = node.meta["layout"]
    arranged = _arranged(node.meta["val"], order)
    node.meta = {**node.meta, "val": arranged, "layout": _permuted(layout, order)}
    if users:
        back = _inverse(order)
        with node.graph.inserting_before(min(users)):  # until then the exchange may travel
            whole = _emit(node, permute, (node, list(back)), arranged.permute(back), layout)
        for user in users:
            user.replace_input_with(node, whole)


def _arranged(value: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    return value.permute(order).contiguous()


def _emit(like: fx.Node, target: Any, args: tuple[Any, ...], value: Any, layout: Layout) -> fx.Node:
    new = like.graph.call_function(target, args)
    new.meta = {**inherited(like.meta), "val": value, "layout": layout}
    return new
