"""How much a rank has to multiply under a sharded graph: what candidates are compared by before their bytes."""

from __future__ import annotations

import math

import torch
from torch import fx

from fastpar.core.mesh import Mesh
from fastpar.sharding.candidates import is_attention
from fastpar.sharding.insert import HEAVY


def busiest(graph: fx.Graph, mesh: Mesh) -> float:
    """Multiply-adds of the rank that is last with them (attention over split keys counted as if it had them all)."""
    work = [0.0] * mesh.ranks
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name in HEAVY:
            layout, each = node.meta["layout"], depth(node)
            for rank in range(mesh.ranks):
                work[rank] += math.prod(layout.local_shape(mesh, rank)) * each
    return max(amount / mesh.speed(rank) for rank, amount in enumerate(work))


def depth(node: fx.Node) -> int:
    """Multiply-adds per element of the result."""
    if is_attention(node):
        return 2 * int(node.args[1].meta["val"].shape[-2])  # type: ignore[union-attr]
    if node.target is torch.ops.aten.convolution.default:  # channels of one group times the kernel
        return math.prod(int(s) for s in node.args[1].meta["val"].shape[1:])  # type: ignore[union-attr]
    operand = node.args[1] if node.target is torch.ops.aten.addmm.default else node.args[0]
    return int(operand.meta["val"].shape[-1])  # type: ignore[union-attr]
