"""``hold``: a rank is given its part of a weight, where nothing of it needs more.

Plans that cut weights begin with slices of whole ones. Here the input itself gets the layout
of its slice, so that the whole weight need not exist on any rank (``fastpar.shard_weights``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.collectives import local


@dataclass(frozen=True)
class Hold(Pass):
    """Parameters of which a rank uses one slice come as that slice."""

    name: ClassVar[str] = "hold"
    stage_in: ClassVar[str] = "lowered"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        for node, given in zip(program.placeholders, program.inputs, strict=True):
            if given.kind == "parameter" and node.users and one_slice(node):
                slices = list(node.users)
                node.meta = {**node.meta, "layout": slices[0].meta["layout"]}
                for user in slices:
                    user.replace_all_uses_with(node)
                    program.graph.erase_node(user)
        program.gm.recompile()
        return program


def one_slice(node: fx.Node) -> bool:
    """Whether all that uses the value takes the same part of it."""
    return all(user.target is local for user in node.users) and len({str(u.args[2]) for u in node.users}) == 1
