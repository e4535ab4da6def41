"""One rank's version of a node: its target and arguments with local sizes."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.rules.table import Call, rule_for


class Localiser:
    """Localises the nodes of one graph, for any of its mesh's ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._seen: dict[fx.Node, tuple[Call, tuple[Layout, ...], tuple[Layout, ...], bool]] = {}

    def call(self, node: fx.Node, rank: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """(target, args, kwargs) of ``node`` on ``rank``; arguments still hold the graph's nodes."""
        if node not in self._seen:
            call = Call.of(node)
            ins = tuple(n.meta["layout"] for n in call.operands)
            layout = node.meta.get("layout")
            outs = (layout,) if isinstance(layout, Layout) else tuple(x for x in layout or () if x is not None)
            self._seen[node] = (call, ins, outs, all(x.is_whole for x in (*ins, *outs)))
        call, ins, outs, whole = self._seen[node]
        rule = rule_for(call)
        if whole and not rule.localises_whole:
            return node.target, call.args, call.kwargs
        return rule.localise(call, ins, outs, self.mesh, rank)
