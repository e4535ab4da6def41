"""Which dimensions of weights can be cut so that products need no one else's columns (tensor parallelism).

Megatron-LM (section 3) cuts a block's first weight by columns and its second by rows: between
them every rank works on its own columns, and one sum over ranks follows. Here the pairs are
found, not told. From the contracted dimension of every product with a weight the rules are
read backward, as far as they pass the factor through (pointwise, views, heads of an
attention, groups of a norm), to products whose columns it is. What lies on the way says in
which grains the factor can be cut: heads, grouped heads, groups of channels. Weights that
several layers share out (fused Q, K and V; the two halves of a gated layer; attention and MLP
side by side) come out as segments of one dimension.

A product can give its columns or take its rows, not both: where sets of products want both,
that with the fewest bytes to sum per multiplication wins. So a residual stream stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import getitem

import torch
from torch import fx

from fastpar.core.layout import Atom, Dim, Layout, Seg, shared_parts
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import Misfit, regroup
from fastpar.core.transfer import is_local
from fastpar.ops.redistribute import redistribute
from fastpar.rules import Call, Pos, rule_for
from fastpar.rules.pointwise import PointwiseRule
from fastpar.rules.spatial import contracts
from fastpar.rules.views import view_back_major
from fastpar.sharding.candidates import Seed, Walk, is_attention
from fastpar.sharding.insert import HEAVY, Sharded
from fastpar.sharding.work import depth

# Of a product: the operands that are multiplied, and in which dimension of each the contracted factor is.
_CONTRACTED: Mapping[str, tuple[int, int, int, int]] = {
    "aten::mm": (0, 1, 1, 0),
    "aten::addmm": (1, 1, 2, 0),
    "aten::bmm": (0, 2, 1, 1),
    "aten::linear": (0, -1, 1, 1),
    "aten::convolution": (0, 1, 1, 1),
}


@dataclass
class Factor:
    """One factor that is cut everywhere alike: seeds in weights, and the grains that they have in common."""

    seeds: set[Seed] = field(default_factory=set)
    grains: int = 0


@dataclass
class Group:
    """Products that share factors: ``columns`` give them, ``rows`` contract them, ``inside`` is between."""

    rows: set[fx.Node]
    columns: set[fx.Node]
    factors: list[Factor]
    inside: set[fx.Node] = field(default_factory=set)

    @property
    def seeds(self) -> set[Seed]:
        return {seed for factor in self.factors for seed in factor.seeds}

    def price(self) -> float:
        """Elements to sum per multiply-add that is divided."""
        work = sum(_numel(n) * depth(n) for n in self.inside | self.rows if _heavy(n))
        return sum(_numel(n) for n in self.rows) / max(1, work)

    def holds(self, node: fx.Node) -> bool:
        return node in self.inside or node in self.rows


def find_weights(graph: fx.Graph, weights: Collection[fx.Node]) -> list[Group]:
    """Groups of a captured graph that can be cut together, none in another's way, cheapest first.

    ``weights`` are the placeholders of parameters.
    """
    walk = _WeightWalk(graph, weights)
    found = [group for node in graph.nodes if (group := walk.group(node)) is not None]
    kept: list[Group] = []
    for group in sorted(filter(walk.closed, _merged(found)), key=Group.price):
        if not any(_in_the_way(group, other) for other in kept):
            kept.append(group)
    return kept


def layouts_of(groups: Collection[Group], axes: tuple[str, ...], mesh: Mesh) -> dict[fx.Node, Layout]:
    """Layouts of the weights whose products the groups are: every factor in whole grains over ``axes``."""
    pieces: dict[tuple[fx.Node, int], dict[Pos, tuple[int, ...]]] = {}
    for factor in (f for group in groups for f in group.factors):
        grains = shared_parts(factor.grains, mesh.shares(axes))
        for seed in factor.seeds:
            each = seed.pos.size * seed.pos.inner // factor.grains
            parts = tuple(n * each for n in grains)
            pieces.setdefault((seed.node, seed.pos.dim), {})[seed.pos] = parts
    out: dict[fx.Node, Layout] = {}
    for (node, dim), held in sorted(pieces.items(), key=lambda item: item[0]):  # of sets, so in no order
        layout = out.get(node) or Layout.whole(node.meta["val"].shape)
        cut = _dim(layout.shape[dim], held, axes)
        if cut is not None and layout.is_whole:
            out[node] = layout.with_dim(dim, cut)
    return out


def layouts_of_slices(sharded: Sharded, weights: Collection[fx.Node], mesh: Mesh) -> dict[fx.Node, Layout]:
    """Layouts of the weights of which a sharded graph only takes slices of a permutation, a view or a cast.

    So the weights that are cut by rows, which no walk has as seeds: their slices follow from the columns.
    """
    out: dict[fx.Node, Layout] = {}
    for weight in weights:
        node, ways = sharded.values[weight], []
        while len(node.users) == 1 and next(iter(node.users)).target in _MOVES:
            node = next(iter(node.users))
            ways.append(node)
        wants = {user.meta["layout"] for user in node.users}
        if len(wants) != 1 or any(u.target is not redistribute for u in node.users):
            continue
        layout: Layout | None = wants.pop()
        for way in reversed(ways):
            layout = _before(way, layout) if layout is not None else None
        if layout is not None and is_local(Layout.whole(layout.shape), layout, mesh):
            out[weight] = layout
    return out


_MOVES = (torch.ops.aten.permute.default, torch.ops.aten.view.default, torch.ops.aten._to_copy.default)


def _before(node: fx.Node, layout: Layout) -> Layout | None:
    """What the operand of a movement must have for the result to have ``layout``; None where no cut gives it."""
    if node.target is torch.ops.aten.permute.default:
        order: list[int] = node.args[1]  # type: ignore[assignment]
        return Layout(tuple(layout.dims[order.index(d)] for d in range(len(order))))
    if node.target is torch.ops.aten.view.default:
        dims = regroup(layout.dims, node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        return None if isinstance(dims, Misfit) else Layout(dims)
    return layout


def _dim(size: int, held: Mapping[Pos, tuple[int, ...]], axes: tuple[str, ...]) -> Dim | None:
    """``held`` factors of one dimension as its segments, what is between them whole; None where they overlap."""
    segs: list[Seg] = []
    at = 0
    for pos, parts in sorted(held.items(), key=lambda item: (item[0].start, item[0].outer, item[0].size)):
        if pos.start < at:
            return None
        one = Seg(pos.size * pos.inner, axes, parts)
        if pos.extent == size and pos.outer > 1:
            return Dim.of([Atom((Seg(pos.outer),)), Atom((one,))])
        segs += [Seg(pos.start - at), *[one] * pos.outer]
        at = pos.start + pos.extent
    return Dim.of([Atom((*segs, Seg(size - at)))])


def _merged(found: list[Group]) -> list[Group]:
    """Groups that share a seed are one: two products contract the same columns (joint attention's two outputs)."""
    owner: dict[Seed, Group] = {}
    out: list[Group] = []
    for group in found:
        others = {id(o): o for s in group.seeds if (o := owner.get(s)) is not None}
        for other in others.values():
            group = Group(group.rows | other.rows, group.columns | other.columns, group.factors + other.factors)
            out.remove(other)
        group.factors = _joined(group.factors)
        out.append(group)
        owner.update(dict.fromkeys(group.seeds, group))
    return out


def _joined(factors: list[Factor]) -> list[Factor]:
    """Factors with a common seed are one, in grains that suit both."""
    out: list[Factor] = []
    for factor in factors:
        for other in [o for o in out if o.seeds & factor.seeds]:
            factor = Factor(factor.seeds | other.seeds, math.gcd(factor.grains, other.grains))
            out.remove(other)
        out.append(factor)
    return out


def _in_the_way(a: Group, b: Group) -> bool:
    """One product cannot give columns and contract rows over one axis; nor one weight be cut in two ways."""
    if a.columns & b.rows or a.rows & b.columns or a.rows & b.rows:
        return True
    spans: dict[tuple[fx.Node, int], list[Pos]] = {}
    for seed in b.seeds:
        spans.setdefault((seed.node, seed.pos.dim), []).append(seed.pos)
    return any(
        p.start < s.pos.start + s.pos.extent and s.pos.start < p.start + p.extent
        for s in a.seeds
        for p in spans.get((s.node, s.pos.dim), ())
    )


class _WeightWalk(Walk):
    """Back from a contracted factor. A factor may be a segment of a dimension; a concatenation cuts it in several."""

    def __init__(self, graph: fx.Graph, weights: Collection[fx.Node]) -> None:
        super().__init__()
        self.weights = set(weights)
        self.fixed: set[fx.Node] = set()  # values of weights and constants only
        for node in graph.nodes:
            if node in self.weights or node.op == "get_attr":
                self.fixed.add(node)
            elif node.op == "call_function" and all(n in self.fixed for n in node.all_input_nodes):
                self.fixed.add(node)
        self._read: dict[tuple[fx.Node, Pos], list[tuple[fx.Node, Pos]] | None] = {}

    def group(self, node: fx.Node) -> Group | None:
        """The products whose columns ``node`` contracts with a weight; None where there are none, or not only."""
        start = self._contracted(node)
        if start is None:
            return None
        factors: dict[object, Factor] = {}
        columns: set[fx.Node] = set()
        same: list[tuple[object, object]] = []
        todo: list[tuple[fx.Node, Pos, object]] = [(*start, node)]
        seen: dict[tuple[fx.Node, Pos], object] = {}
        while todo:
            at, pos, key = todo.pop()
            if (at, pos) in seen:
                same.append((key, seen[at, pos]))
                continue
            seen[at, pos] = key
            if at in self.weights or at.op in ("placeholder", "get_attr") or not at.all_input_nodes:
                factor = factors.setdefault(key, Factor())  # whole on every rank: slicing it is free
                factor.grains = math.gcd(factor.grains, pos.size)
                if at in self.weights:
                    factor.seeds.add(Seed(at, pos))
                continue
            sources = self._sources(at, pos)
            if not sources:
                return None
            if self._multiplies(at):
                columns.add(at)
            for source, where in sources:
                apart = _concatenates(self.call(at), pos)
                todo.append((source, where, (source, where) if apart else key))
        for a, b in same:  # two ways to one value: one factor
            if a in factors and b in factors and a != b:
                one, other = factors[a], factors[b]
                factors[a] = factors[b] = Factor(one.seeds | other.seeds, math.gcd(one.grains, other.grains))
        kept = _joined([f for f in {id(f): f for f in factors.values()}.values() if f.seeds])
        return Group({node}, columns, kept) if columns and kept and all(f.grains > 1 for f in kept) else None

    def closed(self, group: Group) -> bool:
        """Whether nothing but the group's rows needs the cut values (sums over them aside); notes what is inside."""
        todo = list(group.columns)
        inside: set[fx.Node] = set()
        while todo:
            at = todo.pop()
            if at in inside:
                continue
            if at.op == "output" or (at not in group.columns and self._multiplies(at)):
                return False
            inside.add(at)
            todo += [user for user in at.users if user not in group.rows]
        group.inside = inside
        return True

    def _multiplies(self, node: fx.Node) -> bool:
        """A product with a weight (one that mixes columns: not one filter per channel)."""
        if not _heavy(node) or is_attention(node):
            return False
        call = self.call(node)
        if call.name == "aten::convolution" and not contracts(call) and call.arg(8, "groups") == call.shapes[0][1]:
            return False
        return any(n in self.fixed for n in call.operands) and any(n not in self.fixed for n in call.operands)

    def _contracted(self, node: fx.Node) -> tuple[fx.Node, Pos] | None:
        """The value that ``node`` multiplies with a weight, and the dimension that it sums over."""
        if not _heavy(node) or is_attention(node) or not self._multiplies(node):
            return None
        call = self.call(node)
        if call.name not in _CONTRACTED or (call.name == "aten::convolution" and not contracts(call)):
            return None
        a, i, b, j = _CONTRACTED[call.name]
        if len(call.operands) <= b:
            return None
        if call.operands[a] in self.fixed:
            a, i, b, j = b, j, a, i
        size = call.shapes[a][i]
        if call.operands[b] not in self.fixed or call.operands[a] in self.fixed or size < 2:
            return None
        return call.operands[a], Pos(i % len(call.shapes[a]), 1, size, 1)

    def _sources(self, node: fx.Node, pos: Pos) -> list[tuple[fx.Node, Pos]] | None:
        if (node, pos) not in self._read:
            self._read[node, pos] = self._back(node, pos)
        return self._read[node, pos]

    def _back(self, node: fx.Node, pos: Pos) -> list[tuple[fx.Node, Pos]] | None:
        """Operands that hold the factor; None where it cannot be followed."""
        if node.op != "call_function":
            return None
        if node.target is getitem:
            return [(node.args[0], pos)] if node.args[1] == 0 else None  # type: ignore[list-item]
        call = self.call(node)
        if not call.operands or not call.results:
            return None
        if call.name.startswith("aten::slice") and call.arg(1, "dim", 0) % len(call.shape) == pos.dim:
            size = call.shapes[0][pos.dim]
            start, _, step = slice(*(call.arg(i, n) for i, n in ((2, "start"), (3, "end")))).indices(size)
            step = call.arg(4, "step", 1)
            return [(call.operands[0], replace(pos, start=pos.start + start))] if step == 1 else None
        if call.name.startswith("aten::cat") and call.arg(1, "dim", 0) % len(call.shape) == pos.dim:
            return list(self._pieces(call, pos)) or None
        part = pos.extent != call.shape[pos.dim]
        ask = Pos(pos.dim, 1, call.shape[pos.dim], 1) if part else pos
        if is_attention(node) and pos.dim >= len(call.shape) - 2:
            return None  # every score sums over the width
        found = rule_for(call).back(call, ask)
        if not found and call.name in _VIEWS:
            major = view_back_major(call.shapes[0], call.shape, ask)
            found = [(0, major)] if major is not None and major.size > 1 else []
        if part:  # a segment stays one where the whole dimension is kept as it is
            if any(p != Pos(p.dim, 1, ask.size, 1) for _, p in found):
                return None
            found = [(i, replace(pos, dim=p.dim)) for i, p in found]
        if self._multiplies(node) and any(call.operands[i] not in self.fixed for i, _ in found):
            return None
        if isinstance(rule_for(call), PointwiseRule) and len(found) > 1:
            most = max(math.prod(call.shapes[i]) for i, _ in found)
            found = [(i, p) for i, p in found if math.prod(call.shapes[i]) == most]
        return [(call.operands[i], p) for i, p in found] or None

    def _pieces(self, call: Call, pos: Pos) -> Iterator[tuple[fx.Node, Pos]]:
        """What the operands of a concatenation hold of a factor along it."""
        at = 0
        whole = pos.extent == call.shape[pos.dim] and pos.outer == 1
        for operand, shape in zip(call.operands, call.shapes, strict=True):
            size = shape[pos.dim]
            if whole and size % pos.inner == 0:
                yield operand, Pos(pos.dim, 1, size // pos.inner, pos.inner)
            elif not whole and at <= pos.start and pos.start + pos.extent <= at + size:
                yield operand, replace(pos, start=pos.start - at)
            at += size


_VIEWS = ("aten::view", "aten::reshape", "aten::_unsafe_view")


def _concatenates(call: Call | None, pos: Pos) -> bool:
    return call is not None and call.name.startswith("aten::cat") and call.arg(1, "dim", 0) % len(call.shape) == pos.dim


def _heavy(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name in HEAVY


def _numel(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) if isinstance(value, torch.Tensor) else 0
