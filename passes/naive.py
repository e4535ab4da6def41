"""``naive``: patches that never talk, the baseline that DistriFusion is measured against (its figure 2 and table 1).

Every change of layout that would need another rank is answered from what the rank has: halos are zero, sums and
means are its own, and attention sees the keys of its own patch. Only the output is put together. The images have
seams; what is left of the step time is what any exchange at all costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.inherit import inherited
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import changed_axes, is_local
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.alone import alone
from fastpar.ops.redistribute import redistribute
from fastpar.ops.ring import attention_lse
from fastpar.passes.attention_gather import split_keys
from fastpar.passes.attention_ring import rotated
from fastpar.sharding.rewrite import redistributed


@dataclass(frozen=True)
class Naive(Pass):
    """No exchange but that of the outputs, over the axis ``naive``; other axes talk as they do."""

    name: ClassVar[str] = "naive"
    stage_in: ClassVar[str] = "sharded"
    lossy: ClassVar[bool] = True

    def apply(self, program: Program, ctx: PassContext) -> Program:
        mesh: Mesh = ctx.mesh
        for node in split_keys(program.graph):
            with program.graph.inserting_before(node):
                node.replace_all_uses_with(_own_attention(node, mesh))
            program.graph.erase_node(node)
        strayed: set[fx.Node] = set()  # values that are whole by their layout, and differ from rank to rank
        for node in program.graph.nodes:
            if node.target is redistribute and node.meta.get("why") != "output" and _talks(node, mesh):
                node.target = alone
            layout = node.meta.get("layout")
            if isinstance(layout, Layout) and layout.is_whole and (
                node.target is alone or any(n in strayed for n in node.all_input_nodes)
            ):
                strayed.add(node)
        for out in program.graph.output_node().all_input_nodes:
            if out in strayed:
                raise PlanError(
                    f"naive: output {out.name} is made of sums over all rows, for which patches that never talk have "
                    "no common value; plans that split it exactly: gather, ulysses"
                )
        program.gm.meta["fallbacks"] = [f for f in program.gm.meta.get("fallbacks", []) if f.node.target is not alone]
        program.gm.recompile()
        return program


def _talks(node: fx.Node, mesh: Mesh) -> bool:
    """Whether the change needs other ranks of the axis ``naive``."""
    src, dst = (Layout.parse(str(a)) for a in node.args[1:3])
    gone = {a for p in src.partial if p not in dst.partial for a in p.axes}
    if not is_local(src.summed(), dst.summed(), mesh):
        gone |= set(changed_axes(src.summed(), dst.summed(), mesh))
    return "naive" in gone


def _own_attention(node: fx.Node, mesh: Mesh) -> fx.Node:
    """Attention over the rank's own keys: the first block of a ring, and no other."""
    graph = node.graph
    args: list[Any] = [*node.args, *[None] * (7 - len(node.args))]
    q, k, v, mask, _, scale, gqa = args
    value, layout, keys = node.meta["val"], node.meta["layout"], k.meta["layout"].dims[-2]
    if isinstance(mask, fx.Node) and mask.meta["val"].shape[-1] == keys.size > 1:
        have: Layout = mask.meta["layout"]
        mask = redistributed(node, mask, have.with_dim(len(have.dims) - 1, rotated(keys, 0, mesh)), "mask")
    with value.fake_mode:
        operands = [x.meta["val"] if isinstance(x, fx.Node) else x for x in (q, k, v, mask)]
        fake = attention_lse(*operands, scale, bool(gqa))
    trace = inherited(node.meta)
    block = graph.call_function(attention_lse, (q, k, v, mask, scale, bool(gqa)))
    block.meta = {**trace, "val": tuple(fake), "layout": (layout, Layout(layout.dims[:-1]))}
    out = graph.call_function(getitem, (block, 0))
    out.meta = {**trace, "val": value, "layout": layout}
    return out
