"""Where values are cut: as early as possible, and not before what is cheaper to repeat than to exchange.

Cuts move up: of a value that every rank makes whole only to keep its part, each makes its part.

Rules go forward, and what begins whole stays whole until it meets something split: a mask over places is made from
ranges, ``Q x K`` of it on every rank, and cut where the attention is. Here the rules are asked backward, which parts
of the operands give this part of the result, and those are cut, as far up as nobody needs the value whole.

Cuts move down: halos of what a rank can make from what it has whole need not come from others. So the first
convolution of a model, whose operand is the sample with rows put around it, exchanges nothing (DistriFusion cuts the
sample with its halos there, too).
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


AT_ONCE = 1 << 22
"""Numbers that a device reads and writes in less time than a message needs, however short it is: microseconds."""


def cut_late(graph: fx.Graph, mesh: Mesh) -> None:
    """Of halos that are exchanged, make in place those of values that every rank can have whole, if they are not large.

    Products and attentions are not repeated; random numbers are whole on all ranks anyway.
    """
    for node in list(graph.nodes):
        halo = node.target is redistribute and node.meta.get("why") == "plan" and node.meta["layout"].windowed
        if halo and not is_free(node, mesh):
            chain = _behind(node.args[0])  # type: ignore[arg-type]
            layouts = [user.meta.get("layout") for user in node.users]
            made = max((_elements(x, mesh) for x in layouts if isinstance(x, Layout)), default=0)
            if chain is None or sum(math.prod(n.meta["val"].shape) for n in chain) > max(made, AT_ONCE):
                continue
            env: dict[fx.Node, fx.Node] = {}

            def whole(n: fx.Node, env: dict[fx.Node, fx.Node] = env) -> fx.Node:
                return env[n] if n in env else n.args[0] if n.target is redistribute else n  # type: ignore[return-value]

            for one in chain:
                with graph.inserting_before(node):
                    env[one] = graph.node_copy(one, whole)
                env[one].meta = {**one.meta, "layout": Layout.whole(one.meta["val"].shape)}
            value = whole(node.args[0])  # type: ignore[arg-type]
            node.args = (value, str(value.meta["layout"]), node.args[2])
    graph.eliminate_dead_code()


def _behind(node: fx.Node) -> list[fx.Node] | None:
    """What is to be made whole, in order, to have ``node`` whole; None where something has to come from others."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        layout = n.meta.get("layout")
        if n in found or (isinstance(layout, Layout) and layout.is_whole):
            continue
        if n.target is redistribute:
            if not n.args[0].meta["layout"].is_whole:  # type: ignore[union-attr]
                return None
            continue
        schema = getattr(n.target, "_schema", None)
        if not isinstance(layout, Layout) or schema is None or schema.name in HEAVY or schema.is_mutable:
            return None
        if not n.all_input_nodes:
            return None
        found.add(n)
        todo += n.all_input_nodes
    return sorted(found)


def is_free(node: fx.Node, mesh: Mesh) -> bool:
    """Whether a redistribute sends nothing."""
    return is_local(node.args[0].meta["layout"], node.meta["layout"], mesh)  # type: ignore[union-attr]


def _elements(layout: Layout, mesh: Mesh) -> int:
    """Numbers on the busiest rank."""
    return max(math.prod(layout.local_shape(mesh, rank)) for rank in range(mesh.ranks))


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
            if not wants or sum(_elements(want, self.mesh) for want in wants) > math.prod(node.meta["val"].shape):
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
        return is_free(node, self.mesh)

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
