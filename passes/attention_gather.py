"""``attention-gather``: every rank gathers all keys and values for its own query rows.

DistriFusion's synchronous patch parallelism (section 4.1 of the paper): 2 (N-1)/N of the K/V
elements arrive at each rank, whatever the number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar.core.layout import Dim, Layout
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.sharding.candidates import is_attention
from fastpar.sharding.rewrite import redistributed


def split_keys(graph: fx.Graph) -> list[fx.Node]:
    """Attentions whose keys are split: those that need a schedule."""
    return [n for n in graph.nodes if is_attention(n) and not n.args[1].meta["layout"].dims[-2].is_whole]


@dataclass(frozen=True)
class AttentionGather(Pass):
    """K and V whole on every rank, queries stay where they are."""

    name: ClassVar[str] = "attention-gather"
    stage_in: ClassVar[str] = "sharded"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        for node in split_keys(program.graph):
            args = list(node.args)
            for i in (1, 2):
                layout: Layout = args[i].meta["layout"]  # type: ignore[union-attr]
                want = layout.with_dim(len(layout.dims) - 2, Dim.whole(layout.dims[-2].size))
                args[i] = redistributed(node, args[i], want, "attention")  # type: ignore[arg-type]
            node.args = tuple(args)
            node.meta["split_keys"] = True
        program.gm.recompile()
        return program
