"""A captured program as the planner sees it: what it computes, reads and holds, and which attentions would talk.

Made once per program, in time linear in its nodes; everything that a plan changes is arithmetic on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fastpar.graph.count import carrying, node_flops
from fastpar.graph.program import Program
from fastpar.graph.roofline import node_bytes, reads
from fastpar.rules import Call, is_view
from fastpar.sharding.candidates import find, find_batch, is_attention
from fastpar.sharding.weights import find_weights


@dataclass(frozen=True)
class Attention:
    """Attentions of one shape: batch, heads, key heads, query and key rows, width; ``split`` where keys are rows
    that a token plan splits (else keys are whole, or the rows are in its batch: it is local)."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    itemsize: int
    split: bool
    count: int = 1

    @property
    def flops(self) -> float:
        """Of one of them, two products."""
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.width


@dataclass(frozen=True, eq=False)
class Workload:
    """Kinds of operators that read memory as arrays (FLOPs, bytes of activations and of weights, whether they carry
    rows; ``counts`` of each, ``attends`` for attentions), and what else a plan's cost needs.

    Bytes and FLOPs are of one call on one device. ``pointwise`` is what eager moves besides: bytes of the operators
    that a compiler would fuse into others, those that carry rows and those that do not. ``sums`` are results of
    products whose weight tensor parallelism cuts by rows: bytes of one, how many; ``cut`` is what of the first of
    ``pointwise`` it cuts too."""

    attentions: tuple[Attention, ...]
    flops: np.ndarray
    activations: np.ndarray
    weights: np.ndarray
    carries: np.ndarray  # bool
    launches: int
    outputs: int
    parameters: int
    peak: int  # bytes of activations alive at once
    rows: int
    batch: int  # 1 where there is none to split
    counts: np.ndarray = None  # type: ignore[assignment]  # one of each where not given
    attends: np.ndarray = None  # type: ignore[assignment]  # none where not given
    pointwise: tuple[float, float] = (0.0, 0.0)
    sums: tuple[tuple[int, int], ...] = ()
    cut: float = 0.0

    @property
    def width(self) -> int:
        """Of a head, of the attention with most to do."""
        return max(self.attentions, key=lambda a: a.flops * a.count).width if self.attentions else 128

    def __post_init__(self) -> None:
        if self.counts is None:
            object.__setattr__(self, "counts", np.ones(len(self.flops)))
        if self.attends is None:
            object.__setattr__(self, "attends", np.zeros(len(self.flops), dtype=bool))

    @property
    def total_flops(self) -> float:
        return float((self.flops * self.counts).sum())


def workload(program: Program) -> Workload:
    """Summary of a captured program."""
    graph = program.graph
    candidates = find(graph)
    # Of factorised attention only the largest candidate's is split: the other one's rows stay whole.
    marks, _ = carrying(program, candidates[:1])
    chosen = {n for c in candidates[:1] for n in c.attentions}
    _, carriers = carrying(program, candidates)
    kinds = {n: i.kind for n, i in zip(program.placeholders, program.inputs, strict=True)}
    static = _static(graph, kinds)
    kinds_of: Counter[tuple[float, int, int, bool, bool]] = Counter()
    attentions: Counter[Attention] = Counter()
    groups = find_weights(graph, [n for n, kind in kinds.items() if kind == "parameter"])
    inside = {n for group in groups for n in group.inside}
    launches, cut = 0, 0.0
    fused = {True: 0.0, False: 0.0}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        launches += _launches(node)
        operands = set(node.all_input_nodes)
        if not reads(node):
            if _launches(node):
                moved = sum(node_bytes(n, _shape(n)) for n in operands) + node_bytes(node, _shape(node))
                fused[node in carriers] += moved
                cut += moved * (node in carriers and node in inside)
            continue
        cost = node_flops(node, _shape)
        weights = sum(node_bytes(n, _shape(n)) for n in operands & static)
        moved = sum(node_bytes(n, _shape(n)) for n in operands - static) + node_bytes(node, _shape(node))
        kinds_of[(cost, moved, weights, node in carriers, is_attention(node))] += 1
        if is_attention(node):
            attentions[_attention(node, marks, chosen)] += 1
    batch = find_batch(graph, program.fixed)
    flops, moved_, weights_, carries, attends = zip(*kinds_of, strict=True) if kinds_of else ((), (), (), (), ())
    return Workload(
        attentions=tuple(_counted(a, n) for a, n in attentions.items()),
        flops=np.array(flops, dtype=np.float64),
        activations=np.array(moved_, dtype=np.float64),
        weights=np.array(weights_, dtype=np.float64),
        carries=np.array(carries, dtype=bool),
        launches=launches,
        outputs=sum(node_bytes(n, _shape(n)) for n in set(graph.output_node().all_input_nodes)),
        parameters=sum(node_bytes(n, _shape(n)) for n, kind in kinds.items() if kind in ("parameter", "buffer")),
        peak=_peak(graph, set(kinds)),
        rows=candidates[0].rows if candidates else 1,
        batch=batch.seeds[0].pos.size if batch is not None else 1,
        counts=np.array(list(kinds_of.values()), dtype=np.float64),
        attends=np.array(attends, dtype=bool),
        pointwise=(fused[True], fused[False]),
        sums=tuple(Counter(node_bytes(n, _shape(n)) for group in groups for n in group.rows).items()),
        cut=cut,
    )


def joined(several: Sequence[Workload]) -> Workload:
    """The graphs of one model as one call."""
    if len(several) == 1:
        return several[0]
    largest = max(several, key=lambda w: w.total_flops)
    return Workload(
        attentions=tuple(a for w in several for a in w.attentions),
        flops=np.concatenate([w.flops for w in several]),
        activations=np.concatenate([w.activations for w in several]),
        weights=np.concatenate([w.weights for w in several]),
        carries=np.concatenate([w.carries for w in several]),
        launches=sum(w.launches for w in several),
        outputs=sum(w.outputs for w in several),
        parameters=sum(w.parameters for w in several),
        peak=max(w.peak for w in several),
        rows=largest.rows,
        batch=largest.batch,
        counts=np.concatenate([w.counts for w in several]),
        attends=np.concatenate([w.attends for w in several]),
        pointwise=(sum(w.pointwise[0] for w in several), sum(w.pointwise[1] for w in several)),
        sums=tuple(x for w in several for x in w.sums),
        cut=sum(w.cut for w in several),
    )


def _shape(node: fx.Node) -> Any:
    """Of what an operator gives (of the first of several), as the roofline counts it; what is no tensor, as it is."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else value


def _attention(node: fx.Node, marks: dict[fx.Node, set[int]], chosen: set[fx.Node]) -> Attention:
    q, k = (_shape(a) for a in node.args[:2])  # type: ignore[arg-type]
    value: torch.Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    heads, key_heads = (x[-3] if len(x) > 2 else 1 for x in (q, k))
    split = node in chosen and len(k) - 2 in marks.get(node.args[1], set())  # type: ignore[arg-type]
    batch = math.prod(q[:-3])
    return Attention(batch, heads, key_heads, q[-2], k[-2], q[-1], value.element_size(), split)


def _counted(a: Attention, n: int) -> Attention:
    return Attention(a.batch, a.heads, a.key_heads, a.queries, a.keys, a.width, a.itemsize, a.split, n)


def _static(graph: fx.Graph, kinds: Mapping[fx.Node, str]) -> set[fx.Node]:
    """Parameters, buffers and views of them."""
    found = {n for n, kind in kinds.items() if kind in ("parameter", "buffer")}
    for node in graph.nodes:
        if node.op == "call_function" and is_view(node) and set(node.all_input_nodes) <= found:
            found.add(node)
    return found


def _launches(node: fx.Node) -> int:
    """Kernels that eager launches: one per operator that is no view."""
    return 0 if is_view(node) or not Call.of(node).results else 1


def _peak(graph: fx.Graph, inputs: set[fx.Node]) -> int:
    """Bytes of values that are alive at once, views and inputs not counted."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            last[operand] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        ends.setdefault(user, []).append(value)
    now = most = 0
    for node in graph.nodes:
        if node.op == "call_function" and not is_view(node):
            now += node_bytes(node, _shape(node))
            most = max(most, now)
        for gone in ends.get(node, ()):
            if gone not in inputs and gone.op == "call_function" and not is_view(gone):
                now -= node_bytes(gone, _shape(gone))
    return most
