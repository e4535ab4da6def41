"""Closed forms of a plan's communication volume, to hold the counted bytes against.

The forms stand in ``cost``. Where N does not divide the rows, the busiest rank sends more than the mean that the forms
give. Halos of convolutions and sums over ranks are not part of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.program import Program
from fastpar.ops.ring import attention_lse
from fastpar.plan import cost
from fastpar.plan.expand import axis_of
from fastpar.sharding.insert import HEAVY


def dealt_bytes(program: Program, degree: int) -> int:
    """Bytes that leave a rank of the part that runs a dealt call: its results, to each of the others."""
    values = [o.meta["val"] for o in program.outputs if isinstance(o, fx.Node) and o.op != "placeholder"]
    return (degree - 1) * sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Volume:
    """Bytes that leave the busiest rank by the plan's closed form, and the form."""

    bytes: int
    text: str


def volume(sharded: Program, plan: Plan, mesh: Mesh) -> Volume:
    """The closed form for a lowered program's attentions with split keys, and its outputs.

    Of calls that are dealt along an axis a rank runs one in ``deal``, over the other axes, and sends its results.
    """
    total = 0.0
    dealt = sharded.gm.meta.get("dealt")
    deal = mesh.size((dealt,)) if dealt else 1
    n = mesh.ranks // deal // (plan.tp or 1)
    for node in sharded.graph.nodes:
        if n == 1:
            break
        if node.meta.get("split_keys") and node.target in (torch.ops.fastpar.attention.default, attention_lse):
            total += _attention(node, plan, mesh, deal, cost.terms(plan))
    for node in sharded.graph.nodes if plan.tp and plan.tp > 1 else ():
        if _contracts_cut(node):
            size = node.meta["val"].numel() * node.meta["val"].element_size()
            shared = mesh.size(mesh.ordered(node.meta["layout"].split_axes))  # ranks that have other rows of it
            total += cost.number(cost.ELEMENTS["sums of products"])(S=size / shared, t=plan.tp)
    for node in set(sharded.graph.output_node().all_input_nodes):
        if n > 1 and node.meta.get("why") == "output" or _from_output(node):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                total += value.numel() * value.element_size() * (n - 1) / n
    if dealt:
        total = total / deal + dealt_bytes(sharded, deal) / deal
    return Volume(math.ceil(total), _form(plan))


def _contracts_cut(node: fx.Node) -> bool:
    """A product whose weight is cut by rows (norms over cut columns sum less than a row each: not part of the form)."""
    layout, schema = node.meta.get("layout"), getattr(node.target, "_schema", None)
    return isinstance(layout, Layout) and "tp" in layout.partial_axes and schema is not None and schema.name in HEAVY


def between_machines(sharded: Program, plan: Plan, mesh: Mesh) -> int:
    """Bytes of attention that leave a rank for other machines of a torus, by the closed form.

    All ranks of a machine together: 4 (N-1)/N^2 B L H D elements for N machines whose heads divide (StreamFusion).
    """
    nodes = [n for n in sharded.graph.nodes if n.meta.get("split_keys") and n.target is attention_lse]
    return math.ceil(sum(_attention(n, plan, mesh, 1, cost.BETWEEN_MACHINES) for n in nodes))


def _form(plan: Plan) -> str:
    """The plan's closed form as text, in the symbols of ``cost``."""
    terms = cost.terms(plan)
    out = [f"sum over attentions of {cost.text(*terms, fp8=plan.fp8)}"] if terms else []
    if terms and {*plan.fp8} & {*"qkvo"}:
        out[0] += " (f = (D + 4)/(b*D), rows of D numbers of b bytes)"
    if plan.tp and plan.tp > 1:
        out.append(f"sum over pairs of products of {cost.text('sums of products')}")
    return ", plus ".join([*out, f"outputs {cost.text('outputs')}"])


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


def _attention(node: fx.Node, plan: Plan, mesh: Mesh, deal: int, names: Sequence[str]) -> float:
    q, k = (a.meta["val"] for a in node.args[:2])  # type: ignore[union-attr]
    size = q.element_size()
    cut = plan.tp or 1  # heads that other ranks have the weights of
    n = mesh.ranks // (plan.cfg or 1) // cut
    c = (plan.cfg or 1) // deal * cut  # each half of the batch is attended by its own ranks
    of_q, of_k = cost.shares(plan.fp8, int(q.shape[-1]), size)
    qs, ks = of_q * q.numel() / c, of_k * k.numel() / c
    # a rank works on 1/u of the heads; w ranks share those heads and the rows of one step of the ring
    layout: Layout = node.args[0].meta["layout"]  # type: ignore[union-attr]
    spent = layout.dims[-3].axes - {"tp"} if len(layout.dims) > 2 else frozenset()
    m = mesh.size(mesh.ordered({a for a in spent if axis_of(a) == "torus"}))  # machines that share out heads
    u = mesh.size(mesh.ordered(spent)) // m
    M = plan.torus or 1
    r = (plan.ring or 1) * M
    return sum(cost.elements(name, Q=qs, K=ks, n=n, u=u, w=n // (u * r), r=r, M=M, m=m) for name in names) * size
