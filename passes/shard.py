"""``shard``: from whole tensors to local shards with abstract communication.

Candidates are found backward, layouts spread forward. Where attention is factorised there
are several candidates, and where a view cuts rows in multiples there are several
granularities: each is tried, and of those that split about as much work as any, the one that
moves the fewest bytes wins, work that would be left unbalanced counted at the same rate.
Weights are cut over the axis ``tp``, whatever else is split over the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import hands_over
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, module_of
from fastpar.ops.redistribute import redistribute
from fastpar.passes.attention_gather import split_keys
from fastpar.sharding.candidates import Candidate, Seed, find, find_batch, is_attention
from fastpar.sharding.expand import Key
from fastpar.sharding.insert import Inserter, Sharded, heavy_ahead
from fastpar.sharding.weights import Group, find_weights, layouts_of, layouts_of_slices
from fastpar.sharding.work import busiest

REPEATED = 1.25  # work of the busiest rank over the least that any choice leaves it: more, and rows were missed

Cut = tuple[Seed, tuple[str, ...]]
"""A seed and the mesh axes that it is cut over."""


@dataclass(frozen=True)
class Shard(Pass):
    """Split tokens over the mesh's token axes, the batch over ``cfg`` and weights over ``tp``."""

    name: ClassVar[str] = "shard"
    stage_in: ClassVar[str] = "captured"
    stage_out: ClassVar[str] = "sharded"

    axes: tuple[str, ...] = ()

    def apply(self, program: Program, ctx: PassContext) -> Program:
        mesh: Mesh = ctx.mesh
        unknown = [a for a in self.axes if a not in mesh.names]
        if unknown:
            raise PlanError(f"shard: axis {unknown[0]!r} is not on the mesh, which has {list(mesh.names)}")
        tokens = tuple(a for a in self.axes or mesh.names if a not in ("cfg", "tp"))
        batch = self._batch(program, ctx) if "cfg" in mesh.names else []
        candidates = find(program.graph)
        groups, weights = self._cut(program, mesh) if "tp" in mesh.names else ([], {})
        best = self._best(program.graph, mesh, tokens, candidates, batch, weights, ctx)
        gm = module_of(program.gm, best.graph, "Sharded")
        out = Program(gm, program.inputs, "sharded", program.name, mesh, program.plan, list(program.notes))
        gm.graph.eliminate_dead_code()
        gm.meta = dict(program.gm.meta)
        alive = set(gm.graph.nodes)
        gm.meta["fallbacks"] = [f for f in best.fallbacks if f.node in alive]
        if "tp" in mesh.names:
            gm.meta["cut"] = frozenset(node.name for group in groups for node in group.inside | group.rows)
            out.notes.append(_memory(program, weights, mesh))
        if not candidates and tokens:
            out.notes.append("nothing to split: no attention and no product over rows; every rank runs all of it")
        gm.recompile()
        return out

    def _batch(self, program: Program, ctx: PassContext) -> list[Cut]:
        """Seeds of the batch. Without one the axis splits nothing inside a call: whole calls are dealt along it."""
        candidate = find_batch(program.graph, program.fixed)
        if candidate is not None:
            seeds: list[Cut] = [(seed, ("cfg",)) for seed in candidate.seeds]
            # first dimensions that an attention mixes are tokens of a model that has no batch
            if not split_keys(Inserter(program.graph, ctx.mesh, seeds).run().graph):
                return seeds
        if heavy_ahead(program.graph) and all(map(_dealable, program.outputs)):
            program.gm.meta["dealt"] = "cfg"
            n = ctx.mesh.size(("cfg",))
            ctx.notes.append(
                f"cfg={n}: this graph has no batch to split, so whole calls are dealt: call k runs on part k mod {n} "
                "of the ranks. Shares and bytes are the mean over calls; a model that is called once per step gains "
                "nothing"
            )
        return []

    def _cut(self, program: Program, mesh: Mesh) -> tuple[list[Group], dict[fx.Node, Layout]]:
        """Products whose weights are cut, and layouts of these: those found, without any in which an operator would
        need a value whole."""
        weights = [n for n, i in zip(program.placeholders, program.inputs, strict=True) if i.kind == "parameter"]
        groups = find_weights(program.graph, weights)
        while groups:
            columns = layouts_of(groups, ("tp",), mesh)
            tried = Inserter(program.graph, mesh, [], weights=columns).run()
            forced = {f.at for f in tried.fallbacks if f.at is not None}
            kept = [g for g in groups if not any(map(g.holds, forced))]
            if len(kept) == len(groups):
                rows = layouts_of_slices(tried, [n for n in weights if n not in columns], mesh)
                return groups, {**columns, **rows}
            groups = kept
        return [], {}

    def _best(
        self,
        graph: fx.Graph,
        mesh: Mesh,
        tokens: tuple[str, ...],
        candidates: list[Candidate],
        batch: list[Cut],
        weights: dict[fx.Node, Layout],
        ctx: PassContext,
    ) -> Sharded:
        if not candidates or mesh.size(tokens) == 1:
            return Inserter(graph, mesh, batch, weights=weights).run()
        options: list[tuple[float, float, Sharded]] = []
        tried: list[str] = []
        known: dict[Key, fx.Graph] = {}
        for candidate in candidates:
            units = [1]
            while units:
                unit = units.pop(0)
                seeds = together(batch, [(seed, tokens) for seed in candidate.seeds], mesh)
                result = Inserter(graph, mesh, seeds, unit, weights, known).run()
                if unit == 1:
                    units += sorted(result.units | (_COARSE if mesh.strides else set()))
                options.append((busiest(result.graph, mesh), predicted_bytes(result, mesh), result))
                tried.append(f"{candidate.rows} rows in multiples of {unit}: {options[-1][1] / 1e6:.3f} MB predicted")
        if mesh.strides:  # rows that move on to another rank would be of its last run
            options = [o for o in options if not _hands_rows_on(o[2].graph, mesh)] or options
        least = min(work for work, _, _ in options)
        # Rows that few products have move few bytes, and leave the rest to be repeated on every rank. And a rank
        # that waits for another costs like communication: both are time in which nothing is computed.
        fair = [o for o in options if o[0] <= REPEATED * least]
        _, moved, best = min(fair, key=lambda o: (o[1] + 1) * (o[0] / least if least else 1) ** 2)
        if len(tried) > 1:
            ctx.notes.append("shard tried " + "; ".join(tried) + f"; chose {moved / 1e6:.3f} MB")
        return best


def together(batch: list[Cut], rows: list[Cut], mesh: Mesh) -> list[Cut]:
    """All that is cut. Rows that are the batch (of products without tokens, or where a batch was merged with them) are
    one dimension, cut over the axes of both, if there are more of them than the batch's axes can take."""
    both = {seed: axes for seed, axes in rows}
    out = []
    for seed, axes in batch:
        more = both.pop(seed, ()) if seed.pos.size > mesh.size(axes) else ()
        out.append((seed, mesh.ordered({*axes, *more})))
    return [*out, *((seed, axes) for seed, axes in rows if seed in both)]


_COARSE = {2, 4, 8, 16, 32}
"""Multiples of rows that stay whole through so many halvings."""


def _hands_rows_on(graph: fx.Graph, mesh: Mesh) -> bool:
    """Whether some exchange takes rows from a rank that another one goes on with."""
    for node in graph.nodes:
        if node.target is redistribute:
            src, dst = (Layout.parse(str(text)) for text in node.args[1:3])
            moves = bool(src.partial or src.split_axes)  # else each rank keeps some of what all have
            if moves and any(hands_over(src.summed(), dst.summed(), mesh, rank) for rank in range(mesh.ranks)):
                return True
    return False


def _memory(program: Program, weights: dict[fx.Node, Layout], mesh: Mesh) -> str:
    """What cutting weights means for a rank's memory, as a note."""
    n = mesh.size(("tp",))
    if not weights:
        return f"tp={n}: no weight of this graph can be cut, so the ranks of this axis repeat each other"
    values = [n.meta["val"] for n, i in zip(program.placeholders, program.inputs, strict=True) if i.kind == "parameter"]
    full = sum(v.numel() * v.element_size() for v in values)
    cut = sum(n.meta["val"].numel() * n.meta["val"].element_size() for n in weights)
    used, copied = [0] * mesh.ranks, [0] * mesh.ranks
    for node, layout in weights.items():
        for rank in range(mesh.ranks):
            size = math.prod(layout.local_shape(mesh, rank)) * node.meta["val"].element_size()
            used[rank] += size
            copied[rank] += 0 if all(_one_run(d.rows(mesh, rank)) for d in layout.dims) else size
    return (
        f"tp={n}: of {full / 1e6:.3f} MB of weights {cut / 1e6:.3f} MB are cut, {max(used) / 1e6:.3f} MB of them to a "
        f"rank. Under torch.compile alone all of them stay; slices are views but {max(copied) / 1e6:.3f} MB, which are "
        "copied in every call"
    )


def _one_run(rows: np.ndarray) -> bool:
    return len(rows) == 0 or int(rows[-1]) - int(rows[0]) == len(rows) - 1


def _dealable(output: object) -> bool:
    """Whether an output can travel to ranks that did not compute it, or is known there."""
    return not isinstance(output, fx.Node) or isinstance(output.meta.get("val"), torch.Tensor)


def predicted_bytes(sharded: Sharded, mesh: Mesh) -> float:
    """Bytes that leave the busiest rank, attention over split keys included."""
    total = float(sharded.moved)
    for node in sharded.graph.nodes:
        if is_attention(node):
            q, k = node.args[0], node.args[1]
            axes = k.meta["layout"].dims[-2].axes  # type: ignore[union-attr]
            if axes:
                n = mesh.size(mesh.ordered(axes))
                value = q.meta["val"]  # type: ignore[union-attr]
                total += 4 * (n - 1) / n * value.numel() * value.element_size() / n
    return total
