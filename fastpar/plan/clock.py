"""A virtual clock: how long the ranks' programs take on a topology, and what they wait for.

Operators of a rank run one after the other on its computing stream, each for the larger of FLOPs over peak and bytes
over bandwidth. An exchange starts when all ranks of its group have come to it, on the stream that they have for these
axes of the mesh; exchanges that are under way at once share the links (``fastpar.plan.engine``). A wait holds the
computing stream until the exchange is over, and what it holds is exposed communication.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fastpar.core.errors import CheckError, OptionError
from fastpar.core.mesh import Mesh
from fastpar.graph.count import likeness, node_flops
from fastpar.graph.program import Program, source_line
from fastpar.graph.roofline import local_shape, node_bytes, reads
from fastpar.ops.checksum import LANES
from fastpar.ops.collectives import pack, unpack
from fastpar.plan.engine import Call, Engine, Op, Script, Start, Wait
from fastpar.plan.links import Load, load
from fastpar.plan.predict import FUSED, LAUNCH
from fastpar.plan.timeline import Event, Timeline
from fastpar.plan.topology import Device, Topology

__all__ = ["CHECK", "Event", "Timeline", "call", "check_seconds", "play", "run", "seconds"]

_C10D = torch.ops._c10d_functional
_STARTS = (_C10D.all_to_all_single.default, _C10D.all_gather_into_tensor.default, _C10D.all_reduce.default)


_ATTENTIONS = ("fastpar::attention", "fastpar::attention_lse")


def run(
    programs: Sequence[Program],
    topology: Topology,
    slowdown: Mapping[int, float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
) -> Timeline:
    """The timeline of one call of N localised programs (rank r on device r).

    ``slowdown`` has the ranks that compute slower than their devices, and how many times; with ``jitter`` every
    operator takes up to that share longer, by a number drawn from ``seed``. Raises OptionError for too few devices and
    for bad values, CheckError where ranks come to different exchanges.
    """
    return play([call(programs, topology)], programs[0].mesh, topology, slowdown, jitter, seed)


def play(
    calls: Sequence[Call],
    mesh: Mesh,
    topology: Topology,
    slowdown: Mapping[int, float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
    keep: int | None = None,
) -> Timeline:
    """The timeline of several calls (see ``call``), one after the other on every rank; arguments as for ``run``.
    Events of the first ``keep`` calls are kept, by default of all."""
    factors = [1 / topology.speed(rank) for rank in range(mesh.ranks)]
    for rank, factor in (slowdown or {}).items():
        if rank not in range(mesh.ranks):
            raise OptionError(f"slowdown: there is no rank {rank!r}; valid: 0 to {mesh.ranks - 1}")
        if not 0 < factor < math.inf:
            raise OptionError(f"slowdown: rank {rank} takes a number above 0 times as long, not {factor!r}")
        factors[rank] *= factor
    if not 0 <= jitter < math.inf:
        raise OptionError(f"jitter is a share of an operator's time, 0 or more, not {jitter!r}")
    return Engine(calls, [level.reached for level in topology.levels], factors, jitter, seed, keep).run()


def call(programs: Sequence[Program | None], topology: Topology) -> Call:
    """What the ranks do in one call of their localised programs, with seconds and loads; None for a rank that has
    nothing to do in it. Errors as for ``run``."""
    mesh: Mesh = next(p.mesh for p in programs if p is not None)
    topology.check(mesh.ranks)
    starts = {r: [n for n in p.graph.nodes if n.target in _STARTS] for r, p in enumerate(programs) if p is not None}
    if len({len(s) for s in starts.values()}) > 1:
        raise CheckError(f"ranks start different numbers of exchanges: {[len(s) for s in starts.values()]}")
    loads = _loads(starts, mesh, topology)
    return [_script(p, rank, mesh, topology.device, loads) if p is not None else () for rank, p in enumerate(programs)]


def _script(program: Program, rank: int, mesh: Mesh, device: Device, loads: Sequence[Mapping[int, Load]]) -> Script:
    script: list[Op | Start | Wait] = []
    number: dict[fx.Node, int] = {}
    lines: dict[str, str] = {}
    known: dict[Any, float] = {}

    def source(node: fx.Node) -> str:
        trace = node.meta.get("stack_trace") or ""
        if trace not in lines:
            lines[trace] = source_line(node)
        return lines[trace]

    def took(node: fx.Node) -> float:
        """Blocks of a model are alike: what an operator takes is worked out once."""
        if not reads(node):
            return seconds(node, mesh, rank, device)
        key = likeness(node)
        if key not in known:
            known[key] = seconds(node, mesh, rank, device)
        return known[key]

    for node in program.graph.nodes:
        if node.target in _STARTS:
            k = number[node] = len(number)
            name, axes = str(node.target).split(".")[1], str(node.args[-1])
            group = mesh.group(rank, tuple(axes.split(".")))
            script.append(Start(k, group, axes, loads[k][rank], name, source(node), _sent(node, group, rank)))
        elif node.target is _C10D.wait_tensor.default:
            if node.args[0] in number:  # else it came before the call
                script.append(Wait(number[node.args[0]], source(node)))  # type: ignore[index]
        elif length := took(node):
            script.append(Op(length, str(node.target).removesuffix(".default"), source(node)))
    return script


CHECK = 2 * LAUNCH
"""Seconds of a check beside reading: what it found is compared, and the answer brought to the host."""


def check_seconds(size: float, device: Device) -> float:
    """What one input of so many bytes adds to the check that comes before every step with hoisted values: it is read
    once, by a kernel that takes ``LANES`` inputs."""
    return size / (device.bandwidth * device.streaming) + LAUNCH / LANES


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


def _loads(starts: Mapping[int, Sequence[fx.Node]], mesh: Mesh, topology: Topology) -> list[dict[int, Load]]:
    """By rank, what every exchange of its group takes of the links; those alike are looked at once."""
    known: dict[Any, dict[int, Load]] = {}
    out = []
    for several in zip(*starts.values(), strict=True):
        key = tuple((n.target, _itemsize(n), str(n.args[1:]), _given(n)) for n in several)
        if key not in known:
            src, dst, size = _messages(dict(zip(starts, several, strict=True)), mesh)
            known[key] = {}
            for rank, node in zip(starts, several, strict=True):
                if rank not in known[key]:
                    group = mesh.group(rank, tuple(str(node.args[-1]).split(".")))
                    own = np.isin(src, group)
                    known[key].update(dict.fromkeys(group, load(topology, (src[own], dst[own], size[own]))))
        out.append(known[key])
    return out


def _sent(node: fx.Node, group: Sequence[int], rank: int) -> int:
    """Bytes that leave the rank for others."""
    if node.target is _C10D.all_to_all_single.default:
        splits: Any = node.args[2]
        return _itemsize(node) * (sum(splits) - splits[group.index(rank)])
    gathered = _given(node) * (len(group) - 1)
    return 2 * gathered // len(group) if node.target is _C10D.all_reduce.default else gathered


def _given(node: fx.Node) -> int:
    """Bytes that the rank puts in, where the arguments do not say it."""
    return 0 if node.target is _C10D.all_to_all_single.default else _packed(node.args[0])  # type: ignore[arg-type]


def _messages(several: Mapping[int, fx.Node], mesh: Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    src, dst, size = [], [], []
    for rank, node in several.items():
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
