"""Attention written block by block: what the passes share that cut its keys (ring, torus).

Each block gives an output and a log-sum-exp (``fastpar::attention_lse``), ``fastpar::merge`` adds blocks up, and
the sum in the attention's own dtype is its result. Queries and keys may be any rows, as their layouts say.
"""

from __future__ import annotations

import math
from operator import getitem
from typing import Any

import torch
from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Dim, Layout
from fastpar.ops.redistribute import redistribute
from fastpar.ops.ring import accumulated, attention_lse, merge, redistribute_all
from fastpar.rules.attention import mask_layout
from fastpar.sharding.candidates import is_attention
from fastpar.sharding.rewrite import redistributed

aten = torch.ops.aten
Pair = tuple[fx.Node, fx.Node]
"""Output and log-sum-exp of a block, or key and value."""


def split_over(node: fx.Node) -> tuple[str, ...]:
    """Mesh axes over which a block's keys are split; () for whole blocks and other operators."""
    if node.target is not attention_lse or len(node.args) < 7 or not node.args[6]:
        return ()
    return tuple(str(node.args[6]).split("."))


def blockwise(node: fx.Node) -> bool:
    """Whether the operator is an attention, or one of a block of keys."""
    return is_attention(node) or node.target is attention_lse


def attended(node: fx.Node) -> bool:
    """Whether the value is what an attention gave, put together from blocks and cast at most."""
    while not blockwise(node):
        if node.target not in (getitem, merge, aten._to_copy.default) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return True


def _reaches(mask: torch.dtype, dtype: torch.dtype) -> bool:
    """True where a number of the mask's dtype can be so large that scores vanish beside it."""
    if not mask.is_floating_point:
        return False
    return torch.finfo(mask).max * torch.finfo(accumulated(dtype)).eps > 1


class Blockwise:
    """Writes the blocks of one attention (or of one larger block), in front of it, in program order."""

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph
        block = node.target is attention_lse
        args: list[Any] = [*node.args, *[None] * (7 - len(node.args))]
        self.q, self.k, self.v, self.mask = args[:4]
        self.scale, self.gqa = (args[4], bool(args[5])) if block else (args[5], bool(args[6]))
        self.value: torch.Tensor = node.meta["val"][0] if block else node.meta["val"]
        self.layout: Layout = node.meta["layout"][0] if block else node.meta["layout"]
        self._fake: tuple[torch.Tensor, ...] | None = None
        if not block and isinstance(self.mask, fx.Node) and _reaches(self.mask.meta["val"].dtype, self.value.dtype):
            self.q, self.mask = self._levelled(self.q, self.mask)

    def _levelled(self, q: fx.Node, mask: fx.Node) -> Pair:
        """Queries and mask without what their scores are lost in, a row's largest mask over all its keys."""
        if mask.target is redistribute and mask.args[0].meta["layout"].is_whole:  # type: ignore[union-attr]
            mask = mask.args[0]  # type: ignore[assignment]  # of which every block cuts its own rows, for nothing
        layout: Layout = mask.meta["layout"]
        rows = layout.with_dim(len(layout.dims) - 1, Dim.whole(1))
        lead: list[Dim] = [Dim.whole(1)] * (len(self.layout.dims) - len(rows.dims)) + [*rows.dims]
        pairs = zip(q.meta["layout"].dims, lead, strict=True)
        queries = Layout(tuple(there if here.size == 1 and here.is_whole else here for here, there in pairs))
        own = zip(queries.dims[len(lead) - len(rows.dims) :], rows.dims, strict=True)
        top = self._computed(aten.amax.default, (mask, [-1], True), rows)
        height = self._computed(aten.abs.default, (top,), rows)
        lost = self._computed(aten.gt.Scalar, (height, 1 / torch.finfo(accumulated(self.value.dtype)).eps), rows)
        finite = self._computed(aten.lt.Scalar, (height, math.inf), rows)
        lost = self._computed(aten.logical_and.default, (lost, finite), rows)
        kept = self._computed(aten.logical_not.default, (lost,), rows)
        off = self._computed(aten.masked_fill.Scalar, (top, kept, 0.0), rows)
        # a single query that one rank has: all of them have the mask's row
        lost = self.to(lost, Layout(tuple(a if a.size == b.size else b for a, b in own)), "mask")
        return (
            self._computed(aten.masked_fill.Scalar, (q, lost, 0.0), queries),
            self._computed(aten.sub.Tensor, (mask, off), layout),
        )

    def _computed(self, target: Any, args: tuple[Any, ...], layout: Layout) -> fx.Node:
        """A node with the value that the operator gives; one that is there already with these arguments is taken."""
        for user in next(a for a in args if isinstance(a, fx.Node)).users:
            if user.target is target and user.args == args and user < self.node:
                return user
        with self.value.fake_mode:  # type: ignore[attr-defined]
            value = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        return self.emit(target, args, value, layout)

    def emit(self, target: Any, args: tuple[Any, ...], value: Any, layout: Any, **meta: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta = {**inherited(self.node.meta), "val": value, "layout": layout, **meta}
        return new

    def pair(self, node: fx.Node) -> Pair:
        a, b = (self.emit(getitem, (node, i), node.meta["val"][i], node.meta["layout"][i]) for i in range(2))
        return a, b

    def to(self, x: fx.Node, want: Layout, why: str = "attention") -> fx.Node:
        """``x`` in another layout, from here on."""
        return redistributed(self.node, x, want, why)

    def keys_to(self, blocks: Pair, wants: tuple[Layout, Layout]) -> Pair:
        """Key and value in other layouts, as one message."""
        srcs = [str(b.meta["layout"]) for b in blocks]
        values = [b.meta["val"] for b in blocks]
        return self.pair(
            self.emit(redistribute_all, (list(blocks), srcs, list(map(str, wants))), values, wants, why="attention")
        )

    def attend(self, q: fx.Node, blocks: Pair, columns: Dim, over: str = "", counted: bool = False) -> Pair:
        """One block: q's rows with these keys, of which a mask has ``columns``.

        ``counted`` marks one block of an attention, for formulas that are per attention.
        """
        rows: Layout = q.meta["layout"]
        out = Layout((*rows.dims[:-1], Dim.whole(int(self.value.shape[-1]))))
        mask = self.mask
        if isinstance(mask, fx.Node):
            want = mask_layout(tuple(mask.meta["val"].shape), rows.dims[:-2], rows.dims[-2])
            if want.dims and want.dims[-1].size == columns.size > 1:
                want = want.with_dim(len(want.dims) - 1, columns)
            mask = self.to(mask, want, "mask")
        args = (q, *blocks, mask, self.scale, self.gqa, *([over] if over else []))
        if self._fake is None:
            with self.value.fake_mode:  # type: ignore[attr-defined]
                self._fake = tuple(attention_lse(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args)))
        node = self.emit(attention_lse, args, self._fake, (out, Layout(out.dims[:-1])), split_keys=counted)
        return self.pair(node)

    def merged(self, total: Pair | None, block: Pair) -> Pair:
        if total is None:
            return block
        with self.value.fake_mode:  # type: ignore[attr-defined]
            values = tuple(merge(*(x.meta["val"] for x in (*total, *block))))
        return self.pair(self.emit(merge, (*total, *block), values, tuple(x.meta["layout"] for x in total)))

    def finished(self, total: Pair) -> fx.Node:
        """The output in the attention's dtype."""
        if total[0].meta["val"].dtype == self.value.dtype:
            return total[0]
        cast = self.emit(torch.ops.aten._to_copy.default, (total[0],), self.value, total[0].meta["layout"])
        cast.kwargs = {"dtype": self.value.dtype}
        return cast
