"""What to split: the token dimensions of a program, found by reading the rules backward.

From the query rows of every attention the walk follows the rows through the program
towards its inputs, and stops where no operand holds them as one dimension any more: that
value is a **seed**, the earliest place where a whole value can be cut into parts. A set of
seeds found from the same attentions is a **candidate**; factorised attention (space, then
time) gives several, and the shard pass chooses by predicted cost.

Where attention looks at windows of rows, or at one factor of several (frames, rows, columns), what lies along its
leading dimension is a candidate too: attention of whole windows needs no exchange.

A program without attention is split along the rows of its largest softmax, which is an attention that is written out
in a way that capture does not take, or of its heaviest convolution; one without either along the rows of its heaviest
product. A program may hold several networks: where products that have nothing to do with what seeds lead to are much
of the work, their rows are cut, too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import TypeVar

import torch
from torch import fx

from fastpar.ops.attention import attention
from fastpar.rules import Call, Pos, rule_for
from fastpar.rules.table import known
from fastpar.rules.views import VIEWS, factors_of


@dataclass(frozen=True)
class Seed:
    """A value and the factor of one of its dimensions to cut into parts.

    ``before`` rows of other seeds stand ahead of its own where they are concatenated: shared out so that all of them
    together are even.
    """

    node: fx.Node
    pos: Pos
    before: int = field(default=0, compare=False)


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


MUCH = 0.25
"""Of the work in products and attentions; less is not looked into, for each candidate is tried."""

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution")

T = TypeVar("T")
At = tuple[fx.Node, Pos]


class Walk:
    """The walk back, with the calls it has read (a walk visits a value and factor once).

    Rows are followed into the largest operands only, for the others (tables, biases, masks) are
    sliced for free where they meet them; ``all_operands`` follows every one.
    """

    def __init__(self, all_operands: bool = False) -> None:
        self.all_operands = all_operands
        self._calls: dict[fx.Node, Call] = {}
        self._seeds: dict[At, frozenset[Seed]] = {}
        self._factors: dict[At, frozenset[tuple[int, int, int]]] = {}
        self._beside: dict[Seed, frozenset[Seed]] = {}

    def call(self, node: fx.Node) -> Call:
        if node not in self._calls:
            self._calls[node] = Call.of(node)
        return self._calls[node]

    def sources(self, node: fx.Node, pos: Pos) -> list[At]:
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
        if call.name.startswith("aten::slice") and any(p.size > pos.size for _, p in found) and self._given(node):
            return []  # nothing is computed of the other rows: it is these that are to be even
        return [(call.operands[i], p) for i, p in found]

    def _given(self, node: fx.Node) -> bool:
        """Whether a value is but a piece of an input, looked at in some way."""
        while node.op == "call_function":
            call = self.call(node)
            if not (call.name in VIEWS or call.name.startswith("aten::slice")) or len(call.operands) != 1:
                return False
            node = call.operands[0]
        return node.op in ("placeholder", "get_attr")

    def seeds(self, node: fx.Node, pos: Pos) -> frozenset[Seed]:
        """Where the rows ``pos`` of ``node`` first are one dimension of a value."""
        return self._ends(node, pos, self._seeds, lambda *at: [Seed(*at)] if at[1].size > 1 else [])

    def merged(self, node: fx.Node, pos: Pos) -> list[Pos]:
        """The factors of ``pos`` that are dimensions of their own further up, before a view merged them: the largest
        first. None where no view did."""
        found = [(outer, n) for size, outer, n in self._ends(node, pos, self._factors, self._merging)
                 if size == pos.size > n > 1]  # fmt: skip
        return [Pos(pos.dim, pos.outer * outer, n, pos.size // (outer * n) * pos.inner, pos.start)
                for outer, n in sorted(found, key=lambda f: (-f[1], f[0]))]  # fmt: skip

    def beside(self, seed: Seed) -> frozenset[Seed]:
        """Seeds of the other dimensions of a seed's value, and of what those were merged from."""
        if seed not in self._beside:
            sizes = [int(n) for n in seed.node.meta["val"].shape]
            others = [Pos(d, 1, n, 1) for d, n in enumerate(sizes) if d != seed.pos.dim and n > 1]
            found = [self.seeds(seed.node, p) for pos in others for p in (pos, *self.merged(seed.node, pos))]
            self._beside[seed] = frozenset[Seed]().union(*found)
        return self._beside[seed]

    def _merging(self, node: fx.Node, pos: Pos) -> list[tuple[int, int, int]]:
        """(size, how much of it is above, size of the part) for the parts of ``pos`` that a view makes it of."""
        if node.op != "call_function" or node.target is getitem:
            return []
        call = self.call(node)
        if call.name not in VIEWS or not call.operands:
            return []
        return [(pos.size, *factor) for factor in factors_of(call.shapes[0], call.shape, pos)]

    def _ends(
        self, node: fx.Node, pos: Pos, known: dict[At, frozenset[T]], end: Callable[[fx.Node, Pos], Iterable[T]]
    ) -> frozenset[T]:
        """What ``end`` says of the values where the walk from the rows ``pos`` of ``node`` comes to an end.

        What was found for one attention is kept: in a residual stream the next one comes past the same
        values, and reading them again each time would make the walk quadratic in depth.
        """
        todo = [(node, pos)]
        read: dict[At, list[At]] = {}
        while todo:
            at = todo[-1]
            if at in known:
                todo.pop()
                continue
            sources = read[at] = read[at] if at in read else self.sources(*at)
            missing = [source for source in sources if source not in known]
            if missing:
                todo += missing
                continue
            todo.pop()
            found = {known[source] for source in sources}
            known[at] = found.pop() if len(found) == 1 else frozenset(() if sources else end(*at)).union(*found)
        return known[node, pos]

    def candidate(self, graph: fx.Graph, seeds: Iterable[Seed], attentions: Sequence[fx.Node] = ()) -> Candidate:
        """``seeds`` in the graph's order, each with the rows of others that stand before it.

        Of several factors of one dimension the finest comes first, and is cut: shares are the more even. The order is
        total, for ranks must come to the same program, and sets have another order in each process.
        """
        order = {n: i for i, n in enumerate(graph.nodes)}
        ahead: dict[Seed, int] = {}
        for parts in self._concatenated():
            rows = sum(size for found, size in parts if found & ahead.keys())
            for found, size in parts:
                if found and not found & ahead.keys():
                    ahead.update(dict.fromkeys(found, rows))
                    rows += size
        placed = [Seed(s.node, s.pos, ahead.get(s, 0)) for s in seeds]
        placed.sort(key=lambda s: (order[s.node], s.pos.dim, s.pos.inner, s.pos.outer, s.pos.start, s.pos.size))
        return Candidate(tuple(placed), tuple(attentions))

    def _concatenated(self) -> Iterator[list[tuple[frozenset[Seed], int]]]:
        """(seeds, rows) of each part, for every concatenation of rows that was walked through, inner ones first."""
        for node, pos in self._seeds:
            if node.op != "call_function" or not self.call(node).name.startswith("aten::cat"):
                continue
            parts = self.sources(node, pos)
            if len(parts) > 1 and sum(rows.size for _, rows in parts) == pos.size:
                yield [(self._seeds[part], part[1].size) for part in parts]


def find(graph: fx.Graph) -> list[Candidate]:
    """Candidates of a captured graph, those with most attentions' work first."""
    walk = Walk()
    found: list[tuple[frozenset[Seed], fx.Node]] = []
    windows: list[tuple[frozenset[Seed], fx.Node]] = []
    for node in graph.nodes:
        if is_attention(node):
            call = walk.call(node)
            q = call.shapes[0]
            if q[-2] > 1:
                found.append((walk.seeds(call.operands[0], Pos(len(q) - 2, 1, q[-2], 1)), node))
            leading = Pos(0, 1, q[0], 1)
            for pos in (leading, *walk.merged(call.operands[0], leading)):
                windows.append((walk.seeds(call.operands[0], pos), node))
    candidates = _merge(found, walk) if found else _rows_of_softmax(graph, walk)
    if not candidates:
        candidates = _rows_of_product(graph, walk)
        return candidates + _with_others(candidates[:1], graph, walk)
    candidates += _with_others(candidates[:1], graph, walk)
    candidates += _new(_merge([w for w in windows if not all(map(_leading, w[0]))], walk), candidates)
    # Rows of an attention in the middle of a U-Net or an autoencoder lead back to where rows were last made fewer; what
    # comes before, at full resolution, is most of the work, and its rows lead to the input.
    heaviest = _heaviest(graph, walk, ("aten::convolution",))
    more = _rows_of_convolution(heaviest, walk) if heaviest is not None else []
    return [*candidates, *_new(more, candidates)]


def _new(more: list[Candidate], candidates: list[Candidate]) -> list[Candidate]:
    return [c for c in more if all(set(c.seeds) != set(o.seeds) for o in candidates)]


def _leading(seed: Seed) -> bool:
    """Whether its rows are a first dimension, or the outermost factor of one: a batch, which ``cfg`` splits."""
    return (seed.pos.dim, seed.pos.outer) == (0, 1)


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
    return walk.candidate(graph, seeds) if seeds else None


def _merge(found: list[tuple[frozenset[Seed], fx.Node]], walk: Walk) -> list[Candidate]:
    """Group what shares a seed or does not contradict; what does are alternatives (frames, or rows and columns)."""
    groups: list[tuple[set[Seed], list[fx.Node]]] = []
    for seeds, node in sorted(found, key=lambda f: -_work(f[1])):
        for held, attentions in groups:
            if not _contradict(held, seeds, walk):
                held |= seeds
                attentions.append(node)
                break
        else:
            groups.append((set(seeds), [node]))
    return [walk.candidate(attentions[0].graph, seeds, attentions) for seeds, attentions in groups if seeds]


def _contradict(a: set[Seed], b: frozenset[Seed], walk: Walk) -> bool:
    """Whether some value would be cut twice: it is a seed of both in two ways, or it is a seed of one and rows of the
    other are another dimension of it."""
    mine: dict[fx.Node, set[Pos]] = defaultdict(set)
    for seed in a:
        mine[seed.node].add(seed.pos)
    if any(seed.node in mine and seed.pos not in mine[seed.node] for seed in b):
        return True
    return any(walk.beside(s) & b for s in a - b) or any(walk.beside(s) & a for s in b - a)


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
    return [walk.candidate(graph, seeds)] if seeds else []


def _rows_of_product(graph: fx.Graph, walk: Walk) -> list[Candidate]:
    """Rows of the heaviest product, and what they were merged from: there is no attention to start from."""
    heaviest = _heaviest(graph, walk, PRODUCTS)
    if heaviest is None:
        return []
    if walk.call(heaviest).name == "aten::convolution":
        return _rows_of_convolution(heaviest, walk)[:1]
    found = [walk.seeds(heaviest, pos) for pos in _rows_of(heaviest, walk)]
    return [walk.candidate(graph, seeds) for seeds in found if seeds]


def _heaviest(
    graph: fx.Graph, walk: Walk, names: Sequence[str], beside: Collection[fx.Node] = ()
) -> fx.Node | None:
    """The product of one of these names with the most work, among those with rows to split and not ``beside``."""
    works = {n: _work_over_rows(n, walk) for n in graph.nodes if n not in beside and not is_attention(n)}
    found = [n for n in works if works[n] and walk.call(n).name in names]
    return max(found, key=lambda n: works[n], default=None)


def _with_others(candidates: list[Candidate], graph: fx.Graph, walk: Walk) -> list[Candidate]:
    """The candidates with the rows of networks of their own, where their products are much of the work.

    No seed leads to these, nor they to anything that one leads to: a prompt's keys stay whole, which are the same in
    every step (``hoist``).
    """
    out = []
    works = {n: work for n in graph.nodes if (work := _work_over_rows(n, walk))}
    for candidate in candidates:
        seeds = set(candidate.seeds)
        tried: set[fx.Node] = set()
        while left := {n: works[n] for n in _apart(graph, seeds, works) if n not in tried}:
            if sum(left.values()) < MUCH * sum(works.values()) and not tried:
                break
            node = max(left, key=lambda n: left[n])
            tried.add(node)
            for pos in _rows_of(node, walk):
                more = walk.seeds(node, pos)
                if more and not any(map(_leading, more)) and not _contradict(seeds, more, walk):
                    seeds |= more
                    break
        if seeds != set(candidate.seeds):
            out.append(walk.candidate(graph, seeds, candidate.attentions))
    return out


def _apart(graph: fx.Graph, seeds: Iterable[Seed], among: Iterable[fx.Node]) -> list[fx.Node]:
    """Of these nodes those that no seed leads to, and that lead to nothing that one leads to."""
    reached = _reached(graph, seeds)
    joined = set(reached)
    for node in reversed(graph.nodes):
        if any(user in joined and user.op != "output" for user in node.users):
            joined.add(node)
    return [n for n in among if n not in joined]


def _reached(graph: fx.Graph, seeds: Iterable[Seed]) -> set[fx.Node]:
    """Seeds' values and all that is made from them."""
    reached = {s.node for s in seeds}
    for node in graph.nodes:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _work_over_rows(node: fx.Node, walk: Walk) -> int:
    """Multiplications of a product, convolution or attention that has rows to split; 0 for all else."""
    if is_attention(node):
        return 2 * _work(node)
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return 0
    call = walk.call(node)
    if call.name not in PRODUCTS or not known(call.name):
        return 0
    convolution = call.name == "aten::convolution"
    rows = call.shape[2:] if convolution else call.shape[-2:-1]
    each = math.prod(call.shapes[1][1:]) if convolution else call.shapes[-1][-2]
    return math.prod(call.shape) * each if max(rows, default=0) > 1 else 0


def _rows_of(node: fx.Node, walk: Walk) -> list[Pos]:
    """The rows of a product or convolution, or what they were merged from: the best to split first."""
    shape = walk.call(node).shape
    if walk.call(node).name == "aten::convolution":
        return [Pos(d, 1, shape[d], 1) for d in sorted(range(2, len(shape)), key=lambda d: -shape[d]) if shape[d] > 1]
    rows = Pos(len(shape) - 2, 1, shape[-2], 1)
    return [*walk.merged(node, rows), rows]


def _rows_of_convolution(node: fx.Node, walk: Walk) -> list[Candidate]:
    """A candidate for each dimension of a convolution's rows, the largest first."""
    found = [_with_branches(node.graph, walk, walk.seeds(node, pos), pos.dim) for pos in _rows_of(node, walk)]
    return [walk.candidate(node.graph, seeds) for seeds in found if seeds]


def _with_branches(graph: fx.Graph, walk: Walk, seeds: Iterable[Seed], dim: int) -> set[Seed]:
    """``seeds`` and those of convolutions that none of them leads to, along the same dimension.

    Several pictures may each have a network of their own (adapters, ControlNets), which meet at the end only.
    """
    joined = set(seeds)
    while joined:
        other = _heaviest(graph, walk, ("aten::convolution",), beside=_reached(graph, joined))
        if other is None or other.meta["val"].dim() <= dim:
            break
        more = walk.seeds(other, Pos(dim, 1, int(other.meta["val"].shape[dim]), 1))
        if not more or _contradict(joined, more, walk):
            break
        joined |= more
    return joined

