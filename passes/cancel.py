"""``cancel``: a change of layout and its inverse, or two in a row, become one or none; cuts move to where
they cost least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import elements_sent
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.redistribute import redistribute
from fastpar.sharding.early import cut_early, cut_late, is_free


@dataclass(frozen=True)
class Cancel(Pass):
    """Joins redistributes of redistributes where that sends no more, drops those that change nothing, moves cuts."""

    name: ClassVar[str] = "cancel"
    stage_in: ClassVar[str] = "sharded"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        mesh: Mesh = ctx.mesh
        for node in list(program.graph.nodes):
            if node.target is not redistribute:
                continue
            inner = node.args[0]
            if inner.target is redistribute:
                src, middle, dst = Layout.parse(inner.args[1]), inner.meta["layout"], node.meta["layout"]
                direct = max(elements_sent(src, dst, mesh))
                alone = len(inner.users) == 1
                hop = max(elements_sent(middle, dst, mesh)) + (max(elements_sent(src, middle, mesh)) if alone else 0)
                # a value that others need as well travels anyway: going round it gains nothing but messages
                if direct < hop or (direct == hop and (alone or direct == 0)):
                    node.args = (inner.args[0], str(src), str(dst))
            if node.args[1] == node.args[2]:
                node.replace_all_uses_with(node.args[0])
        program.graph.eliminate_dead_code()
        joined = set(program.graph.nodes)  # what was joined with others travels in those
        cut_late(program.graph, mesh)
        cut_early(program.graph, mesh)
        left = set(program.graph.nodes)
        fallbacks = [f for f in program.gm.meta.get("fallbacks", []) if f.node in left or f.node not in joined]
        program.gm.meta["fallbacks"] = [f for f in fallbacks if f.node not in left or not is_free(f.node, mesh)]
        program.gm.recompile()
        return program
