"""Values that are put together from this call's rows and the last one's (``fastpar.ops.displaced``)."""

from __future__ import annotations

import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.displaced import around, cut, cut_boxes, kept_apart, tiles
from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, Decision, Localised, Rule, register

aten = torch.ops.aten


class ContextRule(Rule):
    """context(y, src, dst): noted with the layout of y, though a rank may keep less of it."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        dst = Layout.parse(call.args[2])
        return Decision((dst,), (dst,))

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        y, src, dst = call.args
        exchange = kept_apart(Layout.parse(src), Layout.parse(dst), mesh, rank)
        return (aten.alias.default, (y,), {}) if exchange is None else (cut, (y, cut_boxes(exchange)), {})


class DisplacedRule(Rule):
    """displaced(x, old, src, dst)."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        src, dst = map(Layout.parse, call.args[2:4])
        return Decision((src, dst), (dst,))

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        x, old, src, dst = call.args
        return around, (x, old, *tiles(Layout.parse(src), Layout.parse(dst), mesh, rank)), {}


class ShareRule(Rule):
    """share(x, factors): one factor per rank."""

    localises_whole = True

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        return Decision(layouts, (layouts[0].summed(),))

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        x, factors = call.args
        return aten.mul.Tensor, (x, factors[rank]), {}


def _plausible(call: Call) -> Factors:
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    return Factors((names, names), (names,), whole={"d0": "the mean and the mean square"})


register("fastpar::context", ContextRule())
register("fastpar::displaced", DisplacedRule())
register("fastpar::share", ShareRule())
register("fastpar::plausible", FactorRule(_plausible))
