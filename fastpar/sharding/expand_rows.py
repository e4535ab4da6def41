"""Rows in another order, or some of them: written out in slices, or moved straight to where they belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.redistribute import redistribute
from fastpar.rules import Call, rule_for
from fastpar.rules.index import LookupRule
from fastpar.rules.views import reversed_dim, slice_dim

Written = Callable[..., Any]
aten = torch.ops.aten


def flip(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Every rank turns its own rows round (the rule); then the rows go to the rank whose place they have."""
    layout = layouts[0].summed()
    dims = [d % len(call.shape) for d in call.arg(1, "dims")]
    if all(layout.dims[d].is_whole for d in dims):
        return None
    turned = layout
    for d in dims:
        turned = turned.with_dim(d, reversed_dim(layout.dims[d]))

    def written(x: torch.Tensor, dims: Any) -> torch.Tensor:
        x = redistribute(x, str(layouts[0]), str(layout)) if layouts[0].partial else x
        return redistribute(aten.flip.default(x, dims), str(turned), str(layout))

    return written


def roll(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """The rows behind the cut, then those before it: two segments, nothing moves."""
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims", [])
    shifts, dims = ([x] if isinstance(x, int) else list(x) for x in (shifts, dims))
    if not dims or all(layouts[0].dims[d].is_whole for d in dims):
        return None

    def written(x: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
        for shift, d in zip(shifts, dims, strict=True):
            size = int(x.shape[d])
            cut = -shift % size if size else 0
            if cut:
                parts = [aten.slice.Tensor(x, d, cut, size), aten.slice.Tensor(x, d, 0, cut)]
                x = aten.cat.default(parts, d)
        return x

    return written


def select(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """One row that every rank needs: only that row travels.

    Unless so many single rows of the value are taken (a loop over frames) that all of it travels once: every rank then
    gets all rows for its part of a dimension in front (heads), in which such a loop is done side by side.
    """
    shape = call.shapes[0]
    d = call.arg(1, "dim") % len(shape)
    layout = layouts[0].summed()
    if layout.dims[d].is_whole:
        return None
    index = call.arg(2, "index") % shape[d]
    axes = mesh.ordered(layout.dims[d].axes)
    if sum(_selects(n, d) for n in call.operands[0].users) * mesh.size(axes) > shape[d]:
        beside = next((i for i in range(d) if layout.dims[i].is_whole and shape[i] > 1), None)
        if beside is None:
            return None
        turned = layout.with_dim(d, Dim.whole(shape[d])).with_dim(beside, Dim.shared(shape[beside], axes, mesh))

        def written(x: torch.Tensor, dim: int, at: int) -> torch.Tensor:
            return aten.select.int(redistribute(x, str(layouts[0]), str(turned)), d, index)

        return written
    row = slice_dim(layout.dims[d], index, index + 1, 1)
    if row is None:
        return None
    cut = layout.with_dim(d, row)

    def single(x: torch.Tensor, dim: int, at: int) -> torch.Tensor:
        x = redistribute(x, str(layouts[0]), str(layout)) if layouts[0].partial else x
        x = aten.slice.Tensor(x, d, index, index + 1)
        return aten.squeeze.dim(redistribute(x, str(cut), str(cut.with_dim(d, Dim.whole(1)))), d)

    return single


def squeeze(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """A dimension of one row, which one rank has: every rank needs that row."""
    layout = layouts[0].summed()
    gone = call.arg(1, "dim", None)
    dims = range(len(call.shapes[0])) if gone is None else [gone] if isinstance(gone, int) else gone
    whole = layout
    for d in (d % len(call.shapes[0]) for d in dims):
        whole = whole.with_dim(d, Dim.whole(1)) if call.shapes[0][d] == 1 else whole
    if whole == layout:
        return None

    def written(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return call.node.target(redistribute(x, str(layouts[0]), str(whole)), *rest)  # type: ignore[operator,no-any-return]

    return written


def lookup(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Looked-up rows that are a sum over ranks are split at once: the table's were, and what follows is less then."""
    rule = rule_for(call)
    rows = rule.rows(call) if isinstance(rule, LookupRule) and not call.tail else []
    d = max(rows, key=lambda d: call.shape[d], default=None)
    out = rule.decide(call, tuple(layouts), mesh).outputs[0]
    if d is None or call.shape[d] < 2 or len(out.partial) != 1:
        return None
    axes = out.partial[0].axes
    cut = out.summed().with_dim(d, Dim.shared(call.shape[d], axes, mesh))

    def written(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = call.node.target(*args, **kwargs)  # type: ignore[operator]
        return redistribute(found, str(out), str(cut))

    return written


def _selects(node: fx.Node, d: int) -> bool:
    if node.target not in (aten.select.int, aten.select_copy.int):
        return False
    return node.args[1] % node.args[0].meta["val"].dim() == d  # type: ignore[union-attr,operator]


TABLE: dict[str, Callable[[Call, Sequence[Layout], Mesh], Written | None]] = {
    "aten::flip": flip,
    "aten::roll": roll,
    "aten::select": select,
    "aten::select_copy": select,
    "aten::squeeze": squeeze,
    "aten::squeeze_copy": squeeze,
    **{f"aten::{name}": lookup for name in ("embedding", "gather", "index", "_unsafe_index", "index_select")},
}
