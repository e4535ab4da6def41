"""The part of a graph that is worth most, of those that have all they need (project selection).

It is a minimum cut: from a source to what brings something, from what costs something to a sink, and without limit
from everything to what it needs (Picard, "Maximal closure of a graph and applications", 1976).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import networkx as nx

_Node = TypeVar("_Node", bound=Hashable)

_UNIT = 1e12
"""Worths are cut to whole numbers of this (picoseconds): flows of floats need not come to an end."""


def best_closure(worth: Mapping[_Node, float], needs: Mapping[_Node, Iterable[_Node]]) -> set[_Node]:
    """Nodes whose ``worth`` (below 0 for what costs) adds up to the most, with each of them all that it ``needs``;
    of several such sets the smallest. What a node needs must have a worth."""
    flow, source, sink = nx.DiGraph(), object(), object()
    flow.add_nodes_from((source, sink))
    for node, value in worth.items():
        if value > 0:
            flow.add_edge(source, node, capacity=round(value * _UNIT))
        elif value < 0:
            flow.add_edge(node, sink, capacity=round(-value * _UNIT))
        for need in needs.get(node, ()):
            flow.add_edge(node, need)  # without capacity: infinite
    _, (chosen, _) = nx.minimum_cut(flow, source, sink)
    return chosen - {source}
