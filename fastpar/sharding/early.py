"""Cuts move up: of a value that every rank makes whole only to keep its part, each makes its part.

Rules go forward, and what begins whole stays whole until it meets something split: a mask over places is made from
ranges, ``Q x K`` of it on every rank, and cut where the attention is. Here the rules are asked backward, which parts
of the operands give this part of the result, and those are cut, as far up as nobody needs the value whole.
"""

from __future__ import annotations

import math

from torch import fx

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import is_local
from fastpar.ops.redistribute import redistribute
from fastpar.rules import Call, rule_for
from fastpar.sharding.insert import HEAVY, replace_operands
from fastpar.sharding.rewrite import redistributed


def cut_early(graph: fx.Graph, mesh: Mesh) -> None:
    """Rewrite, in place, a sharded graph in which cuts stand right behind what they cut.

    A value that is cut in several ways is left whole where its parts together are more than it is. Products and
    attentions stay as they are: who shares those out, weighs what it costs (``split-weights``).
    """
    _Early(graph, mesh).run()
    graph.eliminate_dead_code()


class _Early:
    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh
        self.made: dict[tuple[fx.Node, Layout], fx.Node | None] = {}
        self.only_cut: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if self._movable(node) and all(u in self.only_cut or self._cuts(u) for u in node.users):
                self.only_cut.add(node)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            cuts = [u for u in node.users if self._cuts(u)] if node in self.only_cut else []
            wants = {_once(u.meta["layout"]) for u in cuts}
            if not wants or sum(map(self._elements, wants)) > math.prod(node.meta["val"].shape):
                continue
            for user in cuts:
                part = self._part(node, _once(user.meta["layout"]))
                if part is not None:
                    new = redistributed(user, part, user.meta["layout"], user.meta["why"])
                    user.replace_all_uses_with(new)

    def _movable(self, node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or node.target is redistribute or schema is None or not node.users:
            return False
        layout = node.meta.get("layout")
        return isinstance(layout, Layout) and layout.is_whole and schema.name not in HEAVY and not schema.is_mutable

    def _cuts(self, node: fx.Node) -> bool:
        """Whether a node only takes a rank's part of a whole value."""
        if node.target is not redistribute or not node.args[0].meta["layout"].is_whole:  # type: ignore[union-attr]
            return False
        return is_local(node.args[0].meta["layout"], node.meta["layout"], self.mesh)  # type: ignore[union-attr]

    def _elements(self, layout: Layout) -> int:
        return max(math.prod(layout.local_shape(self.mesh, rank)) for rank in range(self.mesh.ranks))

    def _part(self, node: fx.Node, want: Layout) -> fx.Node | None:
        """``node`` in layout ``want``, made from parts of its operands; None where a rule cannot say which, and where
        the value is there whole anyway."""
        key = node, want
        if key not in self.made:
            self.made[key] = self._make(node, want) if node in self.only_cut else None
        return self.made[key]

    def _cut(self, operand: fx.Node, layout: Layout) -> fx.Node:
        with self.graph.inserting_after(operand):
            new = self.made[operand, layout] = redistributed(None, operand, layout, "seed")
        return new

    def _make(self, node: fx.Node, want: Layout) -> fx.Node | None:
        call = Call.of(node)
        ins = rule_for(call).operands_for(call, want)
        if ins is None or not call.operands or all(x.is_whole for x in ins):
            return None
        decision = rule_for(call).decide(call, ins, self.mesh)
        if decision.inputs != ins or decision.outputs != (want,) or decision.gathers:
            return None
        queue = [operand if layout.is_whole else self._part(operand, layout) or self._cut(operand, layout)
                 for operand, layout in zip(call.operands, ins, strict=True)]  # fmt: skip
        args, kwargs = replace_operands(call, queue, {n: n for n in node.all_input_nodes})
        with self.graph.inserting_before(node):
            new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = {**node.meta, "layout": want}
        return new


def _once(layout: Layout) -> Layout:
    """``layout`` with each axis in one dimension only: a ring's columns, windows along the axes that have cut the
    rows, are cut from the rows."""
    taken: set[str] = set()
    dims = []
    for dim in layout.dims:
        dims.append(Dim.whole(dim.size) if dim.axes & taken else dim)
        taken |= dim.axes
    return Layout(tuple(dims))
