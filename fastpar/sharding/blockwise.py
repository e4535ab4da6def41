"""Attention written block by block: what the passes share that cut its keys (ring, torus).

Each block gives an output and a log-sum-exp (``fastpar::attention_lse``), ``fastpar::merge`` adds blocks up, and
the sum in the attention's own dtype is its result. Queries and keys may be any rows, as their layouts say.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Dim, Layout
from fastpar.ops.ring import attention_lse, merge, redistribute_all
from fastpar.rules.attention import mask_layout
from fastpar.sharding.rewrite import redistributed

Pair = tuple[fx.Node, fx.Node]
"""Output and log-sum-exp of a block, or key and value."""


def split_over(node: fx.Node) -> tuple[str, ...]:
    """Mesh axes over which a block's keys are split; () for whole blocks and other operators."""
    if node.target is not attention_lse or len(node.args) < 7 or not node.args[6]:
        return ()
    return tuple(str(node.args[6]).split("."))


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
        values, layouts = (tuple(x.meta[key] for x in total) for key in ("val", "layout"))
        return self.pair(self.emit(merge, (*total, *block), values, layouts))

    def finished(self, total: Pair) -> fx.Node:
        """The output in the attention's dtype."""
        if total[0].meta["val"].dtype == self.value.dtype:
            return total[0]
        cast = self.emit(torch.ops.aten._to_copy.default, (total[0],), self.value, total[0].meta["layout"])
        cast.kwargs = {"dtype": self.value.dtype}
        return cast
