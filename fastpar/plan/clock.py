"""A virtual clock: how long the ranks' programs take on a topology, and what they wait for.

Two streams per rank. Operators run one after the other on the first, each for the larger of FLOPs over peak and
bytes over bandwidth; an exchange starts when all ranks of its group have come to it and their second stream is
free, lasts as long as the busiest link needs (the same exchange of all groups at once, so that a shared link is
shared), and a wait holds the first stream until it is over. What a wait holds is exposed communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from fastpar.core.errors import CheckError
from fastpar.core.mesh import Mesh
from fastpar.graph.count import node_flops
from fastpar.graph.program import Program, source_line
from fastpar.graph.roofline import local_shape, node_bytes, reads
from fastpar.ops.collectives import pack, unpack
from fastpar.plan.predict import FUSED, LAUNCH
from fastpar.plan.topology import Device, Topology

_C10D = torch.ops._c10d_functional
_STARTS = (_C10D.all_to_all_single.default, _C10D.all_gather_into_tensor.default, _C10D.all_reduce.default)


_ATTENTIONS = ("fastpar::attention", "fastpar::attention_lse")


@dataclass(frozen=True)
class Event:
    """Something that a rank's stream (``compute``, ``communication`` or ``wait``) did, in seconds."""

    rank: int
    stream: str
    name: str
    start: float
    end: float
    source: str = ""


@dataclass
class Timeline:
    """One call on all ranks: seconds until the last is done; of the busiest rank what it computed, what its
    exchanges took and what of that it waited for."""

    seconds: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    events: list[Event] = field(default_factory=list)


def run(programs: Sequence[Program], topology: Topology) -> Timeline:
    """The timeline of N localised programs (rank r on device r).

    Raises OptionError for too few devices, CheckError where ranks come to different exchanges.
    """
    mesh: Mesh = programs[0].mesh
    topology.check(mesh.ranks)
    starts = [[n for n in p.graph.nodes if n.target in _STARTS] for p in programs]
    if len({len(s) for s in starts}) > 1:
        raise CheckError(f"ranks start different numbers of exchanges: {[len(s) for s in starts]}")
    lasts = _durations(starts, mesh, topology)
    ranks = [_Rank(r, p, mesh, topology.device) for r, p in enumerate(programs)]
    arrived: list[dict[int, float]] = [{} for _ in lasts]
    ends: list[dict[int, float]] = [{} for _ in lasts]
    while any(not r.done for r in ranks):
        moved = False
        for rank in ranks:
            moved |= rank.advance(arrived, ends)
        for k, came in enumerate(arrived):
            for member in list(came):
                group = mesh.group(member, tuple(str(starts[member][k].args[-1]).split(".")))
                if member in ends[k] or not all(m in came for m in group):
                    continue
                begin = max(max(came[m], ranks[m].free) for m in group)
                for m in group:
                    ends[k][m] = ranks[m].free = begin + lasts[k]
                    node = starts[m][k]
                    name = str(node.target).split(".")[1]
                    ranks[m].events.append(Event(m, "communication", name, begin, ends[k][m], source_line(node)))
                moved = True
        if not moved:
            raise CheckError("ranks wait for exchanges that others never reach")
    busiest = max(ranks, key=lambda r: r.time)
    return Timeline(
        seconds=busiest.time,
        compute=busiest.computed,
        communication=sum(e.end - e.start for e in busiest.events if e.stream == "communication"),
        exposed=busiest.waited,
        events=[e for r in ranks for e in r.events],
    )


class _Rank:
    """One rank on its way through its program."""

    def __init__(self, rank: int, program: Program, mesh: Mesh, device: Device) -> None:
        self.rank, self.mesh, self.device = rank, mesh, device
        self.time = self.free = self.computed = self.waited = 0.0
        self.events: list[Event] = []
        self.done = False
        self.nodes: Iterator[fx.Node] = iter(program.graph.nodes)
        self.at: fx.Node | None = next(self.nodes, None)
        self.number: dict[fx.Node, int] = {}

    def advance(self, arrived: list[dict[int, float]], ends: list[dict[int, float]]) -> bool:
        """Run on until a wait whose end is not known yet; whether anything ran."""
        moved = False
        while self.at is not None:
            node = self.at
            if node.target in _STARTS:
                k = self.number[node] = len(self.number)
                arrived[k][self.rank] = self.time
            elif node.target is _C10D.wait_tensor.default:
                k = self.number[node.args[0]]  # type: ignore[index]
                if self.rank not in ends[k]:
                    return moved
                over = ends[k][self.rank]
                if over > self.time:
                    self.waited += over - self.time
                    self.events.append(Event(self.rank, "wait", "wait", self.time, over, source_line(node)))
                    self.time = over
            else:
                self._compute(node)
            self.at, moved = next(self.nodes, None), True
        self.done = True
        return moved

    def _compute(self, node: fx.Node) -> None:
        took = seconds(node, self.mesh, self.rank, self.device)
        if took:
            name = str(node.target).removesuffix(".default")
            self.events.append(Event(self.rank, "compute", name, self.time, self.time + took, source_line(node)))
            self.time, self.computed = self.time + took, self.computed + took


def seconds(node: fx.Node, mesh: Mesh, rank: int, device: Device) -> float:
    """Of one operator of a localised program; 0 for what is fused with others or only looks at memory."""
    if node.op != "call_function":
        return 0.0

    def shape(n: fx.Node) -> Any:
        return local_shape(n, mesh, rank)

    if node.target in (pack, unpack):
        return 2 * _packed(node) / (device.bandwidth * device.streaming)
    if not reads(node):
        return 0.0
    moved = sum(node_bytes(n, shape(n)) for n in {*node.all_input_nodes, node})
    reached = device.products
    if node.target._schema.name in _ATTENTIONS:  # type: ignore[union-attr]
        reached = device.attends(shape(node.all_input_nodes[0])[-1])
    stream = device.bandwidth * device.streaming
    return max(node_flops(node, shape) / (device.flops * reached), moved / stream, FUSED * LAUNCH)


def _packed(node: fx.Node) -> int:
    """Bytes that a pack or unpack copies: the boxes are [operand, rank, *starts, *sizes] each."""
    flat: Any = node.args[1 if node.target is pack else 2]
    sizes = _itemsizes(node)
    total = i = 0
    while i < len(flat):
        n = flat[i + 1]
        total += math.prod(flat[i + 2 + n : i + 2 + 2 * n]) * sizes[flat[i] if len(sizes) > 1 else 0]
        i += 2 + 2 * n
    return total


def _itemsizes(node: fx.Node) -> list[int]:
    """Bytes of an element of each of a collective's values."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v.element_size() if isinstance(v, torch.Tensor) else 1 for v in values]


def _itemsize(node: fx.Node) -> int:
    """Bytes of an element of a collective's buffer: of bytes, where its values differ in dtype."""
    values = node.meta.get("val")
    dtypes = {v.dtype for v in values} if isinstance(values, (list, tuple)) else set()
    return 1 if len(dtypes) > 1 else _itemsizes(node)[0]


def _durations(starts: Sequence[Sequence[fx.Node]], mesh: Mesh, topology: Topology) -> list[float]:
    """Seconds of every exchange, all its groups at once."""
    known: dict[Any, float] = {}
    out = []
    for several in zip(*starts, strict=True):
        key = tuple((n.target, _itemsize(n), str(n.args[1:]), _given(n)) for n in several)
        if key not in known:
            known[key] = topology.seconds(_messages(several, mesh))
        out.append(known[key])
    return out


def _given(node: fx.Node) -> int:
    """Bytes that the rank puts in, where the arguments do not say it."""
    return 0 if node.target is _C10D.all_to_all_single.default else _packed(node.args[0])  # type: ignore[arg-type]


def _messages(several: Sequence[fx.Node], mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    src, dst, size = [], [], []
    for rank, node in enumerate(several):
        group = mesh.group(rank, tuple(str(node.args[-1]).split(".")))
        if node.target is _C10D.all_to_all_single.default:
            for i, peer in enumerate(group):
                src.append(rank)
                dst.append(peer)
                size.append(node.args[2][i] * _itemsize(node))  # type: ignore[index, operator]
            continue
        # Round the group, piece by piece; an all-reduce is a reduce-scatter and an all-gather of what it reduces.
        sent: float = _given(node) * (len(group) - 1)
        if node.target is _C10D.all_reduce.default:
            sent = 2 * sent / len(group)
        src.append(rank)
        dst.append(group[(group.index(rank) + 1) % len(group)])
        size.append(sent)
    return np.array(src), np.array(dst), np.array(size)
