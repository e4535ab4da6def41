"""``stride``: ranks run the model in every step, in every second one, ... as they are fast (STADI's step strides).

A rank with a stride of 2 runs the model in every second step of the sampler and keeps its output for the one between,
which is the sampler's jump over both where it is of first order (DDIM in the noise that it predicts, Euler in the
velocity). So ranks do not run the model at the same time, and no exchange may hold one up until another comes. What
``displace`` lets end late, here also begins late::

    y = exchange(x)        becomes      y = late(x, came),   sent now = outgoing(x)

``sent`` is a result of the program, ``came`` an input. In between, when ranks next run the model at the same step,
these exchange what each of them has sent last (``fastpar.run.meeting``); of the others a rank keeps what came before.
All exchanges over the axis are of this kind, the outputs' too: whatever one rank has of another is of its last run. So
outputs differ from rank to rank but for the own rows, which the sampler puts together where all ranks have come to the
same step (``Generation.gather``).

Sums over ranks are of their terms, which travel as rows of another dimension; ``gn`` is as for ``displace``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.inherit import inherited
from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import hands_over
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Input, Program, source_line
from fastpar.graph.tidy import dead_code
from fastpar.ops.collectives import COLLECTIVES, all_reduce, all_to_all, axes_of, layouts_of
from fastpar.ops.displaced import plausible, share
from fastpar.ops.late import late, message_layout, message_like, outgoing, side
from fastpar.ops.terms import terms
from fastpar.passes.displace import AXIS, of_moments, own_shares, shifted

aten = torch.ops.aten


@dataclass(frozen=True)
class Stride(Pass):
    """Takes exchanges over the axis ``gather`` apart, into what is sent and what came. ``gn``: what norms over split
    rows do. Raises PlanError for an exchange that cannot be."""

    name: ClassVar[str] = "stride"
    stage_in: ClassVar[str] = "lowered"
    lossy: ClassVar[bool] = True

    gn: Literal["corrected", "stale", "separate"] = "corrected"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        _along_the_axis_alone(program.graph, ctx.mesh)
        _check(program.graph, ctx.mesh)
        program.gm.meta["rows"] = [_rows(out) for out in program.results]
        first = program.copy()
        for one, steady in ((first, False), (program, True)):
            _Writer(one, ctx.mesh, self.gn, steady).write()
        program.gm.meta["first"] = first
        sent = sum(node.target is late for node in program.graph.nodes)
        ctx.notes.append(f"stride: {sent} exchanges between calls, of ranks that run the model at the same step")
        return program


def _exchanges(graph: fx.Graph, mesh: Mesh) -> Iterator[fx.Node]:
    """Those over the axis, of every step."""
    for node in list(graph.nodes):
        if node.target in COLLECTIVES and not node.meta.get("hoisted") and AXIS in axes_of(node, mesh):
            yield node


def _along_the_axis_alone(graph: fx.Graph, mesh: Mesh) -> None:
    """Exchanges over several axes become two: over the others, whose ranks keep step, and over the axis."""
    for node in _exchanges(graph, mesh):
        if axes_of(node, mesh) == (AXIS,) or node.target is all_reduce:
            continue
        srcs, dsts = layouts_of(node)
        between = [_between(src, dst) for src, dst in zip(srcs, dsts, strict=True)]
        with graph.inserting_before(node):
            one = graph.call_function(all_to_all, (node.args[0], node.args[1], list(map(str, between))))
            one.meta = {**inherited(node.meta), "val": node.meta["val"], "layout": tuple(between)}
            values = []
            for i, layout in enumerate(between):
                values.append(graph.call_function(getitem, (one, i)))
                values[-1].meta = {**inherited(node.meta), "val": node.meta["val"][i], "layout": layout}
        node.args = (values, list(map(str, between)), node.args[2])
        node.target = all_to_all


def _between(src: Layout, dst: Layout) -> Layout:
    """``dst`` where nothing moves along the axis, and ``src`` where something does."""
    dims = tuple(a if AXIS in a.axes | b.axes else b for a, b in zip(src.dims, dst.dims, strict=True))
    return Layout(dims)


def _check(graph: fx.Graph, mesh: Mesh) -> None:
    """Raise PlanError for an exchange that ranks at different steps cannot take part in."""
    scaled = shifted(graph)
    for node in _exchanges(graph, mesh):
        reason = None
        if axes_of(node, mesh) != (AXIS,):
            reason = f"it is over {' and '.join(axes_of(node, mesh))} at once"
        elif node.target is all_reduce:
            if node.args[1] != "sum":
                reason = "extremes of different steps do not go together"
            elif any(x in scaled for x in node.args[0]):  # type: ignore[union-attr]
                reason = "its terms are scaled by a maximum, which is another one in another step"
        elif any(hands_over(src, dst, mesh, rank)
                 for src, dst in zip(*layouts_of(node), strict=True) for rank in range(mesh.ranks)):  # fmt: skip
            reason = "rows move on to other ranks, which work on them"
        if reason is not None:
            raise PlanError(
                f"steps: ranks of different strides cannot take part in an exchange of this model: {reason} "
                f"({source_line(node)}); leave 'steps' out, or let ranks divide rows evenly"
            )


def _rows(out: Any) -> tuple[str, str] | None:
    """Layouts before and after the exchange that an output comes from, if it does."""
    if isinstance(out, fx.Node) and out.target is getitem and out.args[0].target in COLLECTIVES:  # type: ignore[union-attr]
        src, dst = (layouts[out.args[1]] for layouts in layouts_of(out.args[0]))  # type: ignore[arg-type, index]
        return (str(src), str(dst)) if AXIS in src.split_axes else None
    return None


class _Writer:
    """Rewrites one program: the one that waits and sends (``steady`` is false), or the one that takes what came."""

    def __init__(self, program: Program, mesh: Mesh, gn: str, steady: bool) -> None:
        self.program, self.graph, self.mesh, self.gn, self.steady = program, program.graph, mesh, gn, steady
        self.sent: list[fx.Node] = []
        self.came: list[fx.Node] = []
        self.terms: list[fx.Node] = []  # of sums, the own ones, for the next call
        self.before: list[fx.Node] = []  # and those of the last
        self.last: dict[fx.Node, fx.Node] = {}  # of the nodes made for a value

    def write(self) -> None:
        for node in _exchanges(self.graph, self.mesh):
            if node.target is all_reduce:
                self._sums(node)
            else:
                self._exchange(node)
        out = self.graph.output_node()
        out.args = ((*out.args[0], *self.sent, *self.terms),)  # type: ignore[misc]
        given = [*self.came, *self.before]
        place = self.program.placeholders[-1] if self.program.placeholders else None
        for node in reversed(given):
            assert place is not None
            place.append(node)
        dead_code(self.graph)
        self.program.inputs = (*self.program.inputs, *(Input(node.name, "carried") for node in given))
        self.program.carries = len(self.sent) + len(self.terms)
        self.graph.lint()
        self.program.gm.recompile()

    def _exchange(self, node: fx.Node) -> None:
        args = tuple(node.args)
        self.sent.append(self._message(node, outgoing, *args))
        if self.steady:
            node.target = late
            node.args = (*args, self._came(node))

    def _message(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(node):
            new = self.graph.call_function(target, args)
        sizes = [sum(side(new, self.mesh, rank).send_splits) for rank in range(self.mesh.ranks)]
        new.meta = {**inherited(node.meta), "val": message_like(new, sizes), "layout": message_layout(sizes, self.mesh)}
        return new

    def _came(self, node: fx.Node) -> fx.Node:
        sizes = [sum(side(node, self.mesh, rank).receive_splits) for rank in range(self.mesh.ranks)]
        new = self._given(f"came_{len(self.came)}", self.came, message_like(node, sizes),
                          message_layout(sizes, self.mesh))  # fmt: skip
        new.meta["came"] = True
        return new

    def _given(self, name: str, among: list[fx.Node], value: torch.Tensor, layout: Layout) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            new = self.graph.placeholder(name)
        new.meta = {"val": value, "layout": layout}
        among.append(new)
        return new

    def _sums(self, node: fx.Node) -> None:
        """Of every sum the terms travel; the rank's own is that of this call."""
        values = [user for user in node.users if user.target is getitem]
        alone = {v for v in values if self.gn == "separate" and of_moments(self._term(v)) is not None}
        travelling = [v for v in values if v not in alone]
        if self.steady:
            for value in alone:
                x = self._term(value)
                value.replace_all_uses_with(self._own(value, x))
        if not travelling:
            return
        with self.graph.inserting_before(node):
            rows = [self._stacked(self._term(v)) for v in travelling]
        srcs = [row.meta["layout"] for row in rows]
        dsts = [Layout((Dim.whole(src.dims[0].size), *src.dims[1:]), src.partial) for src in srcs]
        texts = (list(map(str, srcs)), list(map(str, dsts)))
        self.sent.append(self._message(node, outgoing, rows, *texts))
        corrected = [self.gn == "corrected" and of_moments(self._term(v)) is not None for v in travelling]
        olds = [self._before(self._term(v)) if c else None for v, c in zip(travelling, corrected, strict=True)]
        if not self.steady:
            return
        with self.graph.inserting_before(node):
            rows = [row if old is None else self._stacked(old) for row, old in zip(rows, olds, strict=True)]
            met = self.graph.call_function(late, (rows, *texts))
            met.meta = {**inherited(node.meta), "val": [r.meta["val"] for r in rows], "layout": tuple(dsts)}
        met.args = (*met.args, self._came(met))
        for i, (value, old, dst) in enumerate(zip(travelling, olds, dsts, strict=True)):
            with self.graph.inserting_before(node):
                part = self.graph.call_function(getitem, (met, i))
                part.meta = {**inherited(node.meta), "val": rows[i].meta["val"], "layout": dst}
                total = self.graph.call_function(aten.sum.dim_IntList, (part, [0]))
                total.meta = self._like(value)
            value.replace_all_uses_with(total if old is None else self._corrected(value, total, old))

    def _term(self, value: fx.Node) -> fx.Node:
        term: fx.Node = value.args[0].args[0][value.args[1]]  # type: ignore[union-attr, index, assignment]
        return term

    def _stacked(self, x: fx.Node) -> fx.Node:
        layout: Layout = x.meta["layout"]
        [entry] = [p for p in layout.partial if AXIS in p.axes]
        count = self.mesh.size(entry.axes)
        new = self.graph.call_function(terms, (x, str(entry), count))
        value = x.meta["val"]
        with value.fake_mode:
            stacked = value.new_empty((count, *value.shape))
        rest = tuple(p for p in layout.partial if p != entry)
        dims = (Dim.split(count, entry.axes, (1,) * count), *layout.dims)
        new.meta = {**inherited(x.meta), "val": stacked, "layout": Layout(dims, rest)}
        return new

    def _before(self, x: fx.Node) -> fx.Node | None:
        """The rank's term of its last call, which it keeps for that."""
        self.terms.append(x)
        if not self.steady:
            return None
        return self._given(f"term_{len(self.before)}", self.before, x.meta["val"], x.meta["layout"])

    def _own(self, value: fx.Node, x: fx.Node) -> fx.Node:
        """An estimate of a norm's sum by the rank's own term."""
        of = of_moments(self._term(value))
        assert of is not None
        factors = [1 / s if s else 0.0 for s in own_shares(of, self.mesh)]
        return self._after(value, share, x, factors)

    def _corrected(self, value: fx.Node, total: fx.Node, old: fx.Node) -> fx.Node:
        now, before = self._own(value, self._term(value)), self._own(value, old)
        others = self._after(value, aten.sub.Tensor, total, before)
        return self._after(value, plausible, self._after(value, aten.add.Tensor, now, others), now)

    def _after(self, value: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A node behind ``value``, and behind those that were made so before."""
        with self.graph.inserting_after(self.last.get(value, value)):
            new = self.last[value] = self.graph.call_function(target, args)
        new.meta = self._like(value)
        return new

    def _like(self, value: fx.Node) -> dict[str, Any]:
        return {**inherited(value.meta), "val": value.meta["val"], "layout": value.meta["layout"]}
