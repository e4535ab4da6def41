"""``shard``: from whole tensors to local shards with abstract communication.

Candidates are found backward, layouts spread forward. Where attention is factorised there
are several candidates, and where a view cuts rows in multiples there are several
granularities: each is tried, and of those that split about as much work as any, the one that
moves the fewest bytes wins, work that would be left unbalanced counted at the same rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, module_of
from fastpar.sharding.candidates import Candidate, Seed, find, find_batch, is_attention
from fastpar.sharding.insert import Inserter, Sharded, heavy_ahead
from fastpar.sharding.work import busiest

REPEATED = 1.25  # work of the busiest rank over the least that any choice leaves it: more, and rows were missed


@dataclass(frozen=True)
class Shard(Pass):
    """Split tokens over the mesh's token axes, and the batch over ``cfg``."""

    name: ClassVar[str] = "shard"
    stage_in: ClassVar[str] = "captured"
    stage_out: ClassVar[str] = "sharded"

    axes: tuple[str, ...] = ()

    def apply(self, program: Program, ctx: PassContext) -> Program:
        mesh: Mesh = ctx.mesh
        unknown = [a for a in self.axes if a not in mesh.names]
        if unknown:
            raise PlanError(f"shard: axis {unknown[0]!r} is not on the mesh, which has {list(mesh.names)}")
        tokens = tuple(a for a in self.axes or mesh.names if a != "cfg")
        batch = self._batch(program, ctx) if "cfg" in mesh.names else []
        candidates = find(program.graph)
        best = self._best(program.graph, mesh, tokens, candidates, batch, ctx)
        gm = module_of(program.gm, best.graph, "Sharded")
        out = Program(gm, program.inputs, "sharded", program.name, mesh, program.plan, list(program.notes))
        gm.graph.eliminate_dead_code()
        gm.meta = dict(program.gm.meta)
        alive = set(gm.graph.nodes)
        gm.meta["fallbacks"] = [f for f in best.fallbacks if f.node in alive]
        if not candidates:
            out.notes.append("nothing to split: no attention and no product over rows; every rank runs all of it")
        gm.recompile()
        return out

    def _batch(self, program: Program, ctx: PassContext) -> list[tuple[Seed, tuple[str, ...]]]:
        """Seeds of the batch. Without one the axis splits nothing inside a call: whole calls are dealt along it."""
        candidate = find_batch(program.graph)
        if candidate is not None:
            return [(seed, ("cfg",)) for seed in candidate.seeds]
        if heavy_ahead(program.graph) and all(map(_dealable, program.outputs)):
            program.gm.meta["dealt"] = "cfg"
            n = ctx.mesh.size(("cfg",))
            ctx.notes.append(
                f"cfg={n}: this graph has no batch to split, so whole calls are dealt: call k runs on part k mod {n} "
                "of the ranks. Shares and bytes are the mean over calls; a model that is called once per step gains "
                "nothing"
            )
        return []

    def _best(
        self,
        graph: fx.Graph,
        mesh: Mesh,
        tokens: tuple[str, ...],
        candidates: list[Candidate],
        batch: list[tuple[Seed, tuple[str, ...]]],
        ctx: PassContext,
    ) -> Sharded:
        if not candidates or mesh.size(tokens) == 1:
            return Inserter(graph, mesh, batch).run()
        options: list[tuple[float, float, Sharded]] = []
        tried: list[str] = []
        for candidate in candidates:
            units = [1]
            while units:
                unit = units.pop(0)
                seeds = [(seed, tokens) for seed in candidate.seeds]
                result = Inserter(graph, mesh, [*batch, *seeds], unit).run()
                if unit == 1:
                    units += sorted(result.units)
                options.append((busiest(result.graph, mesh), predicted_bytes(result, mesh), result))
                tried.append(f"{candidate.rows} rows in multiples of {unit}: {options[-1][1] / 1e6:.3f} MB predicted")
        least = min(work for work, _, _ in options)
        # Rows that few products have move few bytes, and leave the rest to be repeated on every rank. And a rank
        # that waits for another costs like communication: both are time in which nothing is computed.
        fair = [o for o in options if o[0] <= REPEATED * least]
        _, moved, best = min(fair, key=lambda o: (o[1] + 1) * (o[0] / least if least else 1) ** 2)
        if len(tried) > 1:
            ctx.notes.append("shard tried " + "; ".join(tried) + f"; chose {moved / 1e6:.3f} MB")
        return best


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
