"""Where values are cut: as early as possible, and not before what is cheaper to repeat than to exchange.

Cuts move up: of a value that every rank makes whole only to keep its part, each makes its part.

Rules go forward, and what begins whole stays whole until it meets something split: a mask over places is made from
ranges, ``Q x K`` of it on every rank, and cut where the attention is. Here the rules are asked backward, which parts
of the operands give this part of the result, and those are cut, as far up as nobody needs the value whole.

Cuts move down: what a rank can make from what it has whole need not come from others. So the first convolution of a
model, whose operand is the sample with rows put around it, exchanges no halos (DistriFusion cuts the sample with its
halos there, too), and a modulation that is spread over all rows is spread over those that the rows meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import fx

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import elements_sent, is_local
from fastpar.ops.redistribute import redistribute
from fastpar.rules import Call, is_view, rule_for
from fastpar.sharding.insert import HEAVY, replace_operands
from fastpar.sharding.rewrite import redistributed


def cut_early(graph: fx.Graph, mesh: Mesh) -> None:
    """Rewrite, in place, a sharded graph in which cuts stand right behind what they cut.

    A value that is cut in several ways is left whole where its parts together are more than it is. Products and
    attentions stay as they are: who shares those out, weighs what it costs (``split-weights``).
    """
    only_cut = _only_cut(graph, mesh)
    parts = _Parts(graph, mesh)
    for node in [n for n in graph.nodes if n in only_cut]:
        have: Layout = node.meta["layout"]
        cuts = [u for u in node.users if _cuts(u, mesh)]
        wants = {_once(u.meta["layout"]) for u in cuts}
        if not wants or sum(_elements(want, mesh) for want in wants) > _elements(have, mesh):
            continue
        chain = _ancestors(node, only_cut)
        for user in cuts:
            want = _once(user.meta["layout"])
            axes = have.differing(want)
            parts.make(parts.steps(chain, node, want, axes) or (), axes)
            part = parts.get(node, want)
            user.replace_all_uses_with(redistributed(user, part, user.meta["layout"], user.meta["why"]))
    graph.eliminate_dead_code()


AT_ONCE = 1 << 22
"""Numbers that a device reads and writes in less time than a message needs, however short it is: microseconds."""
PER_NUMBER = 4
"""Numbers that a device at least reads and writes in the time in which one travels, on the fastest links."""

_PLANNED = ("attention", "reduce", "output")
"""What travels for these is what a plan says that it sends, however it was made."""


def cut_late(graph: fx.Graph, mesh: Mesh) -> None:
    """Of what is exchanged, make in place what every rank can make from whole values, where that takes no longer.

    Products and attentions are not repeated; random numbers are whole on all ranks anyway.
    """
    parts = _Parts(graph, mesh)
    for node in list(graph.nodes):
        if node.target is not redistribute or node.meta.get("why") in _PLANNED or is_free(node, mesh):
            continue
        given: fx.Node = node.args[0]  # type: ignore[assignment]
        have, want = given.meta["layout"], _once(node.meta["layout"])
        axes = have.differing(want)
        value, chain = _value(given, axes), _behind(given, axes)
        steps = None if chain is None else parts.steps(chain, value, want, axes)
        if steps is None:
            continue
        layouts = [user.meta.get("layout") for user in node.users]
        read = max((_elements(x, mesh) for x in layouts if isinstance(x, Layout)), default=0)
        travel = PER_NUMBER * max(elements_sent(have, node.meta["layout"], mesh))
        if sum(_elements(layout, mesh) for one, layout, _ in steps if not is_view(one)) <= max(read, travel, AT_ONCE):
            parts.make(steps, axes)
            node.args = (parts.get(value, want), str(want), node.args[2])
    graph.eliminate_dead_code()


def _behind(node: fx.Node, axes: frozenset[str]) -> list[fx.Node] | None:
    """What lies between ``node`` and values that are whole along ``axes``, in order; None where something has to come
    from others."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = _value(todo.pop(), axes)
        layout = n.meta.get("layout")
        if n in found or (isinstance(layout, Layout) and not layout.axes & axes):
            continue
        schema = getattr(n.target, "_schema", None)
        if not isinstance(layout, Layout) or schema is None or schema.name in HEAVY or schema.is_mutable:
            return None
        if not n.all_input_nodes:
            return None
        found.add(n)
        todo += n.all_input_nodes
    return sorted(found)


def _value(node: fx.Node, axes: frozenset[str]) -> fx.Node:
    """What a node is a cut of, or the same in another layout, where it is split along ``axes``."""
    while node.target is redistribute and node.meta["layout"].axes & axes:
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_free(node: fx.Node, mesh: Mesh) -> bool:
    """Whether a redistribute sends nothing."""
    return is_local(node.args[0].meta["layout"], node.meta["layout"], mesh)  # type: ignore[union-attr]


def _elements(layout: Layout, mesh: Mesh) -> int:
    """Numbers on the busiest rank."""
    return max(math.prod(layout.local_shape(mesh, rank)) for rank in range(mesh.ranks))


def _only_cut(graph: fx.Graph, mesh: Mesh) -> set[fx.Node]:
    """Values of which ranks only need parts, themselves or of what is made from them."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if _movable(node) and all(u in found or _cuts(u, mesh) for u in node.users):
            found.add(node)
    return found


def _movable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or node.target is redistribute or schema is None or not node.users:
        return False
    layout = node.meta.get("layout")
    return isinstance(layout, Layout) and not layout.partial and schema.name not in HEAVY and not schema.is_mutable


def _cuts(node: fx.Node, mesh: Mesh) -> bool:
    """Whether a node only takes a rank's part of what it has."""
    return node.target is redistribute and is_free(node, mesh)


def _ancestors(node: fx.Node, among: set[fx.Node]) -> list[fx.Node]:
    """``node`` and what it is made from ``among`` these, in order."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in among and n not in found:
            found.add(n)
            todo += n.all_input_nodes
    return sorted(found)


_Step = tuple[fx.Node, Layout, tuple[Layout, ...] | Layout]
"""A value, a layout to have it in, and those that its operands are needed in for that, or the one it is cut from."""


class _Parts:
    """Values in layouts that they do not have, made anew from what ranks hold; nothing is exchanged for it."""

    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh
        self.made: dict[tuple[fx.Node, Layout], fx.Node] = {}

    def steps(
        self, chain: Sequence[fx.Node], value: fx.Node, want: Layout, axes: frozenset[str]
    ) -> list[_Step] | None:
        """How to have ``value`` as ``want``, the last step first; None where that takes an exchange.

        ``chain`` (in order) is what may be made anew, from values that are whole along ``axes``.
        """
        wanted = {value: [want]}
        out: list[_Step] = []
        for node in reversed(chain):
            layouts = wanted.pop(node, [])
            for layout in layouts:  # grows on the way
                have: Layout = node.meta["layout"]
                if layout == have or (node, layout) in self.made:
                    continue
                ins = self._operands(node, layout, axes)
                if ins is not None:
                    out.append((node, layout, ins))
                    for operand, each in zip(Call.of(node).operands, ins, strict=True):
                        _add(wanted.setdefault(_value(operand, axes), []), each)
                    continue
                whole = have.without(axes)
                if whole is None or whole == layout or not is_local(whole, layout, self.mesh):
                    return None
                out.append((node, layout, whole))
                _add(layouts, whole)
        outside = ((n.meta["layout"], layout) for n, layouts in wanted.items() for layout in layouts)
        return out if all(is_local(have, layout, self.mesh) for have, layout in outside) else None

    def make(self, steps: Iterable[_Step], axes: frozenset[str]) -> None:
        """Insert what ``steps`` for these axes say."""
        for node, layout, given in reversed(list(steps)):
            if isinstance(given, Layout):
                self.made[node, layout] = self._cut(self.get(node, given), layout)
                continue
            call = Call.of(node)
            queue = [self.get(_value(n, axes), each) for n, each in zip(call.operands, given, strict=True)]
            args, kwargs = replace_operands(call, queue, {n: n for n in node.all_input_nodes})
            with self.graph.inserting_before(node):
                new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            new.meta = {**node.meta, "layout": layout}
            self.made[node, layout] = new

    def get(self, value: fx.Node, layout: Layout) -> fx.Node:
        """``value`` as ``layout``: made before, or cut from what it is."""
        if (value, layout) not in self.made:
            self.made[value, layout] = self._cut(value, layout)
        return self.made[value, layout]

    def _cut(self, value: fx.Node, layout: Layout) -> fx.Node:
        with self.graph.inserting_after(value):
            return redistributed(None, value, layout, "seed")

    def _operands(self, node: fx.Node, want: Layout, axes: frozenset[str]) -> tuple[Layout, ...] | None:
        """Layouts of the operands that give ``want``; None where the rule cannot say, or they are no parts either."""
        call = Call.of(node)
        if want.axes & axes:
            ins = rule_for(call).operands_for(call, want)
            if ins is None or not any(x.axes & axes for x in ins):
                return None
        else:
            whole = [operand.meta["layout"].without(axes) for operand in call.operands]
            ins = tuple(x for x in whole if x is not None)
            if len(ins) < len(whole):
                return None
        decision = rule_for(call).decide(call, ins, self.mesh)
        if decision.inputs != ins or decision.outputs != (want,) or decision.gathers:
            return None
        return ins


def _add(layouts: list[Layout], one: Layout) -> None:
    if one not in layouts:
        layouts.append(one)


def _once(layout: Layout) -> Layout:
    """``layout`` with each axis in one dimension only: a ring's columns, windows along the axes that have cut the
    rows, are cut from the rows."""
    taken: set[str] = set()
    dims = []
    for dim in layout.dims:
        dims.append(Dim.whole(dim.size) if dim.axes & taken else dim)
        taken |= dim.axes
    return Layout(tuple(dims))
