"""Time of a program on a roofline: per operator the larger of FLOPs over peak and bytes over bandwidth.

What a FLOP share hides: work that every rank repeats because it only sees the batch is small in
FLOPs but reads its weights in full. Views are free, pointwise chains are counted as if fused
(each value is written once and read by products and reductions), weights are read once per use.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.count import likeness, node_flops
from fastpar.graph.program import Program
from fastpar.ops.collectives import COLLECTIVES, pack
from fastpar.rules.table import tensor_operands

# NVIDIA H100 SXM data sheet: dense bf16 tensor throughput, HBM3 bandwidth. Shares are ratios of two
# times on the same device, so only peak over bandwidth matters.
PEAK_FLOPS = 989e12
BANDWIDTH = 3.35e12

_READS = frozenset(
    ["aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::_scaled_mm", "aten::_int_mm",
     "fastpar::attention", "fastpar::attention_lse", "aten::native_layer_norm", "aten::native_group_norm",
     "aten::_softmax", "aten::sum", "aten::mean", "aten::amax", "aten::cat", "aten::embedding",
     "aten::index", "fastpar::resample", "fastpar::band"]  # fmt: skip
)

_MESSAGES = (*COLLECTIVES, pack)


def reads(node: fx.Node) -> bool:
    """Whether the operator reads its operands from memory; the others are fused with what comes before."""
    if node.target is torch.ops.aten.cat.default and all(user.target in _MESSAGES for user in node.users):
        return False  # that is how the message is written, which counts as the exchange's
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in _READS


def seconds(program: Program) -> list[float]:
    """Seconds of every rank (one entry where the program is still whole), the mean over a sampler's steps."""
    mesh: Mesh = program.mesh if program.stage != "captured" else Mesh()
    totals = [0.0] * mesh.ranks
    known: dict[Hashable, list[float]] = {}
    for node in program.graph.nodes:
        if not reads(node):
            continue
        key = likeness(node)
        if key not in known:
            known[key] = [_seconds(node, mesh, rank) for rank in range(mesh.ranks)]
        totals = [a + b for a, b in zip(totals, known[key], strict=True)]
    return [total / mesh.stride(rank) for rank, total in enumerate(totals)]


def _seconds(node: fx.Node, mesh: Mesh, rank: int) -> float:
    def shape(n: fx.Node) -> object:
        return local_shape(n, mesh, rank)

    moved = sum(node_bytes(n, shape(n)) for n in tensor_operands(node)) + node_bytes(node, shape(node))
    return max(node_flops(node, shape) / PEAK_FLOPS, moved / BANDWIDTH)


def local_shape(node: fx.Node, mesh: Mesh, rank: int) -> Any:
    """Shape of what ``rank`` has of a value (of the first of several); what is no tensor, as it is."""
    value, layout = node.meta.get("val"), node.meta.get("layout")
    if isinstance(value, (tuple, list)) and value:
        value, layout = value[0], layout[0] if isinstance(layout, (tuple, list)) and layout else layout
    if isinstance(layout, Layout):
        return layout.local_shape(mesh, rank)
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else value


def node_bytes(node: fx.Node, shape: object) -> int:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor) or not isinstance(shape, tuple):
        return 0
    return math.prod(shape) * value.element_size()
