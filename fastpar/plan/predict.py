"""The time and memory of one call under a plan, from a workload and a topology.

Per operator the larger of FLOPs over peak and bytes over bandwidth, communication over the busiest link
(``topology.seconds``), a ring's steps and a torus's stages hidden under the attention that they feed. Eager also
moves the bytes of what a compiler would fuse, and waits for the host where that is slower. What devices and links
reach of their data sheets stands in the topology; constants of the software are few, and stand here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.ops.quantize import row_bytes
from fastpar.plan import cost
from fastpar.plan.expand import with_speeds
from fastpar.plan.topology import Device, Topology
from fastpar.plan.workload import Attention, Workload

LAUNCH = 5e-6  # seconds that the CPU needs to launch a kernel from PyTorch
FUSED = 2  # kernels per product, attention or reduction once pointwise operators are fused
EXCHANGE = 3  # kernels that eager launches per collective: a copy before, the exchange, a copy after
USABLE = 0.92  # of a device's memory


@dataclass(frozen=True)
class Prediction:
    """One call on the busiest rank: seconds (in all, computing, communicating, and what of that is not hidden),
    bytes that leave it, collectives, bytes of memory, and the order of mesh axes that was placed."""

    plan: Plan
    order: tuple[str, ...]
    seconds: float
    compute: float
    communication: float
    exposed: float
    bytes: float
    collectives: int
    memory: float
    links: dict[str, str] = field(default_factory=dict)  # axis -> the outermost link that it crosses


def predict(
    work: Workload, plan: Plan, topology: Topology, lowering: str = "inductor", launch: float = LAUNCH
) -> Prediction:
    """The prediction under the best order of the plan's axes. Raises OptionError for too few devices.

    ``launch``: seconds that the host needs per kernel (more where modules in Python launch them one by one).
    """
    topology.check(plan.degree)
    orders = _orders(plan)
    return min((_predict(work, plan, topology, lowering, order, launch) for order in orders), key=lambda p: p.seconds)


def predict_in(work: Workload, plan: Plan, topology: Topology, order: Sequence[str] | None) -> float:
    """Seconds with the plan's axes in this order (from the outside in); None takes the best one."""
    if order is None:
        return predict(work, plan, topology).seconds
    topology.check(plan.degree)
    return _predict(work, plan, topology, "inductor", tuple(order), LAUNCH).seconds


def _orders(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Orders of the mesh's axes, the usual one first: the last axis joins neighbouring devices."""
    return permutations(name for name, degree in plan.axes if degree > 1)


class _Place:
    """Ranks of a mesh on devices, and the messages along some of its axes."""

    def __init__(self, plan: Plan, order: Sequence[str], topology: Topology) -> None:
        degrees = dict(plan.axes)
        self.mesh = Mesh(tuple((name, degrees[name]) for name in order))
        self.topology = topology
        self.ranks = np.arange(self.mesh.ranks).reshape([size for _, size in self.mesh.axes] or [1])

    def groups(self, axes: Sequence[str]) -> np.ndarray:
        """[groups, members] of the sub-mesh over ``axes``."""
        at = [self.mesh.names.index(a) for a in axes]
        last = list(range(self.ranks.ndim - len(at), self.ranks.ndim))
        size = self.mesh.size(tuple(axes))
        return np.moveaxis(self.ranks, at, last).reshape(-1, size)

    def all_to_all(self, axes: Sequence[str], size: float) -> float:
        """Seconds in which every rank sends ``size`` bytes to each other one of its group."""
        groups = self.groups(axes)
        src, dst = (x.reshape(-1) for x in np.broadcast_arrays(groups[:, :, None], groups[:, None, :]))
        return self.topology.seconds((src, dst, np.full(src.shape, size)))

    def shift(self, axes: Sequence[str], size: float) -> float:
        """Seconds in which every rank sends ``size`` bytes to the next one of its group."""
        groups = self.groups(axes)
        src, dst = groups.reshape(-1), np.roll(groups, -1, axis=1).reshape(-1)
        return self.topology.seconds((src, dst, np.full(src.shape, size)))

    def round(self, axes: Sequence[str], size: float) -> float:
        """Seconds in which ``size`` bytes of every rank go round its group, as NCCL gathers and sums: each link
        carries what all the others have, in pieces that follow each other, so the latency is paid once."""
        return self.shift(axes, size * (self.mesh.size(tuple(axes)) - 1))

    def link(self, axis: str) -> str:
        return self.topology.link([int(x) for x in self.groups([axis])[0]])


def _predict(
    work: Workload, plan: Plan, topology: Topology, lowering: str, order: tuple[str, ...], launch: float
) -> Prediction:
    place = _Place(plan, order, topology)
    device, total = topology.device, plan.degree
    dealt = bool(plan.cfg and plan.cfg > 1 and work.batch == 1)
    deal = plan.cfg if dealt and plan.cfg else 1
    split = total // deal  # ranks that share one call
    tokens = plan.token_degree
    uneven = 1.0 if plan.speeds else math.ceil(work.rows / tokens) * tokens / work.rows
    # what a rank has of a call's rows, and how fast it is: ranks alike are looked at once
    parts = with_speeds(plan, place.mesh).shares(place.mesh.names)
    mesh = with_speeds(plan, place.mesh)
    # of a rank that runs one of several steps, the mean over all of them
    paces = {(uneven * float(x) * deal, topology.speed(rank) * mesh.stride(rank)) for rank, x in enumerate(parts)}
    compute = max(_computing(work, plan, device, part, lowering) / pace for part, pace in paces)
    communication = exposed = sent = buffers = 0.0
    collectives = 0
    met = mesh.met(("gather",)) if plan.steps else 1.0  # of a step's exchanges, in the mean
    for attention in work.attentions:
        if attention.split and tokens > 1:
            compute += attention.count * _converting(attention, plan, split) / (device.bandwidth * device.streaming)
            part = _talk(attention, plan, place, split, device.flops * device.attends(attention.width))
            communication += part[0] * attention.count * met
            exposed += 0.0 if plan.displaced else part[1] * attention.count
            sent += part[2] * attention.count * met
            collectives += part[3] * attention.count
            # keys and values of all attentions are kept from step to step (DistriFusion), or one at a time is there
            kept = attention.count * (2 if plan.steps else 1)  # the message that came, and the own one
            buffers = buffers + part[4] * kept if plan.displaced else max(buffers, part[4])
    if plan.displaced:  # a whole step hides it, whichever attention it is for
        exposed += max(0.0, communication - compute)
    if plan.tp and plan.tp > 1:  # Megatron-LM, section 3: one sum behind each attention, one behind its MLP
        usual = [(a.batch * a.heads * a.queries * a.width * a.itemsize, 2 * a.count) for a in work.attentions]
        for whole, count in work.sums or usual:
            size = whole / (split // plan.tp)
            summed = place.round(["tp"], 2 * size / plan.tp) * count
            communication, exposed = communication + summed, exposed + summed
            sent += count * cost.number(cost.ELEMENTS["sums over ranks"])(S=size, t=plan.tp)
            collectives += count
    axes = [a for a in order if not (dealt and a == "cfg")]
    out = work.outputs / max(1, split)
    last = place.all_to_all(axes, out) if split > 1 else 0.0
    if dealt:  # the mean over calls, of which this rank runs one in ``deal``
        last += place.all_to_all(["cfg"], work.outputs)
        sent += work.outputs * (deal - 1)
    sent += out * (split - 1)
    collectives += (split > 1) + dealt
    communication, exposed = communication + last, exposed + last
    if lowering == "eager":
        compute = max(compute, (work.launches + EXCHANGE * collectives) * launch - exposed)
    return Prediction(
        plan=plan,
        order=order,
        seconds=(compute + exposed) / deal,
        compute=compute / deal,
        communication=communication / deal,
        exposed=exposed / deal,
        bytes=sent / deal,
        collectives=collectives,
        memory=work.parameters + work.peak * max(part for part, _ in paces) + buffers,
        links={name: place.link(name) for name in order},
    )


def _computing(work: Workload, plan: Plan, device: Device, part: float, lowering: str) -> float:
    """Seconds for which ``device`` computes that has this part of the rows."""
    share = np.where(work.carries, part, 1.0)
    cut = plan.tp or 1  # ranks that share columns of weights
    stream = device.bandwidth * device.streaming
    each = np.maximum.reduce([
        work.flops * share / (device.flops * np.where(work.attends, device.attends(work.width), device.products)),
        (work.activations * share + work.weights / np.where(work.carries, cut, 1)) / stream,
        np.full(len(work.flops), FUSED * LAUNCH),
    ])  # fmt: skip
    compute = float((each * work.counts).sum())
    if lowering == "eager":
        # Tensor parallelism cuts what stands inside attention and MLP, and leaves norms, gates and residuals whole.
        carried = (work.pointwise[0] - work.cut * (1 - 1 / cut)) * part * cut
        one = carried / max(1.0, work.launches - float(work.counts.sum()))
        compute += carried / device.pointwise(one) + work.pointwise[1] / stream
    return compute


def _converting(a: Attention, plan: Plan, split: int) -> float:
    """Bytes that a rank reads and writes to make bytes of rows that travel in 8 bits, and numbers of those that came.

    Of queries and outputs as many as it has; of keys and values those of all blocks that come.
    """
    rows = {letter: a.batch * a.heads * a.queries for letter in "qo"}
    rows |= {letter: a.batch * a.key_heads * a.keys for letter in "kv"}
    ours = set(plan.fp8) & set(rows if (plan.ulysses or 1) * (plan.torus or 1) > 1 else "kv")
    each = a.width * a.itemsize + row_bytes(a.width, a.itemsize)
    came = {letter: 1 if letter in "qo" else _blocks(plan) for letter in ours}
    return sum(rows[letter] * (1 + came[letter]) * each / split for letter in ours)


def _blocks(plan: Plan) -> int:
    """Blocks of keys that a rank makes numbers of: its own, and those that come round."""
    return (plan.ring or 1) * (plan.torus or 1) * (plan.gather or 1)


def _talk(
    a: Attention, plan: Plan, place: _Place, split: int, peak: float
) -> tuple[float, float, float, int, float]:
    """(seconds, of which not hidden, bytes sent, collectives, bytes of buffers) of one attention."""
    batch = split // plan.token_degree  # ranks that share the batch
    q = a.batch * a.heads * a.queries * a.width * a.itemsize / batch
    k = a.batch * a.key_heads * a.keys * a.width * a.itemsize / batch
    of_q, of_k = cost.shares(plan.fp8, a.width, a.itemsize)
    q, k = of_q * q, of_k * k
    n = plan.token_degree
    if plan.gather and plan.gather > 1:
        values = dict(Q=q, K=k, n=n)
        seconds = 2 * place.round(["gather"], k / n)
        buffers = cost.number(cost.MEMORY["gather"])(**values)
        return seconds, seconds, cost.attention_elements("gather", **values), 2, buffers
    degree, machines = plan.ulysses or 1, plan.torus or 1
    r = (plan.ring or 1) * machines
    u = cost.head_share(degree, a.key_heads)
    w = degree // u
    m = cost.head_share(machines, a.key_heads // u)
    values = dict(Q=q, K=k, n=n, u=u, w=w, r=r, M=machines, m=m)
    seconds = exposed = 0.0
    if degree > 1:
        seconds = 2 * place.all_to_all(["ulysses"], k / (n * u))
        if u > 1:
            queries = place.all_to_all(["ulysses"], q / (n * degree))
            seconds += 2 * queries
        exposed = seconds
        if 1 < u < degree:  # queries and keys go over different groups at once: links are shared, a latency is not
            exposed -= 2 * queries - place.all_to_all(["ulysses"], 2 * q / (n * degree))
    blocks = a.flops / batch / n / peak  # a rank's attention; a step or a stage hides under a part of it
    if machines > 1:
        pulled, keys = place.shift(["torus"], q / (n * m)), place.shift(["torus"], 2 * k / (r * u * m))
        block = blocks / (machines * m)
        seconds += 2 * (m - 1) * pulled + (machines - 1) * keys
        exposed += 2 * (m - 1) * max(0.0, pulled - block)  # queries, and outputs on their way back
        exposed += max(0.0, keys - block) + (machines - 2) * max(0.0, keys - m * block)
    if r > machines:
        step = place.shift(["ring"], 2 * k / (r * u * m))
        seconds += (r - machines) * step
        exposed += (r - machines) * max(0.0, step - blocks / (r * m))
    spaces = ["ulysses", *(["torus"] if machines > 1 else ["ring"] * (r > 1))]
    count = int(sum(cost.number(cost.COLLECTIVES[name])(**values) for name in spaces))
    buffers = sum(cost.number(cost.MEMORY[name])(**values) for name in spaces)
    return seconds, exposed, sum(cost.elements(name, **values) for name in cost.terms(plan)), count, buffers
