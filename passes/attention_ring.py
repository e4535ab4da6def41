"""``attention-ring``: keys and values travel round a ring while queries stay.

Ring Attention (Liu et al., section 3), double buffered as in FastUSP's pipelined ring: the
exchange that brings block t+1 starts before block t is attended, and is waited for when
block t+1 is needed. K and V of a step travel as one message. Blocks are the ranks' own parts,
uneven or empty, never padded; mask columns are cut from the rank's own rows of the mask.

After t steps rank c holds the rows of rank c - t: a layout like any other (windows), so the
ring's shift is a redistribute, and every step is checked like every other one.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.layout import Atom, Dim, Layout, Seg
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.redistribute import redistribute
from fastpar.ops.ring import attention_lse, merge, redistribute_all
from fastpar.passes.attention_gather import split_keys
from fastpar.sharding.rewrite import redistributed


@dataclass(frozen=True)
class AttentionRing(Pass):
    """A ring over whatever axes split the keys (after ``attention-ulysses``: those that it left)."""

    name: ClassVar[str] = "attention-ring"
    stage_in: ClassVar[str] = "sharded"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        for node in split_keys(program.graph):
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(_Ring(node, ctx.mesh).write())
            program.graph.erase_node(node)
        program.gm.recompile()
        return program


def rotated(dim: Dim, steps: int, mesh: Mesh) -> Dim:
    """What every rank holds of ``dim`` after ``steps`` steps: the rows of the rank that many behind it."""

    def turned(seg: Seg) -> Seg:
        n, starts = mesh.size(seg.axes), seg.starts()
        order = [(c - steps) % n for c in range(n)]
        return Seg(seg.size, seg.axes, tuple(seg.parts[c] for c in order), tuple(starts[c] for c in order))

    return Dim.of(atom if atom.whole else Atom(tuple(map(turned, atom.segs))) for atom in dim.atoms)


def turns(dim: Dim) -> bool:
    """True where one ring takes every rank past all rows: one factor is split, all of it over the same axes."""
    split = [atom for atom in dim.atoms if not atom.whole]
    return len(split) == 1 and all(frozenset(s.axes) == dim.axes and not s.offsets for s in split[0].segs)


class _Ring:
    def __init__(self, node: fx.Node, mesh: Mesh) -> None:
        self.node, self.mesh, self.graph = node, mesh, node.graph
        args: list[Any] = [*node.args, *[None] * (7 - len(node.args))]
        self.q, self.k, self.v, self.mask = args[:4]
        self.scale, self.gqa = args[5], bool(args[6])
        self.keys: Dim = self.k.meta["layout"].dims[-2]
        axes = mesh.ordered(self.keys.axes)
        self.steps = mesh.size(axes)
        if not turns(self.keys):
            self.keys = Dim.even(self.keys.size, axes, mesh)
            self.k, self.v = (
                redistributed(node, x, x.meta["layout"].with_dim(x.meta["val"].dim() - 2, self.keys), "attention")
                for x in (self.k, self.v)
            )

    def write(self) -> fx.Node:
        blocks: list[fx.Node] = [self.k, self.v]
        total: tuple[fx.Node, fx.Node] | None = None
        for step in range(self.steps):
            # the next exchange is started before this block is attended: that is what hides it
            following = self._shift(blocks, step + 1) if step + 1 < self.steps else []
            block = self._attend(blocks, step)
            total = block if total is None else self._merge(total, block)
            blocks = following
        assert total is not None
        value = self.node.meta["val"]
        if total[0].meta["val"].dtype == value.dtype:
            return total[0]
        cast = self._emit(torch.ops.aten._to_copy.default, (total[0],), value, self.node.meta["layout"])
        cast.kwargs = {"dtype": value.dtype}
        return cast

    def _emit(self, target: Any, args: tuple[Any, ...], value: Any, layout: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta = {"val": value, "layout": layout}
        if "stack_trace" in self.node.meta:
            new.meta["stack_trace"] = self.node.meta["stack_trace"]
        return new

    def _pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        a, b = (
            self._emit(getitem, (node, i), node.meta["val"][i], node.meta["layout"][i]) for i in range(2)
        )
        return a, b

    def _shift(self, blocks: list[fx.Node], steps: int) -> list[fx.Node]:
        srcs = [b.meta["layout"] for b in blocks]
        dsts = [x.with_dim(len(x.dims) - 2, rotated(self.keys, steps, self.mesh)) for x in srcs]
        texts = [list(map(str, srcs)), list(map(str, dsts))]
        moved = self._emit(
            redistribute_all, (blocks, *texts), [b.meta["val"] for b in blocks], tuple(dsts)
        )
        moved.meta["why"] = "attention"
        return list(self._pair(moved))

    def _attend(self, blocks: list[fx.Node], step: int) -> tuple[fx.Node, fx.Node]:
        keys: Dim = blocks[0].meta["layout"].dims[-2]
        mask = self.mask
        if isinstance(mask, fx.Node):
            have: Layout = mask.meta["layout"]
            if have.dims and have.dims[-1].size == keys.size > 1:
                want = have.with_dim(len(have.dims) - 1, rotated(self.keys, step, self.mesh))
                mask = self._emit(redistribute, (mask, str(have), str(want)), mask.meta["val"], want)
                mask.meta["why"] = "mask"
        out = self.node.meta["layout"]
        value = self.node.meta["val"]
        with value.fake_mode:
            operands = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (self.q, *blocks, mask)]
            fake = attention_lse(*operands, self.scale, self.gqa)
        node = self._emit(
            attention_lse,
            (self.q, *blocks, mask, self.scale, self.gqa),
            tuple(fake),
            (out, Layout(out.dims[:-1])),
        )
        node.meta["split_keys"] = step == 0
        return self._pair(node)

    def _merge(self, a: tuple[fx.Node, fx.Node], b: tuple[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
        values = tuple(x.meta["val"] for x in a)
        layouts = tuple(x.meta["layout"] for x in a)
        return self._pair(self._emit(merge, (*a, *b), values, layouts))
