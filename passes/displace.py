"""``displace``: what a rank gets from the others is what they had in the step before (DistriFusion, section 4.1).

Between two steps of a sampler activations change little. So an exchange that brings a rank *context* (keys and values
of other patches, halos, sums over all rows) need not end before its result is used: what came in the step before is
used in its place, with the rank's own rows as they are now, and what comes is kept for the next step. A whole step
hides the exchange.

    y = exchange(x)        becomes      y = displaced(x, kept before),   kept now = context(exchange(x))

Kept values are inputs and outputs of the program (``Program.carries``). The first call of a sampling run has none, so
there are two programs: this one, and its *first* (``program.gm.meta["first"]``), which waits for its exchanges and
gives what is kept. The runtime (``fastpar.run.displaced``) takes turns.

A sum over ranks is the rank's own term now, and the others' terms of before. For the mean and the mean square of a
norm, ``gn`` says more (distrifuser's modes):

============= =================================================================================
``corrected`` all ranks' of before, and the change of the own mean: as if all rows had changed like the own ones. Where
              the variance would be negative it is that of the own rows
``stale``     as every other sum
``sync``      waits for the exchange
``separate``  those of the own rows
none          those of the own rows, and of nothing else is anything sent any more: what came last stays
============= =================================================================================

Not displaced: outputs, which all ranks have alike; what is computed once per generation; columns of shared products,
which depend on the step and not on the patch; rows that move on to another rank to be worked on there, since they
would lag a step behind (also those that are looked up by index); maxima, and sums of what was scaled by them, since
terms of two steps do not add up; and what an output is made of that is no rank's own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import hands_over
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Input, Program, source_line
from fastpar.graph.tidy import dead_code
from fastpar.ops.collectives import COLLECTIVES, all_reduce, axes_of, layouts_of
from fastpar.ops.displaced import context, displaced, plausible, share
from fastpar.ops.moments import moments
from fastpar.sharding.insert import HEAVY

aten = torch.ops.aten
AXIS = "gather"
_CONTEXT = ("attention", "plan", "reduce")  # what exchanges are for (``meta["why"]``) that may be a step late
_SCALING = {aten.div.Tensor, aten.mul.Tensor, aten.view.default, aten.reshape.default, aten._to_copy.default}


@dataclass(frozen=True)
class Displace(Pass):
    """Takes the others' rows, over the axis ``gather``, from the step before. ``gn``: what norms over split rows do."""

    name: ClassVar[str] = "displace"
    stage_in: ClassVar[str] = "lowered"
    lossy: ClassVar[bool] = True

    gn: Literal["corrected", "stale", "sync", "separate"] | None = "corrected"

    @property
    def settles(self) -> bool:
        """Whether steps with the same inputs compute the model's function."""
        return self.gn not in ("separate", None)

    def apply(self, program: Program, ctx: PassContext) -> Program:
        found = _Found(program, ctx.mesh, self.gn)
        ctx.notes += found.notes()
        first = program.copy()
        for one, steady in ((first, False), (program, True)):
            _Writer(one, ctx.mesh, self.gn, steady).write([value.name for value in found.chosen])
        program.gm.meta["first"] = first
        return program


class _Found:
    """Results of exchanges that may be a step late (``chosen``), and why others are not."""

    def __init__(self, program: Program, mesh: Mesh, gn: str | None) -> None:
        self.graph, self.mesh, self.gn = program.graph, mesh, gn
        self.shifted = shifted(program.graph)
        self.waiting: dict[str, list[fx.Node]] = {}
        self.chosen: dict[fx.Node, None] = {}
        for value in _exchanged(program.graph, mesh):
            reason = self._refused(value)
            if reason is None:
                self.chosen[value] = None
            elif reason:
                self.waiting.setdefault(reason, []).append(value)
        self._keep_outputs_alike(program.results)

    def notes(self) -> list[str]:
        brings = "bring what is used in the next step" if self.gn else "end with the warm-up; what came then stays"
        out = [f"displace: {len(self.chosen)} exchanges {brings}"]
        for reason, values in self.waiting.items():
            out.append(f"displace: {len(values)} exchanges are waited for: {reason} ({source_line(values[0])})")
        return out

    def _refused(self, value: fx.Node) -> str | None:
        """Why the result of an exchange has to be this step's; None where it has not, "" where that goes without
        saying."""
        exchange, index = value.args
        if exchange.meta.get("hoisted") or exchange.meta.get("why") == "output":  # type: ignore[union-attr]
            return ""
        x = exchange.args[0][index]  # type: ignore[union-attr, index]
        if exchange.target is all_reduce:  # type: ignore[union-attr]
            if exchange.args[1] != "sum":  # type: ignore[union-attr]
                return "maxima of two steps do not go together"
            if x in self.shifted:
                return "its terms are scaled by a maximum, which is another one in the next step"
            return "gn=sync" if self.gn == "sync" and of_moments(x) is not None else None
        if exchange.meta.get("why") not in _CONTEXT:  # type: ignore[union-attr]
            return "it brings no rows of other patches, or an operator that needs all rows gathers them"
        src, dst = (layouts[index] for layouts in layouts_of(exchange))  # type: ignore[arg-type, index]
        if any(hands_over(src, dst, self.mesh, rank) for rank in range(self.mesh.ranks)):
            return "rows move on to other ranks, which work on them"
        return None

    def _keep_outputs_alike(self, results: tuple[Any, ...]) -> None:
        """Ranks see other steps of each other's rows, so what each of them makes of all rows differs from rank to
        rank. What an output is made of in this way waits."""
        strayed: set[fx.Node] = set()
        for node in self.graph.nodes:
            late = node in self.chosen or any(n in strayed for n in node.all_input_nodes)
            if late and not _is_cut(node.meta.get("layout")):
                strayed.add(node)
        todo = [out for out in results if isinstance(out, fx.Node) and out in strayed]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.chosen:
                del self.chosen[node]
                self.waiting.setdefault("an output is made of it on every rank", []).append(node)
            todo += [n for n in node.all_input_nodes if n in strayed]


def _exchanged(graph: fx.Graph, mesh: Mesh) -> Iterator[fx.Node]:
    """What exchanges over the axis give, value by value."""
    for node in graph.nodes:
        if node.target is getitem and node.args[0].target in COLLECTIVES and axes_of(node.args[0], mesh) == (AXIS,):
            yield node


def _is_cut(layout: Any) -> bool:
    layouts = layout if isinstance(layout, tuple) else (layout,)
    return any(isinstance(x, Layout) and AXIS in x.split_axes for x in layouts)


def shifted(graph: fx.Graph) -> set[fx.Node]:
    """Values that were scaled by an extreme over ranks, up to the next product."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        extreme = node.target is all_reduce and node.args[1] != "sum"
        if extreme or any(n in found for n in node.all_input_nodes):
            if schema is None or schema.name not in HEAVY:
                found.add(node)
    return found


def of_moments(x: fx.Node) -> fx.Node | None:
    """The ``moments`` that a sum over ranks is of, up to a factor."""
    while x.target in _SCALING and isinstance(x.args[0], fx.Node) and len(x.all_input_nodes) == 1:
        x = x.args[0]
    return x if x.target is moments else None


def own_shares(of: fx.Node, mesh: Mesh) -> list[float]:
    """For every rank, the share of the numbers behind ``moments`` that it has itself, of all that are added up."""
    layout: Layout = of.args[0].meta["layout"]  # type: ignore[union-attr]
    dims: Collection[int] = of.args[1]  # type: ignore[assignment]
    counts = [math.prod(layout.local_shape(mesh, rank)[d] for d in dims) for rank in range(mesh.ranks)]
    totals = [sum(counts[member] for member in mesh.group(rank, (AXIS,))) for rank in range(mesh.ranks)]
    return [n / total if total else 0.0 for n, total in zip(counts, totals, strict=True)]


class _Writer:
    """Rewrites one program: the one that waits and keeps (``steady`` is false), or the one that uses what was kept."""

    def __init__(self, program: Program, mesh: Mesh, gn: str | None, steady: bool) -> None:
        self.program, self.graph, self.mesh, self.gn, self.steady = program, program.graph, mesh, gn, steady
        self.kept: list[fx.Node] = []  # what the next call is given
        self.given: list[fx.Node] = []  # what the last one has kept
        self.sends = not (steady and gn is None)

    def write(self, names: list[str]) -> None:
        by_name = {node.name: node for node in self.graph.nodes}
        for name in names:
            value = by_name[name]
            exchange, index = value.args
            x: fx.Node = exchange.args[0][index]  # type: ignore[union-attr, index, assignment]
            if exchange.target is all_reduce:  # type: ignore[union-attr]
                self._sum(value, x)
            else:
                self._rows(value, x, *(str(layouts[index]) for layouts in layouts_of(exchange)))  # type: ignore
        out = self.graph.output_node()
        if self.sends:
            out.args = ((*out.args[0], *self.kept),)  # type: ignore[misc]
        dead_code(self.graph)
        carried = tuple(Input(node.name, "carried") for node in self.given)
        self.program.inputs = (*self.program.inputs, *carried)
        self.program.carries = len(self.kept) if self.sends else 0
        self.graph.lint()
        self.program.gm.recompile()

    def _rows(self, value: fx.Node, x: fx.Node, src: str, dst: str) -> None:
        kept = self._after(value, value, context, value, src, dst)
        if self.steady:
            old = self._given(value)
            old.meta["message"] = (src, dst)
            self._instead(value, self._after(value, value, displaced, x, old, src, dst), kept)
        self.kept.append(kept)

    def _sum(self, value: fx.Node, x: fx.Node) -> None:
        of = of_moments(x)
        how = "stale" if of is None else self.gn or "separate"
        factors = [1.0] * self.mesh.ranks
        if of is not None and how != "stale":
            factors = [1 / s if s else 0.0 for s in own_shares(of, self.mesh)]
        if how == "separate":
            if self.steady:
                self._instead(value, self._after(value, value, share, x, factors))
            return
        own = self._after(value, value, share, x, factors)
        kept = self._after(own, value, aten.sub.Tensor, value, own)
        if self.steady:
            now = self._after(own, value, aten.add.Tensor, own, self._given(value))
            if how == "corrected":
                now = self._after(now, value, plausible, now, own)
            self._instead(value, now, kept)
        self.kept.append(kept)

    def _after(self, place: fx.Node, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(place):
            new = self.graph.call_function(target, args)
        new.meta = {**inherited(like.meta), "val": like.meta["val"], "layout": like.meta["layout"]}
        return new

    def _given(self, value: fx.Node) -> fx.Node:
        """An input for what the last call kept of a value."""
        with self.graph.inserting_after(self.program.placeholders[-1]):
            new = self.graph.placeholder(f"carried_{len(self.given)}")
        new.meta = {"val": value.meta["val"], "layout": value.meta["layout"]}
        self.given.append(new)
        return new

    def _instead(self, value: fx.Node, now: fx.Node, kept: fx.Node | None = None) -> None:
        value.replace_all_uses_with(now, delete_user_cb=lambda user: user is not kept)
