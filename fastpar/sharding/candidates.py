"""What to split: the token dimensions of a program, found by reading the rules backward.

From the query rows of every attention the walk follows the rows through the program
towards its inputs, and stops where no operand holds them as one dimension any more: that
value is a **seed**, the earliest place where a whole value can be cut into parts. A set of
seeds found from the same attentions is a **candidate**; factorised attention (space, then
time) gives several, and the shard pass chooses by predicted cost.

A program without attention is split along the rows of its largest softmax, which is an attention that is written out
in a way that capture does not take, or of its heaviest convolution; one without either along the rows of its heaviest
product.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from fastpar.ops.attention import attention
from fastpar.rules import Call, Pos, rule_for
from fastpar.rules.table import known


@dataclass(frozen=True)
class Seed:
    """A value and the factor of one of its dimensions to cut into parts."""

    node: fx.Node
    pos: Pos


@dataclass(frozen=True)
class Candidate:
    """Seeds that are cut together, and the attentions whose rows they are."""

    seeds: tuple[Seed, ...]
    attentions: tuple[fx.Node, ...]

    @property
    def rows(self) -> int:
        """Rows of the largest seed."""
        return max((s.pos.size for s in self.seeds), default=0)


def is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is attention


class Walk:
    """The walk back, with the calls it has read (a walk visits a value and factor once).

    Rows are followed into the largest operands only, for the others (tables, biases, masks) are
    sliced for free where they meet them; ``all_operands`` follows every one.
    """

    def __init__(self, all_operands: bool = False) -> None:
        self.all_operands = all_operands
        self._calls: dict[fx.Node, Call] = {}
        self._seeds: dict[tuple[fx.Node, Pos], frozenset[Seed]] = {}

    def call(self, node: fx.Node) -> Call:
        if node not in self._calls:
            self._calls[node] = Call.of(node)
        return self._calls[node]

    def sources(self, node: fx.Node, pos: Pos) -> list[tuple[fx.Node, Pos]]:
        """Operands that hold the rows ``pos`` of ``node``."""
        if node.op != "call_function":
            return []
        if node.target is getitem:  # the first of several results is the one that has the operand's rows
            return self.sources(node.args[0], pos) if node.args[1] == 0 else []  # type: ignore[arg-type]
        call = self.call(node)
        if not call.operands or not call.results:
            return []
        found = rule_for(call).back(call, pos)
        if len(found) > 1 and not self.all_operands and not call.name.startswith("aten::cat"):
            most = max(math.prod(call.shapes[i]) for i, _ in found)
            found = [(i, p) for i, p in found if math.prod(call.shapes[i]) == most]
        return [(call.operands[i], p) for i, p in found]

    def seeds(self, node: fx.Node, pos: Pos) -> frozenset[Seed]:
        """Where the rows ``pos`` of ``node`` first are one dimension of a value.

        What was found for one attention is kept: in a residual stream the next one comes past the same
        values, and reading them again each time would make the walk quadratic in depth.
        """
        todo = [(node, pos)]
        read: dict[tuple[fx.Node, Pos], list[tuple[fx.Node, Pos]]] = {}
        while todo:
            at = todo[-1]
            if at in self._seeds:
                todo.pop()
                continue
            sources = read[at] = read[at] if at in read else self.sources(*at)
            missing = [source for source in sources if source not in self._seeds]
            if missing:
                todo += missing
                continue
            todo.pop()
            found = {self._seeds[source] for source in sources}
            own = frozenset([Seed(*at)]) if not sources and at[1].size > 1 else frozenset()
            self._seeds[at] = found.pop() if len(found) == 1 else own.union(*found)
        return self._seeds[node, pos]


def find(graph: fx.Graph) -> list[Candidate]:
    """Candidates of a captured graph, those with most attentions' work first."""
    walk = Walk()
    found: list[tuple[frozenset[Seed], fx.Node]] = []
    for node in graph.nodes:
        if is_attention(node):
            call = walk.call(node)
            q = call.shapes[0]
            if q[-2] > 1:
                found.append((walk.seeds(call.operands[0], Pos(len(q) - 2, 1, q[-2], 1)), node))
    candidates = _merge(found) if found else _rows_of_softmax(graph, walk)
    if not candidates:
        return _rows_of_product(graph, walk)
    # Rows of an attention in the middle of a U-Net or an autoencoder lead back to where rows were last made fewer; what
    # comes before, at full resolution, is most of the work, and its rows lead to the input.
    heaviest = _heaviest(graph, walk, ("aten::convolution",))
    more = _rows_of_convolution(heaviest, walk) if heaviest is not None else []
    return [*candidates, *(c for c in more if all(set(c.seeds) != set(o.seeds) for o in candidates))]


def find_batch(graph: fx.Graph, fixed: Collection[fx.Node]) -> Candidate | None:
    """The batch of a captured graph: the first dimension of its outputs, where inputs have it too.

    Classifier-free guidance usually runs as such a batch of two. None where there is no batch. ``fixed`` are
    placeholders that have none, whatever their sizes: a graph may return what it made of a weight (a normalised kernel
    that its module keeps), and a kernel of two channels is no batch of two.
    """
    fixed = set(fixed)
    sizes = {
        int(n.meta["val"].shape[0])
        for n in graph.nodes
        if n.op == "placeholder" and n not in fixed and isinstance(n.meta.get("val"), torch.Tensor)
        if n.meta["val"].dim() > 1
    }
    walk = Walk(all_operands=True)
    seeds: set[Seed] = set()
    for node in graph.output_node().all_input_nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() > 1 and 1 < int(value.shape[0]) and value.shape[0] in sizes:
            seeds |= {s for s in walk.seeds(node, Pos(0, 1, int(value.shape[0]), 1)) if s.node not in fixed}
    return Candidate(_ordered(graph, seeds), ()) if seeds else None


def _merge(found: list[tuple[frozenset[Seed], fx.Node]]) -> list[Candidate]:
    """Group what shares a seed or does not contradict; seeds that cut one value twice are alternatives."""
    groups: list[tuple[set[Seed], list[fx.Node]]] = []
    for seeds, node in sorted(found, key=lambda f: -_work(f[1])):
        for held, attentions in groups:
            if not _contradict(held, seeds):
                held |= seeds
                attentions.append(node)
                break
        else:
            groups.append((set(seeds), [node]))
    graph = found[0][1].graph
    return [Candidate(_ordered(graph, seeds), tuple(attentions)) for seeds, attentions in groups if seeds]


def _contradict(a: set[Seed], b: frozenset[Seed]) -> bool:
    mine: dict[fx.Node, set[Pos]] = defaultdict(set)
    for seed in a:
        mine[seed.node].add(seed.pos)
    return any(seed.node in mine and seed.pos not in mine[seed.node] for seed in b)


def _work(attention: fx.Node) -> int:
    shape = attention.args[1].meta["val"].shape  # type: ignore[union-attr]
    return math.prod(attention.meta["val"].shape) * int(shape[-2])


def _is_softmax(call: Call) -> bool:
    """Over the columns of a matrix of scores."""
    if call.name not in ("aten::_softmax", "aten::_safe_softmax") or len(call.shape) < 3 or call.shape[-2] < 2:
        return False
    return bool(call.arg(1, "dim") % len(call.shape) == len(call.shape) - 1)


def _rows_of_softmax(graph: fx.Graph, walk: Walk) -> list[Candidate]:
    """Rows of the largest softmax over scores."""
    scores = [n for n in graph.nodes if n.op == "call_function" and _is_softmax(walk.call(n))]
    if not scores:
        return []
    largest = max(scores, key=lambda n: math.prod(walk.call(n).shape))
    shape = walk.call(largest).shape
    seeds = walk.seeds(largest, Pos(len(shape) - 2, 1, shape[-2], 1))
    return [Candidate(tuple(seeds), ())] if seeds else []


def _rows_of_product(graph: fx.Graph, walk: Walk) -> list[Candidate]:
    """Rows of the heaviest product: there is no attention to start from."""
    heaviest = _heaviest(graph, walk, ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"))
    if heaviest is None:
        return []
    if walk.call(heaviest).name == "aten::convolution":
        return _rows_of_convolution(heaviest, walk)[:1]
    dims = heaviest.meta["val"].dim()
    seeds = walk.seeds(heaviest, Pos(dims - 2, 1, int(heaviest.meta["val"].shape[-2]), 1))
    return [Candidate(tuple(seeds), ())] if seeds else []


def _heaviest(
    graph: fx.Graph, walk: Walk, names: Sequence[str], beside: Collection[fx.Node] = ()
) -> fx.Node | None:
    """The product of one of these names with the most work, among those with rows to split and not ``beside``."""
    best: tuple[int, fx.Node] | None = None
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() < 2 or node in beside:
            continue
        call = walk.call(node)
        if call.name not in names or not known(call.name):
            continue
        convolution = call.name == "aten::convolution"
        rows = value.shape[2:] if convolution else value.shape[-2:-1]
        each = math.prod(call.shapes[1][1:]) if convolution else call.shapes[-1][-2]
        work = math.prod(int(s) for s in value.shape) * each
        if max(rows, default=0) > 1 and (best is None or work > best[0]):
            best = (work, node)
    return best[1] if best is not None else None


def _rows_of_convolution(node: fx.Node, walk: Walk) -> list[Candidate]:
    """A candidate for each dimension of a convolution's rows, the largest first."""
    shape = [int(n) for n in node.meta["val"].shape]
    dims = sorted((d for d in range(2, len(shape)) if shape[d] > 1), key=lambda d: -shape[d])
    found = [_with_branches(node.graph, walk, walk.seeds(node, Pos(d, 1, shape[d], 1)), d) for d in dims]
    return [Candidate(_ordered(node.graph, seeds), ()) for seeds in found if seeds]


def _with_branches(graph: fx.Graph, walk: Walk, seeds: Iterable[Seed], dim: int) -> set[Seed]:
    """``seeds`` and those of convolutions that none of them leads to, along the same dimension.

    Several pictures may each have a network of their own (adapters, ControlNets), which meet at the end only.
    """
    joined = set(seeds)
    while joined:
        reached = {s.node for s in joined}
        for node in graph.nodes:
            if any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        other = _heaviest(graph, walk, ("aten::convolution",), beside=reached)
        if other is None or other.meta["val"].dim() <= dim:
            break
        more = walk.seeds(other, Pos(dim, 1, int(other.meta["val"].shape[dim]), 1))
        if not more or _contradict(joined, more):
            break
        joined |= more
    return joined


def _ordered(graph: fx.Graph, seeds: Iterable[Seed]) -> tuple[Seed, ...]:
    order = {n: i for i, n in enumerate(graph.nodes)}
    return tuple(sorted(seeds, key=lambda s: (order[s.node], s.pos.dim)))
