"""``split-weights``: work that every rank repeats is shared out by columns, and gathered once per level.

What only sees the batch (a time step's modulation of every layer: 28% of FLUX's weights) has no tokens to split, so
every rank does all of it, and reads all its weights for a single row. Columns of the result that only weights hold can
be shared out without moving anything but the result. Products that do not depend on each other are a level, and a
level's results travel in one all-gather. It is done where the clock says that the level pays for it.

Peers keep such layers whole on every rank (xDiT, diffusers, ParaAttention).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

from torch import fx

from fastpar.core.errors import OptionError
from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, source_line
from fastpar.graph.schedule import SLACK, calls, shortest
from fastpar.graph.tidy import dead_code
from fastpar.ops.collectives import all_gather, all_to_all, gathers_evenly, local
from fastpar.rules import Call, Pos, is_view, rule_for
from fastpar.sharding.insert import HEAVY, seed_layout

_ATTENTION = "fastpar::attention"
WHY = "columns"
"""What its exchanges are for (``meta["why"]``)."""
Level = tuple[int, tuple[str, ...]]
"""How many repeated products come before those of a level, and the axes along which ranks repeat them."""


@dataclass(frozen=True)
class SplitWeights(Pass):
    """Shares out products that ranks repeat. ``always``: also where it does not pay."""

    name: ClassVar[str] = "split-weights"
    stage_in: ClassVar[str] = "lowered"

    always: bool = False

    def apply(self, program: Program, ctx: PassContext) -> Program:
        if ctx.costs is None:
            raise OptionError("pass 'split-weights' needs a cost model, which a pipeline without a topology lacks")
        levels = sorted(_levels(program, _fixed(program)).items())
        names = {key: [n.name for n in nodes] for key, nodes in levels}
        seconds = shortest(calls(program.graph), ctx.costs.tasks(program.graph)) if levels else 0.0
        for key, level in names.items():
            trial = program.copy()
            shared = self._share(trial, key, level, ctx)
            if not shared:
                continue
            takes = shortest(calls(trial.graph), ctx.costs.tasks(trial.graph))
            if takes <= (1 + SLACK) * seconds or self.always:
                program, seconds = trial, min(seconds, takes)
                continue
            ctx.notes.append(
                f"split-weights: {len(shared)} of the products that every rank repeats stay whole: a call would take "
                f"{1e6 * takes:.0f} us and not {1e6 * seconds:.0f}, for exchanges travel while ranks compute them "
                f"({source_line(shared[0])})"
            )
        program.graph.lint()
        program.gm.recompile()
        return program

    def _share(self, program: Program, key: Level, names: list[str], ctx: PassContext) -> list[fx.Node]:
        """Share out what pays of a level; the products that were (they are no longer in the program)."""
        graph, fixed, (depth, axes) = program.graph, _fixed(program), key
        place = {node: float(i) for i, node in enumerate(graph.nodes)}
        own = {n.name: n for n in graph.nodes}
        level = [_Split(own[name], axes, program.mesh, fixed) for name in names]
        level = [one for one in level if one.possible]
        for one in level:
            one.write(graph, place)
        taken = self._gathered(graph, level, place, ctx)
        for one in level:
            if one in taken:
                one.made[-1].meta["columns"] = (depth, axes)
            else:
                one.erase(graph)
        dead_code(graph)  # whole weights that nothing takes any more
        _settle(graph, place)
        return [one.node for one in taken]

    def _gathered(
        self, graph: fx.Graph, level: list[_Split], place: dict[fx.Node, float], ctx: PassContext
    ) -> list[_Split]:
        """Those of a level that are shared out: each of them saves more than its part of the gather takes."""
        taken = [one for one in level if one.saved(ctx.costs) > 0 or self.always]
        while taken:
            parts = _exchange(graph, taken, level[0].mesh, place)
            exchange: Any = parts[0].args[0]
            task = ctx.costs.task(exchange)
            cost = (task.compute + task.travel + task.unpack) / sum(one.size for one in taken)  # per byte
            paying = [one for one in taken if one.saved(ctx.costs) > cost * one.size or self.always]
            if len(paying) == len(taken):
                for one, part in zip(taken, parts, strict=True):
                    one.take(graph, part)
                return taken
            _erase(graph, [*parts, exchange])
            left = [one for one in taken if one not in paying]
            gain, takes = sum(one.saved(ctx.costs) for one in left), cost * sum(one.size for one in left)
            ctx.notes.append(
                f"split-weights: {len(left)} of the products that every rank repeats stay whole: shared out over "
                f"{'.'.join(level[0].axes)} they would save {1e6 * gain:.0f} us of computing, and their gather takes "
                f"{1e6 * takes:.0f} us ({source_line(left[0].node)})"
            )
            taken = paying
        return []


def _fixed(program: Program) -> set[fx.Node]:
    """Weights, and what is made of weights alone."""
    kinds = zip(program.placeholders, program.inputs, strict=True)
    fixed = {n for n, given in kinds if given.kind in ("parameter", "buffer")}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= fixed:
            fixed.add(node)
    return fixed


def _levels(program: Program, fixed: set[fx.Node]) -> dict[Level, list[fx.Node]]:
    """Products that ranks repeat."""
    mesh, dealt = program.mesh, program.gm.meta.get("dealt")
    depth: dict[fx.Node, int] = {}
    found: dict[Level, list[fx.Node]] = {}
    for node in program.graph.nodes:
        depth[node] = max((depth[n] for n in node.all_input_nodes), default=0)
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.name not in HEAVY or schema.name == _ATTENTION or node in fixed:
            continue
        layouts = [n.meta.get("layout") for n in (node, *node.all_input_nodes)]
        if not all(isinstance(x, Layout) and not x.partial for x in layouts):
            continue
        taken = {dealt}.union(*(x.split_axes for x in layouts))
        axes = tuple(a for a in mesh.names if a not in taken and mesh.size((a,)) > 1)
        if axes and any(n in fixed for n in node.all_input_nodes):
            depth[node] += 1
            found.setdefault((depth[node], axes), []).append(node)
    return found


class _Split:
    """One product, and beside it the same with the columns that a rank takes."""

    def __init__(self, node: fx.Node, axes: tuple[str, ...], mesh: Mesh, fixed: set[fx.Node]) -> None:
        self.node, self.mesh, self.axes = node, mesh, axes
        self.call = Call.of(node)
        self.made: list[fx.Node] = []
        self.layouts: tuple[Layout, ...] = tuple(n.meta["layout"] for n in self.call.operands)
        self.wanted, self.out, self.held = self._columns(fixed)

    @property
    def possible(self) -> bool:
        return self.out is not None

    @property
    def size(self) -> int:
        """Bytes of the whole result."""
        value = self.node.meta["val"]
        return int(value.numel()) * int(value.element_size())

    def _columns(self, fixed: set[fx.Node]) -> tuple[tuple[Layout, ...], Layout | None, dict[int, Pos]]:
        """Layouts of operands and result with the largest dimension cut that only weights hold; and where they do."""
        rule = rule_for(self.call)
        for d in sorted(range(len(self.call.shape)), key=lambda d: -self.call.shape[d]):
            pos = Pos(d, 1, self.call.shape[d], 1)
            back = rule.back(self.call, pos)
            if pos.size < self.mesh.size(self.axes) or not back:
                continue
            if any(self.call.operands[i] not in fixed for i, _ in back):
                continue
            given = list(self.layouts)
            for i, p in back:
                given[i] = seed_layout(given[i], p, self.axes, self.mesh)
            decision = rule.decide(self.call, tuple(given), self.mesh)
            expected = self.node.meta["layout"].with_dim(d, Dim.shared(pos.size, self.axes, self.mesh))
            if not decision.gathers and decision.inputs == tuple(given) and decision.outputs == (expected,):
                return tuple(given), expected, dict(back)
        return (), None, {}

    def write(self, graph: fx.Graph, place: dict[fx.Node, float]) -> None:
        """The product of the rank's columns, behind the whole one."""
        replaced: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(self.node):
            for i, operand in enumerate(self.call.operands):
                if self.wanted[i] != self.layouts[i] and operand not in replaced:
                    replaced[operand] = self._slice(graph, operand, self.held[i], self.wanted[i])
            new = graph.node_copy(self.node, lambda n: replaced.get(n, n))
        new.meta = {**self.node.meta, "layout": self.out}
        self.made.append(new)
        place.update(dict.fromkeys(self.made, place[self.node]))

    def _slice(self, graph: fx.Graph, operand: fx.Node, pos: Pos, wanted: Layout) -> fx.Node:
        """The rank's part of ``operand``: of the weight itself where that is seen through views, so that no rank needs
        to have all of it."""
        views: list[fx.Node] = []
        at, where = operand, pos
        while is_view(at) and len(at.all_input_nodes) == 1 and at.target is not getitem:
            call = Call.of(at)
            back = rule_for(call).back(call, where)
            if len(back) != 1:
                break
            views.append(at)
            at, where = at.all_input_nodes[0], back[0][1]
        steps = self._forward(at, where, views)
        if not steps or steps[-1][1] != wanted:  # the views do not follow the columns
            steps = [(operand, wanted)]
        source, layout = steps[0]
        value = graph.call_function(local, (source, str(source.meta["layout"]), str(layout)))
        value.meta = {**source.meta, "layout": layout, "why": "weight"}
        self.made.append(value)
        for view, layout in steps[1:]:
            value = graph.node_copy(view, lambda _, value=value: value)  # type: ignore[misc]
            value.meta = {**view.meta, "layout": layout}
            self.made.append(value)
        return value

    def _forward(self, source: fx.Node, pos: Pos, views: list[fx.Node]) -> list[tuple[fx.Node, Layout]]:
        """``source`` and its views with their layouts, if ``source`` is cut at ``pos``; none where one objects."""
        layout = seed_layout(source.meta["layout"], pos, self.axes, self.mesh)
        steps = [(source, layout)]
        for view in reversed(views):
            call = Call.of(view)
            decision = rule_for(call).decide(call, (layout,), self.mesh)
            if decision.gathers or decision.inputs != (layout,):
                return []
            layout = decision.outputs[0]
            steps.append((view, layout))
        return steps

    def saved(self, costs: Any) -> float:
        """Seconds on the busiest rank, without the exchange."""
        return float(costs.task(self.node).compute - sum(costs.task(n).compute for n in self.made))

    def take(self, graph: fx.Graph, part: fx.Node) -> None:
        self.node.replace_all_uses_with(part)
        graph.erase_node(self.node)

    def erase(self, graph: fx.Graph) -> None:
        _erase(graph, self.made[::-1])


def _exchange(graph: fx.Graph, level: list[_Split], mesh: Mesh, place: dict[fx.Node, float]) -> list[fx.Node]:
    """One gather of all results of a level; the nodes that take each from it."""
    last = max(one.made[-1] for one in level)
    results = [one.made[-1] for one in level]
    layouts = [(one.out, one.node.meta["layout"]) for one in level]
    evenly = all(gathers_evenly(a, b, mesh) for a, b in layouts if a is not None)
    args = (results, [str(a) for a, _ in layouts], [str(b) for _, b in layouts])
    with graph.inserting_after(last):
        several = graph.call_function(all_gather if evenly else all_to_all, args)
    several.meta = {
        **level[0].node.meta,
        "val": [one.node.meta["val"] for one in level],
        "layout": tuple(b for _, b in layouts),
        "why": WHY,
    }
    parts, after = [], several
    for i, one in enumerate(level):
        with graph.inserting_after(after):
            after = graph.call_function(getitem, (several, i))
        after.meta = dict(one.node.meta)
        parts.append(after)
    first = min(place[one.node] for one in level)
    place.update(dict.fromkeys([several, *parts], first))
    return parts


def _erase(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        graph.erase_node(node)


def _settle(graph: fx.Graph, place: dict[fx.Node, float]) -> None:
    """Nodes in an order in which operands come first, else by ``place``: a level's operands are taken forward."""
    nodes = list(graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [(place[n], number[n]) for n in nodes if not missing[n] and n.op != "output"]
    heapq.heapify(ready)
    end = graph.output_node()
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        end.prepend(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user] and user is not end:
                heapq.heappush(ready, (place[user], number[user]))
