"""What arrived is sent on as it lies there: a localised program without copies of messages.

A ring unpacks keys and values, attends, and packs the very same boxes for the next rank. Where ``pack`` takes all that
one ``unpack`` gave, box for box, its message is the buffer that came. Only where collectives are two-sided: one-sided
ones unpack out of a heap in which the buffer does not stay.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

from torch import fx

from fastpar.graph.program import copy_module
from fastpar.ops.collectives import decode, pack, unpack


def forwarded(gm: fx.GraphModule) -> fx.GraphModule:
    """A localised program in which messages that came are sent on without being unpacked and packed.

    A copy of the given one, or that one where there is nothing to send on.
    """
    if any(node.target is pack and _came(node) is not None for node in gm.graph.nodes):
        gm = copy_module(gm)
    for node in list(gm.graph.nodes):
        if node.target is pack and (source := _came(node)) is not None:
            parts = list(node.args[0])  # type: ignore[arg-type]
            node.replace_all_uses_with(source)
            for unused in (node, *parts, parts[0].args[0]):
                if not unused.users:
                    gm.graph.erase_node(unused)
    gm.recompile()
    return gm


def _came(node: fx.Node) -> fx.Node | None:
    """The buffer that holds just what ``node`` packs, in the same order; None where there is none."""
    xs: Any = node.args[0]
    sources = {x.args[0] for x in xs if x.target is getitem}
    if len(sources) != 1 or any(x.target is not getitem for x in xs):
        return None
    (source,) = sources
    if source.target is not unpack:
        return None
    sent = [(xs[lane].args[1], *box) for lane, *box in decode(node.args[1])]  # type: ignore[arg-type]
    return source.args[0] if sent == decode(source.args[2]) else None
