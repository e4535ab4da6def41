"""``scatter``: a pass for tests that lays values out at random.

``shard`` only ever splits tokens evenly, so most of what rules and passes promise is never asked
of them: parts of any size, products of two split factors, whole segments beside split ones,
windows, several dimensions at once. Here values are redistributed to such layouts wherever chance
has it, and everything behind must cope, by rule or by gathering. ``lay`` does so to a program's
inputs, as it is told.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar import registry
from fastpar.core.layout import Atom, Dim, Layout, Seg, even_parts
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, module_of
from fastpar.sharding.insert import Inserter


@dataclass(frozen=True)
class Scatter(Pass):
    """About ``share`` percent of the values in a random layout."""

    name: ClassVar[str] = "scatter"
    stage_in: ClassVar[str] = "captured"
    stage_out: ClassVar[str] = "sharded"

    share: int = 20
    seed: int = 0

    def apply(self, program: Program, ctx: PassContext) -> Program:
        graph = _Scatterer(program.graph, ctx.mesh, self.share, self.seed).run().graph
        graph.eliminate_dead_code()
        gm = module_of(program.gm, graph, "Scattered")
        return Program(gm, program.inputs, "sharded", program.name, ctx.mesh, program.plan, list(program.notes))


@dataclass(frozen=True)
class Lay(Pass):
    """The inputs in the given layouts, in order; an empty text leaves one whole."""

    name: ClassVar[str] = "lay"
    stage_in: ClassVar[str] = "captured"
    stage_out: ClassVar[str] = "sharded"

    inputs: tuple[str, ...] = ()

    def apply(self, program: Program, ctx: PassContext) -> Program:
        wanted = dict(zip(program.placeholders, self.inputs, strict=False))
        walk = _Fixed(program.graph, ctx.mesh, {n: Layout.parse(text) for n, text in wanted.items() if text})
        gm = module_of(program.gm, walk.run().graph, "Laid")
        return Program(gm, program.inputs, "sharded", program.name, ctx.mesh, program.plan, list(program.notes))


class _Fixed(Inserter):
    def __init__(self, graph: fx.Graph, mesh: Mesh, layouts: dict[fx.Node, Layout]) -> None:
        super().__init__(graph, mesh, ())
        self.layouts = layouts
        self.seeds = {n: [] for n in layouts}

    def _seed(self, node: fx.Node) -> None:
        want = self.layouts[node]
        self._hold(node, self._get(node, want, "seed"), want)


class _Scatterer(Inserter):
    """An Inserter whose seeds are random nodes, cut at random."""

    def __init__(self, graph: fx.Graph, mesh: Mesh, share: int, seed: int) -> None:
        super().__init__(graph, mesh, ())
        self.random = random.Random(seed)
        self.seeds = {n: [] for n in graph.nodes if self.random.randrange(100) < share}

    def _seed(self, node: fx.Node) -> None:
        want = random_layout(tuple(node.meta["val"].shape), self.mesh, self.random)
        self._hold(node, self._get(node, want, "seed"), want)


PASSES: dict[str, Callable[[], type[Pass]]] = {**registry.PASSES, "scatter": lambda: Scatter, "lay": lambda: Lay}
"""All passes, and those of this file."""


def random_layout(shape: tuple[int, ...], mesh: Mesh, chance: random.Random) -> Layout:
    """Any layout of a tensor with at least one row per dimension; mostly one or two dimensions are split."""
    axes = [a for a in mesh.names if chance.random() < 0.8]
    dims = [Dim.whole(n) for n in shape]
    for d in chance.sample(range(len(shape)), len(shape)):
        taken = axes[: chance.randint(0, len(axes))]
        if taken and shape[d] > 0:
            axes = [a for a in axes if a not in taken]
            dims[d] = _random_dim(shape[d], chance.sample(taken, len(taken)), mesh, chance)
    return Layout(tuple(dims))


def _random_dim(size: int, axes: list[str], mesh: Mesh, chance: random.Random) -> Dim:
    """``size`` rows split over ``axes``: one segment, several, windows, or a product of factors."""
    kind = chance.choice(["even", "parts", "parts", "segments", "whole beside", "product", "windows"])
    if kind == "even":
        return Dim.shared(size, tuple(axes), mesh)
    if kind == "product":
        outer = chance.choice([n for n in range(1, size + 1) if size % n == 0])
        cut = chance.randint(0, len(axes))
        return Dim.of([
            Atom((_random_seg(n, tuple(part), mesh, chance),))
            for n, part in ((outer, axes[:cut]), (size // outer, axes[cut:]))
        ])  # fmt: skip
    if kind == "windows":
        parts = [chance.randint(0, size) for _ in range(mesh.size(tuple(axes)))]
        starts = [chance.randint(0, size - n) for n in parts]
        covered = {row for a, n in zip(starts, parts, strict=True) for row in range(a, a + n)}
        if len(covered) == size:
            return Dim.of([Atom((Seg(size, tuple(axes), tuple(parts), tuple(starts)),))])
    first = chance.randint(0, size) if kind in ("segments", "whole beside") else 0
    segs = [_random_seg(size - first, tuple(axes), mesh, chance)]
    segs += [Seg(first) if kind == "whole beside" else _random_seg(first, tuple(axes), mesh, chance)]
    return Dim.of([Atom(tuple(chance.sample(segs, 2)))])


def _random_seg(size: int, axes: tuple[str, ...], mesh: Mesh, chance: random.Random) -> Seg:
    n = mesh.size(axes)
    if n == 1:
        return Seg(size)
    if chance.random() < 0.3:
        return Seg(size, axes, even_parts(size, n))
    cuts = [0, *sorted(chance.randint(0, size) for _ in range(n - 1)), size]
    return Seg(size, axes, tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False)))
