"""Forward: give every value a layout, and insert ``redistribute`` where an operator wants another.

One walk over the captured graph writes the sharded one. A value may exist in several
layouts at once (whole, and sliced at a seed); an operator that wants a layout gets it
from the version it costs fewest bytes from. Each rewrite is locally valid: operators see
exactly the layouts that their rule asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fastpar.core.inherit import inherited
from fastpar.core.layout import Atom, Dim, Layout, Seg, shared_parts
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import Misfit, regroup
from fastpar.core.transfer import elements_sent, is_local
from fastpar.ops.redistribute import redistribute
from fastpar.rules import Call, Decision, Pos, rule_for
from fastpar.sharding.candidates import Seed
from fastpar.sharding.expand import Key, expansion, traced

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Fallback:
    """A gather (or realignment) that an operator forced and no plan asked for."""

    operator: str
    reason: str
    kind: str
    bytes: int  # leaving the busiest rank
    node: fx.Node  # of the sharded graph, for the source line
    at: fx.Node | None = None  # the operator, in the captured graph


@dataclass
class Sharded:
    """What one walk produced: the graph and what it had to do on the way."""

    graph: fx.Graph
    fallbacks: list[Fallback] = field(default_factory=list)
    moved: int = 0  # bytes leaving the busiest rank, all redistributes together
    units: set[int] = field(default_factory=set)  # row granularities that would have avoided a realignment
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)


HEAVY = frozenset(
    ["aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::_scaled_mm",
     "aten::_int_mm", "aten::linear", "fastpar::attention"]  # fmt: skip
)


def heavy_ahead(graph: fx.Graph) -> set[fx.Node]:
    """Nodes from which a product, convolution or attention is still to come."""
    ahead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node in ahead or (schema is not None and schema.name in HEAVY):
            ahead.update(node.all_input_nodes)
    return ahead


def seed_layout(
    layout: Layout, pos: Pos, axes: tuple[str, ...], mesh: Mesh, unit: int = 1, before: int = 0
) -> Layout:
    """``layout`` with the factor ``pos`` shared out over ``axes``, in multiples of ``unit`` rows (``shared_parts``).

    The factor itself must be whole; those above and below it may be split over other axes.
    """
    if pos.size % unit:
        unit = 1
    parts = shared_parts(pos.size, mesh.shares(axes), unit, before)
    around = regroup((layout.dims[pos.dim],), (pos.outer, pos.size, pos.inner))
    if isinstance(around, Misfit) or not around[1].is_whole:
        return layout
    middle = Atom((Seg(pos.size, axes, parts),))
    return layout.with_dim(pos.dim, Dim.of([*around[0].atoms, middle, *around[2].atoms]))


def gathered(have: Layout, want: Layout) -> bool:
    """Whether some split axes become whole, and others stay."""
    return bool(want.split_axes) and bool(have.split_axes - want.split_axes)


class Inserter:
    """Writes the sharded graph of ``graph`` for seeds that are each cut over axes of ``mesh``, in ``unit`` rows.

    ``weights`` has layouts of placeholders, for the weights that are cut.
    """

    def __init__(
        self,
        graph: fx.Graph,
        mesh: Mesh,
        seeds: Sequence[tuple[Seed, Axes]],
        unit: int = 1,
        weights: Mapping[fx.Node, Layout] | None = None,
        known: dict[Key, fx.Graph] | None = None,
    ) -> None:
        self.mesh, self.unit, self.weights = mesh, unit, weights or {}
        self.within: fx.Node | None = None  # what is being written out
        self.known = {} if known is None else known  # what was written out before, traced
        self.seeds: dict[fx.Node, list[tuple[Seed, Axes]]] = {}
        for seed, axes in seeds:
            if mesh.size(axes) > 1:
                self.seeds.setdefault(seed.node, []).append((seed, axes))
        self.source = graph
        self.out = Sharded(fx.Graph())
        self.versions: dict[fx.Node, dict[Layout, fx.Node]] = {}
        self.main: dict[fx.Node, Layout] = {}
        self.results: dict[fx.Node, list[fx.Node]] = {}  # of operators with several, written out
        # axes along which a value is split that is made from whole ones, and could be split otherwise (``cut_late``)
        self.loose: dict[fx.Node, frozenset[str]] = {}
        self.ahead = heavy_ahead(graph)

    def run(self) -> Sharded:
        for node in self.source.nodes:
            if node.op == "output":
                self._output(node)
                continue
            tensor = isinstance(node.meta.get("val"), torch.Tensor)
            if node.op == "call_function" and (tensor or _is_tuple(node)):
                self._call(node)
            else:
                self._copy(node, tensor)
            if tensor and node in self.seeds:
                self._seed(node)
        return self.out

    # -- versions of values ---------------------------------------------------------------

    def _hold(self, old: fx.Node, new: fx.Node, layout: Layout, main: bool = True) -> None:
        new.meta["layout"] = layout
        self.versions.setdefault(old, {})[layout] = new
        if main:
            self.main[old] = layout
            self.out.values[old] = new

    def _get(self, old: fx.Node, want: Layout, why: str) -> fx.Node:
        """``old`` in layout ``want``, from whichever version moves the fewest bytes."""
        held = self.versions[old]
        if want in held:
            return held[want]
        src = min(held, key=lambda x: (max(elements_sent(x, want, self.mesh)), len(x.split_axes)))
        node = self.out.graph.call_function(redistribute, (held[src], str(src), str(want)))
        node.meta = {**inherited(old.meta), "val": old.meta["val"], "layout": want, "why": why}
        held[want] = node
        if not self._is_loose(old, src, want):
            self.out.moved += max(elements_sent(src, want, self.mesh)) * old.meta["val"].element_size()
        return node

    def _seed(self, node: fx.Node) -> None:
        want = self.main[node].summed()
        before = want.axes
        for seed, axes in self.seeds[node]:
            if not set(axes) & want.axes:  # else rows of another dimension are split here already
                want = seed_layout(want, seed.pos, axes, self.mesh, self.unit, seed.before)
        self._hold(node, self._get(node, want, "seed"), want)
        self.loose[node] = self._loose(node) | (want.axes - before)

    # -- nodes ----------------------------------------------------------------------------

    def _copy(self, node: fx.Node, tensor: bool) -> None:
        """Placeholders, constants, operators on numbers and those without a result: as they are, on whole values."""

        def whole(n: fx.Node) -> fx.Node:
            return self._get(n, Layout.whole(n.meta["val"].shape), "plan") if n in self.main else self.out.values[n]

        new = self.out.graph.node_copy(node, whole)
        self.out.values[node] = new
        if tensor:
            self._hold(node, new, Layout.whole(node.meta["val"].shape))
        if node in self.weights:
            self._hold(node, self._get(node, self.weights[node], "weight"), self.weights[node])

    def _output(self, node: fx.Node) -> None:
        def arg(n: fx.Node) -> fx.Node:
            if n in self.main:
                return self._get(n, Layout.whole(n.meta["val"].shape), "output")
            return self.out.values[n]

        args = fx.map_arg(node.args, arg)
        new = self.out.graph.output(args[0])
        new.meta = dict(node.meta)

    def _call(self, node: fx.Node, expand: bool = True) -> None:
        if getattr(node.target, "__name__", "") == "getitem":
            self._getitem(node)
            return
        if node.target is redistribute:  # an expansion says how to cut
            want = Layout.parse(str(node.args[2]))
            free = is_local(self.main[node.args[0]], want, self.mesh)  # type: ignore[index]
            self._hold(node, self._get(node.args[0], want, "seed" if free else "rows"), want)  # type: ignore[arg-type]
            self._loosen(node, node.all_input_nodes)
            return
        call = Call.of(node, tail=node not in self.ahead)
        layouts = tuple(self.main[n] for n in call.operands)
        written = expansion(call, layouts, self.mesh) if expand else None
        if written is not None:
            self._inline(node, call, traced(call, written, layouts, self.mesh, self.known))
            return
        decision = self._decide(call, layouts)
        if call.tail and any(gathered(layouts[g.operand], decision.inputs[g.operand]) for g in decision.gathers):
            # what is gathered here is the output's, which needs all of it: one gather, not one per axis
            decision = rule_for(call).decide(call, tuple(Layout.whole(s) for s in call.shapes), self.mesh)
        new = self._emit(call, self._operands(call, decision, layouts), decision)
        if isinstance(node.meta["val"], torch.Tensor):
            self._hold(node, new, new.meta["layout"])
            if call.name not in HEAVY:
                self._loosen(node, call.operands)
        else:
            new.meta["layout"] = _nest(node.meta["val"], decision.outputs)
            self.out.values[node] = new

    def _decide(self, call: Call, layouts: tuple[Layout, ...]) -> Decision:
        """What the rule decides; where that moves rows that only others have, what it decides as if all that is loose
        were whole, if that moves fewer."""
        rule = rule_for(call)
        decision = rule.decide(call, layouts, self.mesh)
        loose = [self._loose(n) for n in call.operands]
        if any(loose) and (moved := self._moved(call, layouts, decision)):
            other = rule.decide(call, tuple(x.without(y) or x for x, y in zip(layouts, loose, strict=True)), self.mesh)
            if self._moved(call, layouts, other) < moved:
                return other
        return decision

    def _moved(self, call: Call, layouts: Sequence[Layout], decision: Decision) -> int:
        """Elements that leave the busiest rank for a decision's layouts, but for what is loose."""
        moves = [(x.summed(), want) for n, x, want in zip(call.operands, layouts, decision.inputs, strict=True)
                 if not self._is_loose(n, x.summed(), want)]  # fmt: skip
        return sum(max(elements_sent(x, want, self.mesh)) for x, want in moves)

    def _loose(self, node: fx.Node) -> frozenset[str]:
        return self.loose.get(node, frozenset())

    def _is_loose(self, node: fx.Node, have: Layout, want: Layout) -> bool:
        """Whether all along which a value's rows would move are axes along which it is loose."""
        return have.differing(want) <= self._loose(node)

    def _loosen(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        """Note along which axes a value is loose: no operand that is split along them is not."""
        held = frozenset[str]().union(*(self.main[n].axes - self._loose(n) for n in operands))
        self.loose[node] = self.main[node].split_axes - held

    def _inline(self, node: fx.Node, call: Call, graph: fx.Graph) -> None:
        """Walk over ``graph`` in the place of ``node``."""
        operands = iter(call.operands)
        outermost, self.within = self.within, self.within or node
        for inner in graph.nodes:
            if inner.op == "placeholder":
                self._alias(inner, next(operands))
            elif inner.op == "call_function":
                if node in self.ahead:
                    self.ahead.add(inner)
                self._call(inner, expand=inner.target is not node.target)  # an operator may be part of its own
            else:
                result = inner.args[0]
        self.within = outermost
        if isinstance(result, fx.Node):
            self._alias(node, result)
            self.out.values[node].meta["origin"] = node.name
        else:
            self.results[node] = list(result)

    def _alias(self, node: fx.Node, same: fx.Node) -> None:
        """``node`` is the value ``same`` under another name."""
        self.versions[node] = self.versions[same]
        self.main[node] = self.main[same]
        self.loose[node] = self._loose(same)
        self.out.values[node] = self.out.values[same]

    def _operands(self, call: Call, decision: Decision, layouts: Sequence[Layout]) -> list[fx.Node]:
        forced = {g.operand: g for g in decision.gathers}
        operands = []
        for i, (old, have, want) in enumerate(zip(call.operands, layouts, decision.inputs, strict=True)):
            before = self.out.moved
            known = want in self.versions[old]
            why = "output" if call.tail and not want.split_axes else "plan"  # the last convolution has a halo, too
            if i in forced and not call.tail:
                why = forced[i].kind
            elif have.partial:
                why = "reduce"
            operands.append(self._get(old, want, why))
            if i in forced and not call.tail and not known and not is_local(have, want, self.mesh):
                gather = forced[i]
                self.out.fallbacks.append(
                    Fallback(
                        call.name,
                        gather.reason,
                        gather.kind,
                        self.out.moved - before,
                        operands[-1],
                        self.within or call.node,
                    )
                )
                operands[-1].meta["reason"] = gather.reason
                operands[-1].meta.update(inherited(call.node.meta))  # the operator that forced it, not its producer
                if gather.reason.startswith("the view cuts rows into multiples of "):
                    self.out.units.add(int(gather.reason.rsplit(" ", 1)[1]))
        return operands

    def _emit(self, call: Call, operands: Sequence[fx.Node], decision: Decision) -> fx.Node:
        node, target = call.node, call.node.target
        args, kwargs = replace_operands(call, operands, self.out.values)
        new = self.out.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        new.meta = dict(node.meta)
        if self.within is None:  # else it is named after nothing that was captured
            new.meta["origin"] = node.name
        if len(decision.outputs) == 1:
            new.meta["layout"] = decision.outputs[0]
        return new

    def _getitem(self, node: fx.Node) -> None:
        if node.args[0] in self.results:
            self._alias(node, self.results[node.args[0]][node.args[1]])  # type: ignore[index]
            return
        source = self.out.values[node.args[0]]  # type: ignore[index]
        new = self.out.graph.call_function(node.target, (source, node.args[1]))  # type: ignore[arg-type]
        new.meta = dict(node.meta)
        layout = source.meta["layout"][node.args[1]]
        if isinstance(node.meta.get("val"), torch.Tensor):
            self._hold(node, new, layout)
        else:
            new.meta["layout"] = layout
            self.out.values[node] = new


def replace_operands(
    call: Call, operands: Sequence[fx.Node], values: Mapping[fx.Node, fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with its tensor operands (in order) and other nodes replaced."""
    queue = iter(operands)

    def leaf(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if isinstance(value.meta.get("val"), torch.Tensor):
            return next(queue)
        return values[value]

    args, kwargs = pytree.tree_map(leaf, (call.args, call.kwargs), is_leaf=_is_node)
    return args, kwargs


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_tuple(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)


def _nest(value: Any, outputs: Sequence[Layout]) -> tuple[Layout | None, ...]:
    queue = iter(outputs)
    return tuple(next(queue) if isinstance(v, torch.Tensor) else None for v in value)
