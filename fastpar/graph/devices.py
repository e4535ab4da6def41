"""A captured graph on one device: what it computes on the host beside an accelerator moves there.

Models make tables on the CPU and send them over (rotary tables of Z-Image), and a graph break in between gives a graph
with inputs on both. A rank's values can only be exchanged where its process group talks, so such a graph's host part is
computed on the accelerator: tensors from the host are copied as they come, results that were the host's are copied
back. Numbers on the host (tensors without dimensions) stay, as eager mixes them with any device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fastpar.core.errors import CaptureError
from fastpar.core.inherit import inherited

_COPY = torch.ops.aten._to_copy.default


def accelerator(tensors: Iterable[tuple[str, Any]]) -> torch.device | None:
    """The one device that is not the CPU among these (name, value).

    Raises CaptureError where there are several, or where some are on ``meta``, which has no values, and others are not.
    """
    found: dict[torch.device, str] = {}
    for name, value in tensors:
        if isinstance(value, torch.Tensor) and (value.dim() > 0 or value.device.type != "cpu"):
            found.setdefault(value.device, name)
    others = [device for device in found if device.type != "cpu"]
    if len(others) > 1 or (len(found) > 1 and any(device.type == "meta" for device in found)):
        where = ", ".join(f"{name!r} on {device}" for device, name in found.items())
        raise CaptureError(f"the inputs of one graph are on several devices: {where}. Move them to one")
    return next(iter(others), None)


def device_of(graph: fx.Graph) -> torch.device | None:
    """The accelerator on which a captured graph computes anything; None for one that computes on the CPU alone."""
    values = ((n.name, v) for n in graph.nodes for v in pytree.tree_leaves(n.meta.get("val")))
    return accelerator((name, v) for name, v in values if isinstance(v, torch.Tensor) and v.device.type != "meta")


def on_one_device(gm: fx.GraphModule) -> None:
    """Rewrite a functional ATen graph in place so that all its tensors with dimensions are on its accelerator."""
    graph = gm.graph
    device = device_of(graph)
    if device is None or not any(_on_host(v) for n in graph.nodes for v in pytree.tree_leaves(n.meta.get("val"))):
        return
    returned = {n: n.meta.get("val") for n in graph.output_node().all_input_nodes}
    moved: dict[fx.Node, fx.Node] = {}
    arrived = set[fx.Node]()  # what is no longer on the host

    def here(node: fx.Node) -> fx.Node:
        """``node`` on the accelerator, copied behind it at most once."""
        if not isinstance(node.meta.get("val"), torch.Tensor) or node.meta["val"].device == device:
            return node
        if node not in moved:
            with graph.inserting_after(node):
                moved[node] = _copied(graph, node, device)
            arrived.add(moved[node])
        return moved[node]

    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        values = pytree.tree_leaves(node.meta.get("val"))
        follows = node.kwargs.get("device") is None and any(n in arrived for n in node.all_input_nodes)
        for value in [n for n in node.all_input_nodes if _on_host(n.meta.get("val"))]:
            node.replace_input_with(value, here(value))
            follows |= node.kwargs.get("device") is None
        if any(map(_on_host, values)):
            # also numbers that eager would have taken as they are: nothing else tells where the result is to be
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), here)  # type: ignore[assignment]
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": device}
        elif not follows:
            continue
        node.meta["val"] = pytree.tree_map(lambda v: _like(v, device), node.meta["val"])
        arrived.add(node)
    output = graph.output_node()
    for node, before in returned.items():
        now = node.meta["val"]
        if isinstance(before, torch.Tensor) and now.device != before.device:
            with graph.inserting_before(output):
                output.replace_input_with(node, _copied(graph, node, before.device))
    graph.lint()
    gm.recompile()


def _on_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() > 0


def _like(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _copied(graph: fx.Graph, node: fx.Node, device: torch.device) -> fx.Node:
    new = graph.call_function(_COPY, (node,), {"device": device})
    new.meta = {**inherited(node.meta), "val": _like(node.meta["val"], device)}
    return new
