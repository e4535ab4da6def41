"""Closed forms of a plan's communication volume, to hold the counted bytes against.

Per attention of B batch, S query and T key rows, H heads of width D (DeepSpeed-Ulysses,
section 3; USP, table 1), elements that leave a rank:

* ulysses, N ranks: 4 exchanges of 1/N of the tensor, (N-1)/N of which leaves:
  ``(2 S + 2 T) B H D (N-1) / N^2``
* gather: each rank's K and V rows go to N-1 others: ``2 T B H D (N-1) / N``

plus the outputs, whose N-1 foreign shares every rank receives: ``numel (N-1) / N``.
Where N does not divide the rows, the busiest rank sends more than the mean that the forms
give. Halos of convolutions and sums over ranks are not part of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.program import Program
from fastpar.sharding.candidates import is_attention

TEXT = {
    "ulysses": "sum over attentions of (2S + 2T) B H D (N-1)/N^2, plus outputs (N-1)/N",
    "gather": "sum over attentions of 2T B H D (N-1)/N, plus outputs (N-1)/N",
    "rectangle": "sum over attentions of B H D ((2S(N-r) + 2T(N-r))/N^2 with r ranks per head group, "
    "K and V gathered over them), plus outputs (N-1)/N",
}


@dataclass(frozen=True)
class Volume:
    """Bytes that leave the busiest rank by the plan's closed form, and the form."""

    bytes: int
    text: str


def volume(sharded: Program, plan: Plan, mesh: Mesh) -> Volume:
    """The closed form for a lowered program's attentions with split keys, and its outputs."""
    total = 0.0
    n = mesh.ranks
    for node in sharded.graph.nodes:
        if n == 1:
            break
        if is_attention(node) and node.meta.get("split_keys"):
            total += _attention(node, plan, mesh)
    for node in set(sharded.graph.output_node().all_input_nodes):
        if n > 1 and node.meta.get("why") == "output" or _from_output(node):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                total += value.numel() * value.element_size() * (n - 1) / n
    name = "gather" if plan.gather else "ulysses" if len(mesh.axes) <= 1 else "rectangle"
    return Volume(math.ceil(total), TEXT[name])


def _from_output(node: fx.Node) -> bool:
    """True where the value's rows were gathered for the output a few local operators earlier."""
    todo: list[fx.Node] = [node]
    seen: set[fx.Node] = set()
    while todo:
        at = todo.pop()
        if at in seen or len(seen) > 64:
            continue
        seen.add(at)
        if at.meta.get("why") == "output":
            return True
        layout = at.meta.get("layout")
        if isinstance(layout, Layout) and layout.is_whole:
            todo += at.all_input_nodes
    return False


def _attention(node: fx.Node, plan: Plan, mesh: Mesh) -> float:
    q, k = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
    size = q.element_size()
    n = mesh.ranks
    keys = 2 * k.numel() / n  # K and V rows of one rank
    if plan.gather:
        return keys * (n - 1) * size
    rows = 2 * q.numel() / n  # Q and O rows of one rank
    # r ranks share one group of heads: they split its query rows, and each needs all its keys
    layout: Layout = node.meta["layout"]
    spent = layout.dims[-3].axes if len(layout.dims) > 2 else frozenset()
    groups = mesh.size(mesh.ordered(spent)) if spent else 1
    own = 1 / groups  # share of the heads that a rank works on
    received_rows = rows * own * (groups - 1)
    received_keys = 2 * k.numel() * own * (n - 1) / n
    return (received_rows + received_keys) * size
