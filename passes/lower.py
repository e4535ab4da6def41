"""``lower``: every change of layout becomes one concrete operator.

Rows that a rank has already are a slice; equal shares that all ranks need are an
all-gather; sums over ranks are an all-reduce, or where a rank keeps some of their rows an
all-to-all of terms, each added up where it stays; everything else is one packed all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import is_local, scattered
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.collectives import all_gather, all_reduce, all_to_all, gathers_evenly, local
from fastpar.ops.redistribute import redistribute
from fastpar.ops.ring import redistribute_all
from fastpar.ops.terms import terms

aten = torch.ops.aten


@dataclass(frozen=True)
class Lower(Pass):
    """Chooses the collective for each redistribute."""

    name: ClassVar[str] = "lower"
    stage_in: ClassVar[str] = "sharded"
    stage_out: ClassVar[str] = "lowered"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        for node in list(program.graph.nodes):
            if node.target is redistribute:
                with program.graph.inserting_before(node):
                    new = self._lower(program.graph, node, ctx.mesh)
                node.replace_all_uses_with(new)
                program.graph.erase_node(node)
            elif node.target is redistribute_all:
                node.target = all_to_all  # a ring's step: one message per neighbour, whatever it holds
        program.stage = "lowered"
        program.gm.recompile()
        return program

    def _lower(self, graph: fx.Graph, node: fx.Node, mesh: Mesh) -> fx.Node:
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        src, dst = Layout.parse(str(node.args[1])), Layout.parse(str(node.args[2]))

        def emit(target: object, args: tuple[object, ...], layout: object, meta: Any = None, **kwargs: Any) -> fx.Node:
            new = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
            new.meta = {**node.meta, "layout": layout, **(meta or {})}
            return new

        def collective(target: object, args: tuple[object, ...], layout: Layout, meta: Any = None) -> fx.Node:
            several = emit(target, args, (layout,), meta)
            several.meta["val"] = [several.meta["val"]]
            return emit(getitem, (several, 0), layout, meta)

        by_terms = scattered(src, dst, mesh)
        if by_terms is not None:
            [entry] = (p for p in src.partial if p not in dst.partial)
            before, after = (Layout(x.dims, dst.partial) for x in by_terms)
            value, count = node.meta["val"], before.dims[0].size
            with value.fake_mode:
                stacked = {"val": value.new_empty((count, *value.shape))}
            x = emit(terms, (x, str(entry), count), before, stacked)
            x = collective(all_to_all, ([x], [str(before)], [str(after)]), after, stacked)
            if entry.op == "sum":
                return emit(aten.sum.dim_IntList, (x, [0], False), dst, dtype=value.dtype)
            return emit({"max": aten.amax.default, "min": aten.amin.default}[entry.op], (x, [0]), dst)
        for entry in src.partial:
            if entry not in dst.partial:
                src = Layout(src.dims, tuple(p for p in src.partial if p != entry))
                x = collective(all_reduce, ([x], entry.op, ".".join(entry.axes)), src)
        if src == dst:
            return x
        text = (str(src), str(dst))
        if is_local(src, dst, mesh):
            return emit(local, (x, *text), dst)
        target = all_gather if gathers_evenly(src, dst, mesh) else all_to_all
        return collective(target, ([x], [text[0]], [text[1]]), dst)
