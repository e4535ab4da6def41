"""``pack``: collectives of one place become one message: Q, K and V of an attention, K and V of a gather.

Several collectives of one kind over the same ranks are one place if all their operands are there before any of their
results is used. They then start together, with the last operand. What that saves is latency; what it may cost is that
the first could have travelled while the others' operands were still computed, so ``overlap`` weighs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.collectives import COLLECTIVES, all_reduce, axes_of, dtypes_of, layouts_of
from fastpar.ops.quantize import quantize

aten = torch.ops.aten


@dataclass(frozen=True)
class Pack(Pass):
    """Joins collectives of one place. ``ahead``: the one whose operand is there first travels alone, ahead of the
    others (V, which needs no norm and no rotation)."""

    name: ClassVar[str] = "pack"
    stage_in: ClassVar[str] = "lowered"

    ahead: bool = False

    def apply(self, program: Program, ctx: PassContext) -> Program:
        place = {node: i for i, node in enumerate(program.graph.nodes)}
        depth = _depths(program.graph) if self.ahead else {}
        for group in _places(program.graph, place, ctx.mesh):
            if self.ahead:
                group = _but_first(group, depth)
            if len(group) > 1:
                (_stack if _alike(group) else _join)(program.graph, sorted(group))
        program.gm.recompile()
        return program


def _places(graph: fx.Graph, place: dict[fx.Node, int], mesh: Mesh) -> list[list[fx.Node]]:
    """Groups of collectives that can be one, each in program order."""
    groups: list[list[fx.Node]] = []
    growing: dict[Any, tuple[list[fx.Node], int]] = {}  # kind -> the group, and where its first use stands
    several = [n for n in graph.nodes if n.target in COLLECTIVES]
    for node in sorted(several, key=lambda n: _ready(n, place)):
        key, used = _kind(node, mesh), _first_use(node, place)
        group, until = growing.get(key, ([], -1))
        if group and _ready(node, place) < until:
            group.append(node)
            growing[key] = (group, min(until, used))
        else:
            groups.append([node])
            growing[key] = (groups[-1], used)
    return groups


def _ready(node: fx.Node, place: dict[fx.Node, int]) -> int:
    """Where the last operand of the collective stands."""
    return max(place[operand] for operand in node.all_input_nodes)


def _kind(node: fx.Node, mesh: Mesh) -> tuple[Any, ...]:
    """What collectives must have in common to be one: kind and ranks, and how often they run (once per generation, or
    in every step); of sums also the dtype, and what they sum by."""
    sums = (node.args[1], *dtypes_of(node)[:1]) if node.target is all_reduce else ()
    return node.target, axes_of(node, mesh), bool(node.meta.get("hoisted")), *sums


def _first_use(node: fx.Node, place: dict[fx.Node, int]) -> int:
    """Where a result of the collective is first used; by another collective, where that one could move to."""
    uses = [user for part in node.users for user in (part.users if part.target is getitem else [part])]
    where = [_ready(user, place) if user.target in COLLECTIVES else place[user] for user in uses]
    return min(where, default=len(place))


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """Operators on the longest way to each node: which of several operands is there first."""
    depths: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depths[node] = 1 + max((depths[n] for n in node.all_input_nodes), default=0)
    return depths


def _but_first(group: list[fx.Node], depth: dict[fx.Node, int]) -> list[fx.Node]:
    """The group without the one that is there before all others, if one is."""
    by_depth = sorted(group, key=lambda n: depth[n])
    ahead = len(group) > 2 and depth[by_depth[0]] < depth[by_depth[1]]
    return [n for n in group if not ahead or n is not by_depth[0]]


def _join(graph: fx.Graph, group: list[fx.Node]) -> None:
    """One collective for ``group``, which is in program order, behind the last operand."""
    behind = max(n for one in group for n in one.all_input_nodes)
    last = group[-1]
    if last.target is all_reduce:
        args: tuple[Any, ...] = ([x for n in group for x in n.args[0]], *last.args[1:])  # type: ignore[union-attr]
    else:
        args = tuple([x for n in group for x in n.args[i]] for i in range(3))  # type: ignore[union-attr]
    with graph.inserting_after(behind):
        joined = graph.call_function(last.target, args)  # type: ignore[arg-type]
    joined.meta = {
        **last.meta,
        "val": [v for n in group for v in n.meta["val"]],
        "layout": tuple(x for n in group for x in n.meta["layout"]),
    }
    offset, after = 0, joined
    for node in group:
        for part in list(node.users):  # all of them getitem
            with graph.inserting_after(after):
                after = graph.call_function(getitem, (joined, offset + int(part.args[1])))  # type: ignore[call-overload]
            after.meta = dict(part.meta)
            part.replace_all_uses_with(after)
            graph.erase_node(part)
        offset += len(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)


def _alike(group: list[fx.Node]) -> bool:
    """Whether these are values of one shape on the same way to an attention (or from one), and numbers."""
    values = [(*map(str, layouts_of(node)), *dtypes_of(node)) for node in group]
    parts = [part for node in group for part in node.users]
    return (
        len(set(values)) == 1
        and all(len(node.meta["val"]) == 1 and node.args[0][0].target is not quantize for node in group)  # type: ignore
        and len(orders := {_permutation(part) for part in parts}) == 1
        and None not in orders
    )


def _permutation(part: fx.Node) -> str | None:
    """How users permute what they get: what ``arrange`` wrote; None where they do something else with it."""
    back = {str(user.args[1]) for user in part.users if user.target is aten.permute.default}
    rest = [user for user in part.users if user.target not in (aten.permute.default, *COLLECTIVES)]
    return back.pop() if len(back) == 1 and not rest else None


def _stack(graph: fx.Graph, group: list[fx.Node]) -> None:
    """One collective for values of one shape: row by row next to each other, so that rows that come still adjoin.

    Behind one another, a peer's keys would lie between its queries and the next peer's.
    """
    place = max(x for node in group for x in node.all_input_nodes)

    def emit(target: Any, args: tuple[Any, ...], value: Any, layout: Any, like: fx.Node) -> fx.Node:
        nonlocal place
        with graph.inserting_after(place):
            place = graph.call_function(target, args)
        place.meta = {**inherited(like.meta, "why", "hoisted"), "val": value, "layout": layout}
        return place

    def beside(layout: Layout, count: int) -> Layout:
        return Layout((layout.dims[0], Dim.whole(count), *layout.dims[1:]))

    first = group[0]
    [src], [dst] = layouts_of(first)
    rows = []
    for node in group:
        x: Any = node.args[0][0]  # type: ignore[index, union-attr]
        rows.append(emit(aten.unsqueeze.default, (x, 1), x.meta["val"].unsqueeze(1), beside(src, 1), node))
    src, dst = (beside(layout, len(group)) for layout in (src, dst))
    value = torch.cat([x.meta["val"] for x in rows], 1)
    stacked = emit(aten.cat.default, (rows, 1), value, src, first)
    several = emit(first.target, ([stacked], [str(src)], [str(dst)]), [value], (dst,), first)
    several.meta = {**first.meta, **several.meta}
    came = emit(getitem, (several, 0), value, dst, first)
    for i, node in enumerate(group):
        for part in list(node.users):
            part.replace_all_uses_with(emit(aten.select.int, (came, 1, i), part.meta["val"], part.meta["layout"], part))
            graph.erase_node(part)
        graph.erase_node(node)
