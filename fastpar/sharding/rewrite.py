"""Small edits that passes share: put a redistribute in front of a user."""

from __future__ import annotations

from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Layout
from fastpar.ops.redistribute import redistribute


def redistributed(user: fx.Node | None, value: fx.Node, want: Layout, why: str) -> fx.Node:
    """``value`` in layout ``want``, inserted before ``user`` (or at the graph's insertion point).

    Returns ``value`` itself where it has that layout already.
    """
    have: Layout = value.meta["layout"]
    if have == want:
        return value
    graph = value.graph

    def make() -> fx.Node:
        node = graph.call_function(redistribute, (value, str(have), str(want)))
        node.meta = {**inherited((user or value).meta), "val": value.meta["val"], "layout": want, "why": why}
        return node

    if user is None:
        return make()
    with graph.inserting_before(user):
        return make()
