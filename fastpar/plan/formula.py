"""Closed forms of a plan's communication, to hold what a program sends against: bytes, links and collectives.

The forms stand in ``cost``. They give the mean of all ranks: where N does not divide the rows, the busiest rank sends
more. Of halos, what a rank sends that has neighbours on both sides (the first and the last have one). Of rows that are
shared out by the ranks' speeds, what the fastest sends at most. Rows that are moved for other reasons, such as a view
that needs other parts, are not part of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from operator import getitem

import numpy as np
import torch
from torch import fx

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.core.transfer import elements_sent
from fastpar.graph.count import EXCHANGES
from fastpar.graph.program import Program
from fastpar.ops.collectives import all_reduce
from fastpar.ops.late import late
from fastpar.ops.ring import attention_lse
from fastpar.ops.terms import terms
from fastpar.plan import cost
from fastpar.plan.expand import axis_of


def dealt_bytes(program: Program, degree: int) -> int:
    """Bytes that leave a rank of the part that runs a dealt call: its results, to each of the others."""
    return (degree - 1) * sum(v.numel() * v.element_size() for v in _results(program))


def _results(program: Program) -> list[torch.Tensor]:
    values = [o.meta["val"] for o in program.results if isinstance(o, fx.Node) and o.op != "placeholder"]
    return [v for v in values if isinstance(v, torch.Tensor)]


@dataclass(frozen=True)
class Flow:
    """One kind of exchange, all of a program together: bytes that leave a rank, the mesh axes among whose ranks they
    move, and whether each rank sends to neighbours only (else to all others alike)."""

    bytes: float
    axes: tuple[str, ...]
    ring: bool = False


@dataclass
class Volume:
    """What a plan sends per call by its closed form.

    ``bytes`` leave a rank, in so many ``collectives``; ``text`` is the form and ``values`` what its
    symbols stand for, by kind of attention or product (``count`` of which there are, of ``itemsize`` bytes each).
    """

    text: str
    flows: list[Flow] = field(default_factory=list)
    collectives: int = 0
    values: list[dict[str, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return math.ceil(round(sum(flow.bytes for flow in self.flows), 3))

    def crossing(self, mesh: Mesh, span: int) -> int:
        """Bytes that leave the busiest block of ``span`` neighbouring ranks (a machine, say) for other blocks."""
        total = np.zeros(-(-mesh.ranks // span))
        for flow in self.flows:
            total += flow.bytes * _leaving(mesh, flow, span)
        return math.ceil(round(total.max(), 3))  # sums of floats: 248832.00000000003 is not one more


def volume(sharded: Program, plan: Plan, mesh: Mesh) -> Volume:
    """The closed form for a lowered program's attentions with split keys, its cut products and its outputs.

    Of calls that are dealt along an axis a rank runs one in ``deal``, over the other axes, and sends its results.
    Collectives are those of a call on a rank that runs it.
    """
    dealt = sharded.gm.meta.get("dealt")
    deal = mesh.size((dealt,)) if dealt else 1
    n = mesh.ranks // deal // (plan.tp or 1)
    out = Volume(_form(plan))
    most = float(mesh.ranks * max(mesh.shares(mesh.names)))  # rows of the busiest rank over the mean: 1, or by speeds
    kinds: Counter[tuple[tuple[str, int], ...]] = Counter()
    levels = set()  # products whose columns are shared out and gathered together
    exchanges: set[fx.Node] = set()  # of halos and sums
    names: list[str] = []
    for node in sharded.graph.nodes:
        if n > 1 and node.meta.get("split_keys") and node.target in _ATTENTION:
            values, itemsize = _symbols(node, plan, mesh, deal)
            kinds[(*values.items(), ("itemsize", itemsize))] += 1
            travelling = _travelling(node, plan, values, itemsize)
            out.flows += [
                Flow(most * cost.elements(name, **travelling) * itemsize / deal, *_route(name, node, mesh))
                for name in cost.terms(plan)
            ]
            out.collectives += sum(int(cost.number(cost.COLLECTIVES[s])(**values)) for s in cost.spaces(plan))
        elif plan.tp and plan.tp > 1 and _sums_cut(node):
            value = node.meta["val"]
            shared = mesh.size(mesh.ordered(node.meta["layout"].split_axes))  # ranks that have other rows of it
            size = value.numel() // shared
            kinds[(("S", size), ("t", plan.tp), ("itemsize", value.element_size()))] += 1
            sent = cost.elements("sums over ranks", S=size, t=plan.tp) * value.element_size()
            out.flows.append(Flow(sent / deal, ("tp",)))
            out.collectives += 1
        elif "columns" in node.meta:
            level, axes = node.meta["columns"]
            value, split = node.meta["val"], node.meta["layout"].split_axes
            size = value.numel() // mesh.size(mesh.ordered(split - set(axes)))  # other ranks have other rows of it
            kinds[(("E", size), ("N", mesh.size(axes)), ("itemsize", value.element_size()))] += 1
            sent = cost.elements("outputs", E=size, N=mesh.size(axes)) * value.element_size()
            out.flows.append(Flow(most * sent / deal, axes))
            levels.add((level, axes, bool(node.meta.get("hoisted"))))
        elif further := _further(node, mesh):
            name, symbols, axes = further
            size = node.meta["val"].element_size() if isinstance(node.meta["val"], torch.Tensor) else 0
            kinds[(*symbols.items(), ("itemsize", size))] += 1
            out.flows.append(Flow(cost.elements(name, **symbols) * size / deal, axes, ring=name == "halos"))
            names.append(name)
            exchanges.add(node.args[0])
    out.collectives += len(levels) + len(exchanges)
    out.text += "".join(f", plus {name} {cost.text(name)}" for name in dict.fromkeys(names))
    out.text += f", rows {most:.4g} times for the fastest rank's share" if mesh.speeds else ""
    rows = tuple(a for a in mesh.names if a not in (dealt, "tp"))
    for node in {n for n in sharded.results if isinstance(n, fx.Node)}:
        value = node.meta["val"]
        if n > 1 and _from_output(node) and isinstance(value, torch.Tensor):
            kinds[(("E", value.numel()), ("N", n), ("itemsize", value.element_size()))] += 1
            sent = cost.elements("outputs", E=value.numel(), N=n) * value.element_size()
            out.flows.append(Flow(most * sent / deal, rows))
            out.collectives += 1
    if dealt:
        out.flows.append(Flow(dealt_bytes(sharded, deal) / deal, (dealt,)))
        out.collectives += len(_results(sharded))
    if mesh.strides:
        out.flows = [replace(flow, bytes=flow.bytes * mesh.met(flow.axes)) for flow in out.flows]
        out.text += ", each between two ranks in one of as many steps as their strides both divide"
    out.values = [{"count": count, **dict(kind)} for kind, count in kinds.items()]
    return out


_ATTENTION = (torch.ops.fastpar.attention.default, attention_lse)


def _sums_cut(node: fx.Node) -> bool:
    """What is summed over cut columns: a product whose weight is cut by rows, or a norm's statistics."""
    here, *before = (n.meta.get("layout") for n in (node, *node.all_input_nodes))
    if not isinstance(here, Layout) or "tp" not in here.partial_axes:
        return False
    return not any(isinstance(x, Layout) and "tp" in x.partial_axes for x in before)


def _further(node: fx.Node, mesh: Mesh) -> tuple[str, dict[str, int], tuple[str, ...]] | None:
    """(entry of ``cost.ELEMENTS``, its symbols, axes) for what an exchange gives: a sum over rows, or windows."""
    if node.target is not getitem or node.args[0].target not in EXCHANGES:  # type: ignore[union-attr]
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    x: fx.Node = source.args[0][node.args[1]]  # type: ignore[index,assignment]
    layout: Layout = node.meta["layout"]
    size = node.meta["val"].numel()
    if source.target is all_reduce:
        axes = tuple(str(source.args[2]).split("."))
        local = size // mesh.size(mesh.ordered(layout.split_axes))
        return None if axes == ("tp",) else ("sums over ranks", dict(S=local, t=mesh.size(axes)), axes)
    if x.target is terms and source.target is late:
        axes = mesh.ordered(x.meta["layout"].dims[0].axes)
        return "terms of sums", dict(S=size // mesh.size(axes), t=mesh.size(axes)), axes
    if x.target is terms:
        axes = mesh.ordered(x.meta["layout"].dims[0].axes)
        return "sums of which ranks keep rows", dict(S=size // mesh.size(axes), t=mesh.size(axes)), axes
    if layout.windowed:
        axes = mesh.ordered(layout.split_axes)
        held = sum(math.prod(layout.local_shape(mesh, rank)) for rank in mesh.group(0, axes))
        if held > size:  # else they are a ring's blocks
            return "halos", dict(R=max(elements_sent(x.meta["layout"], layout, mesh))), axes
    return None


def between_machines(sharded: Program, plan: Plan, mesh: Mesh) -> int:
    """Bytes of attention that leave a rank for other machines of a torus, by the closed form.

    All ranks of a machine together: 4 (N-1)/N^2 B L H D elements for N machines whose heads divide (StreamFusion).
    """
    total = 0.0
    for node in sharded.graph.nodes:
        if node.meta.get("split_keys") and node.target is attention_lse:
            values, itemsize = _symbols(node, plan, mesh, 1)
            travelling = _travelling(node, plan, values, itemsize)
            total += sum(cost.elements(name, **travelling) * itemsize for name in cost.BETWEEN_MACHINES)
    return math.ceil(total)


def _form(plan: Plan) -> str:
    """The plan's closed form as text, in the symbols of ``cost``."""
    terms = cost.terms(plan)
    out = [f"sum over attentions of {cost.text(*terms, fp8=plan.fp8)}"] if terms else []
    if terms and {*plan.fp8} & {*"qkvo"}:
        out[0] += " (f = (D + 4)/(b*D), rows of D numbers of b bytes)"
    if plan.tp and plan.tp > 1:
        out.append(f"sum over products cut by rows, and norms over cut columns, of {cost.text('sums over ranks')}")
    return ", plus ".join([*out, f"outputs {cost.text('outputs')}"])


def _from_output(node: fx.Node) -> bool:
    """True where the value's rows were gathered for the output, or were a few local operators earlier."""
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


def _symbols(node: fx.Node, plan: Plan, mesh: Mesh, deal: int) -> tuple[dict[str, int], int]:
    """What the symbols of ``cost`` stand for at one attention, and bytes of an element."""
    q, k = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
    cut = plan.tp or 1  # heads that other ranks have the weights of
    n = mesh.ranks // (plan.cfg or 1) // cut
    c = (plan.cfg or 1) // deal * cut  # each half of the batch is attended by its own ranks
    # a rank works on 1/u of the heads; w ranks share those heads and the rows of one step of the ring
    m, u = (mesh.size(_spent(node, mesh, name)) for name in ("torus", "ulysses"))
    machines = plan.torus or 1
    r = (plan.ring or 1) * machines
    values = dict(Q=q.numel() // c, K=k.numel() // c, n=n, u=u, w=n // (u * r), r=r, M=machines, m=m)
    return values, q.element_size()


def _travelling(node: fx.Node, plan: Plan, values: dict[str, int], itemsize: int) -> dict[str, float]:
    """The symbols' values with Q and K as many as travel, for tensors that travel quantized."""
    of_q, of_k = cost.shares(plan.fp8, int(node.args[0].meta["val"].shape[-1]), itemsize)  # type: ignore[union-attr]
    return {**values, "Q": of_q * values["Q"], "K": of_k * values["K"]}


def _spent(node: fx.Node, mesh: Mesh, name: str) -> tuple[str, ...]:
    """Mesh axes, of the plan's axis ``name``, over which the heads of an attention are shared out."""
    layout: Layout = node.args[0].meta["layout"]  # type: ignore[union-attr]
    axes = layout.dims[-3].axes if len(layout.dims) > 2 else frozenset()
    return mesh.ordered({a for a in axes if axis_of(a) == name})


# -- which links ----------------------------------------------------------------------------------

_ROUTES = {
    "queries and outputs to heads and back": "ulysses",
    "keys and values to heads": "ulysses",
    "keys and values round the ring": "ring",
    "keys and values gathered": "gather",
    "queries and outputs in stages": "torus",
    "keys and values in stages": "torus",
    "keys and values round machines' rings": "ring",
}
"""The plan's axis along which elements move."""


def _route(name: str, node: fx.Node, mesh: Mesh) -> tuple[tuple[str, ...], bool]:
    """(mesh axes, whether only to the next rank) of one of an attention's elements."""
    plan_axis = _ROUTES[name]
    if name.startswith("queries"):  # only among ranks that take other heads
        return _spent(node, mesh, plan_axis), False
    return tuple(a for a in mesh.names if axis_of(a) == plan_axis), plan_axis == "ring"


def _leaving(mesh: Mesh, flow: Flow, span: int) -> np.ndarray:
    """Per block of ``span`` ranks: how many of its ranks' shares of a flow go to other blocks."""
    out = np.zeros(-(-mesh.ranks // span))
    for rank in range(mesh.ranks):
        group = mesh.group(rank, flow.axes)
        me = group.index(rank)
        peers: Collection[int] = [group[(me + 1) % len(group)]] if flow.ring else [p for p in group if p != rank]
        if peers:
            out[rank // span] += sum(p // span != rank // span for p in peers) / len(peers)
    return out
