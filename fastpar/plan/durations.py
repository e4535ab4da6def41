"""Seconds of a lowered program's operators on a topology, which passes get to see as ``ctx.costs``.

One program stands for all ranks, so an operator lasts as long as on the rank where it lasts longest, and an
exchange as long as its busiest link needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fastpar.core.mesh import Mesh
from fastpar.graph.count import messages
from fastpar.graph.roofline import local_shape, reads
from fastpar.graph.schedule import Task, calls
from fastpar.ops.collectives import COLLECTIVES, all_reduce, all_to_all, axes_of
from fastpar.plan.clock import CHECK, check_seconds, seconds
from fastpar.plan.predict import LAUNCH
from fastpar.plan.topology import Topology, detect, load
from fastpar.rules import is_view

Messages = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Durations:
    """What operators of a program for ``mesh`` take on ``topology``; equal ones are looked at once."""

    topology: Topology
    mesh: Mesh

    def __post_init__(self) -> None:
        self._known: dict[Any, Task] = {}

    def tasks(self, graph: fx.Graph) -> dict[fx.Node, Task]:
        """What every operator of a lowered program takes."""
        return {node: self.task(node) for node in calls(graph)}

    def task(self, node: fx.Node) -> Task:
        """What one operator of a lowered program takes."""
        texts = map(self._text, (*node.args, node.meta.get("layout")))
        key = (node.target, *texts, *_dtypes(node), reads(node))
        if key not in self._known:
            self._known[key] = self._measure(node)
        return self._known[key]

    def written(self, node: fx.Node) -> float:
        """Seconds of the kernel that writes what a chain of pointwise operators gives, on the rank with most of it."""
        device = self.topology.device
        return max(LAUNCH, self.task(node).size / (device.bandwidth * device.streaming))

    def checked(self, sizes: Iterable[float]) -> float:
        """Seconds of the check, on every call, of inputs with so many bytes each: hoisted values are made of them.
        Of none, what any check takes besides. (Where ranks agree on the answer, that travels while they compute.)"""
        return CHECK + sum(check_seconds(size, self.topology.device) for size in sizes)

    def _text(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return self._text(arg.meta.get("layout"))
        if isinstance(arg, (list, tuple)):
            return "[" + ",".join(map(self._text, arg)) + "]"
        return str(arg)

    def _measure(self, node: fx.Node) -> Task:
        device = self.topology.device
        shares: dict[str, int] = {}  # other shapes or speeds than ranks before; as text: symbols have no hash
        for rank in range(self.mesh.ranks):
            shapes = [local_shape(n, self.mesh, rank) for n in (node, *node.all_input_nodes)]
            shares.setdefault(str((shapes, self.topology.speed(rank))), rank)
        ranks = list(shares.values())
        size = max(self._bytes(node, r) for r in ranks)
        if node.target not in COLLECTIVES:
            took = max(seconds(node, self.mesh, r, device) / self.topology.speed(r) for r in ranks)
            return Task(compute=took, size=size, view=is_view(node))
        moves = list(messages(node, self.mesh))
        senders, receivers, sizes = zip(*moves, strict=True)
        packed, unpacked = (max(_summed(ranks, sizes).values()) for ranks in (senders, receivers))
        if node.target is all_reduce:  # what is reduced is packed once, though it travels twice
            packed = unpacked = size
        copying = 2 / (device.bandwidth * device.streaming)
        return Task(
            compute=packed * copying,
            travel=self.topology.seconds(_routed(node, self.mesh, moves)),
            unpack=unpacked * copying,
            size=size,
        )

    def _bytes(self, node: fx.Node, rank: int) -> int:
        """Bytes of what ``rank`` gets from the operator."""
        value, layout = node.meta.get("val"), node.meta.get("layout")
        if not isinstance(value, (list, tuple)):
            value, layout = [value], [layout]
        total = 0
        for v, lay in zip(value, layout if isinstance(layout, (list, tuple)) else [None] * len(value), strict=True):
            if isinstance(v, torch.Tensor):
                shape = lay.local_shape(self.mesh, rank) if lay is not None else v.shape
                total += math.prod(int(s) for s in shape) * v.element_size()
        return total


def durations(mesh: Mesh, topology: str | Topology | None = None) -> Durations:
    """Those of ``topology`` (or a preset's name, or a file); without one, of the machine at hand (``detect``)."""
    if topology is None:
        return Durations(detect(mesh.ranks)[0], mesh)
    return Durations(load(topology) if isinstance(topology, str) else topology, mesh)


def _dtypes(node: fx.Node) -> tuple[Any, ...]:
    return tuple(getattr(n.meta.get("val"), "dtype", None) for n in node.all_input_nodes)


def _summed(ranks: Iterable[int], sizes: Iterable[float]) -> dict[int, float]:
    """Bytes per sender or receiver, what a rank keeps for itself included."""
    totals: dict[int, float] = {}
    for rank, size in zip(ranks, sizes, strict=True):
        totals[rank] = totals.get(rank, 0.0) + size
    return totals


def _routed(node: fx.Node, mesh: Mesh, moves: list[tuple[int, int, float]]) -> Messages:
    """Ranks that send, ranks that receive, and bytes. Gathers and sums go round the group, neighbour to neighbour."""
    totals: dict[tuple[int, int], float] = {}
    axes = axes_of(node, mesh)
    for rank, peer, size in moves:
        if node.target is not all_to_all:
            if rank == peer:
                continue
            group = mesh.group(rank, axes)
            peer = group[(group.index(rank) + 1) % len(group)]
        totals[rank, peer] = totals.get((rank, peer), 0.0) + size
    pairs = np.array(list(totals)).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.array(list(totals.values()))
