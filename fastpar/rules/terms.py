"""The terms of a partial value (``fastpar.ops.terms``): what was partial over axes is split over them."""

from __future__ import annotations

import torch

from fastpar.core.layout import Dim, Layout, Partial
from fastpar.core.mesh import Mesh
from fastpar.rules.table import Call, Decision, Localised, Rule, register


class TermsRule(Rule):
    """terms(x, partial, count): [count@axes, *x], without that reduction."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        (x,), entry, count = layouts, Partial.parse(call.args[1]), call.args[2]
        if entry not in x.partial:
            return Decision((x.summed(),), (Layout((Dim.whole(count), *x.dims)),))
        rest = tuple(p for p in x.partial if p != entry)
        return Decision((x,), (Layout((Dim.split(count, entry.axes, (1,) * count), *x.dims), rest),))

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        if outs[0].dims[0].is_whole:
            return super().localise(call, ins, outs, mesh, rank)
        return torch.ops.aten.unsqueeze.default, (call.args[0], 0), {}


register("fastpar::terms", TermsRule())
