"""The structural verifier: after every pass, a program must obey its stage.

It re-infers every shape and layout from the operators (rules are asked again, layouts in
arguments parsed again) and compares with what the nodes carry, so a pass that forgot to
update either is caught where it happened. CheckError means a bug in a pass, never bad input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fastpar.core.errors import CheckError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.program import Program, source_line, target_name
from fastpar.ops.alone import alone
from fastpar.ops.collectives import COLLECTIVES, all_reduce, local
from fastpar.ops.join import join, join_order
from fastpar.ops.late import late, outgoing
from fastpar.ops.redistribute import redistribute
from fastpar.ops.ring import redistribute_all
from fastpar.rules import Call, rule_for
from fastpar.sharding.blockwise import split_over
from fastpar.sharding.candidates import is_attention

_ABSTRACT = {redistribute, redistribute_all}
_CONCRETE = {local, *COLLECTIVES}


def check(program: Program) -> None:
    """Raise CheckError unless ``program`` is a valid program of its stage."""
    _structure(program)
    if program.stage in ("sharded", "lowered", "scheduled"):
        kinds = {n: i.kind for n, i in zip(program.placeholders, program.inputs, strict=True)}
        for node in program.graph.nodes:
            if node.op == "call_function":
                _node(node, program.stage, program.mesh)
            elif node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
                held = kinds[node] == "carried" or (kinds[node] == "parameter" and program.stage != "sharded")
                if not node.meta["layout"].is_whole and not held:
                    _fail(node, f"an input is whole on every rank, not {node.meta['layout']}")
        for n in program.results:
            if isinstance(n, fx.Node) and isinstance(n.meta.get("layout"), Layout) and not n.meta["layout"].is_whole:
                _fail(n, f"an output is whole on every rank, not {n.meta['layout']}")


def _structure(program: Program) -> None:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    placeholders = 0
    for node in program.graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in seen:
                _fail(node, f"uses {operand.name} before it is defined")
        if node.name in names:
            _fail(node, "two nodes have one name")
        seen.add(node)
        names.add(node.name)
        placeholders += node.op == "placeholder"
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and "val" not in node.meta and (schema is None or schema.returns):
            _fail(node, "has no value in meta")
    if placeholders != len(program.inputs):
        raise CheckError(f"{placeholders} placeholders but {len(program.inputs)} inputs")
    if not isinstance(program.graph.output_node().args[0], (tuple, list)):
        raise CheckError("the output is no tuple")


def _node(node: fx.Node, stage: str, mesh: Mesh) -> None:
    value, layout = node.meta.get("val"), node.meta.get("layout")
    if isinstance(value, torch.Tensor):
        if not isinstance(layout, Layout):
            _fail(node, "has no layout")
        if layout.shape != tuple(value.shape):
            _fail(node, f"has shape {tuple(value.shape)} and a layout of shape {layout.shape}")
        try:
            layout.check(mesh)
        except ValueError as error:
            _fail(node, str(error))
    if node.target is alone:
        _change(node, str(node.args[1]), str(node.args[2]), node.args[0], layout)
    elif node.target is join:
        _joined(node, mesh)
    elif node.target in _ABSTRACT:
        if stage != "sharded":
            _fail(node, f"is abstract, in a program that is {stage}")
        if node.target is redistribute_all:
            for x, src, dst, out in zip(*node.args, layout, strict=True):  # type: ignore[arg-type]
                _change(node, src, dst, x, out)
        else:
            _change(node, str(node.args[1]), str(node.args[2]), node.args[0], layout)
    elif node.target in _CONCRETE:
        if stage == "sharded":
            _fail(node, "is concrete, in a program that is sharded")
        if node.target is all_reduce:
            axes = tuple(str(node.args[2]).split("."))
            for x in node.args[0]:  # type: ignore[union-attr]
                before: Layout = x.meta["layout"]  # type: ignore[union-attr]
                if not any(p.op == node.args[1] and p.axes == axes for p in before.partial):
                    _fail(node, f"reduces over {axes}, of a value that is {before}")
        elif node.target in COLLECTIVES:
            for x, src, dst, out in zip(*node.args, layout, strict=True):  # type: ignore[arg-type]
                _change(node, src, dst, x, out)
        else:
            _change(node, str(node.args[1]), str(node.args[2]), node.args[0], layout)
    elif node.target in (outgoing, late):
        xs, srcs, dsts = node.args[:3]
        outs = layout if node.target is late else map(Layout.parse, dsts)  # type: ignore[arg-type]
        for x, src, dst, out in zip(xs, srcs, dsts, outs, strict=True):  # type: ignore[arg-type]
            _change(node, src, dst, x, out)
    elif getattr(node.target, "__name__", "") == "getitem":
        source: Any = node.args[0]
        if isinstance(value, torch.Tensor) and layout != source.meta["layout"][node.args[1]]:
            _fail(node, f"is noted as {layout}, other than in what it is taken from")
    elif any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, (tuple, list)) else [value])):
        if stage != "sharded" and is_attention(node):
            keys: Layout = node.args[1].meta["layout"]  # type: ignore[union-attr]
            if not keys.dims[-2].is_whole:
                _fail(node, f"has split keys in a program that is {stage}: no pass gave it a schedule")
        if stage != "sharded" and split_over(node):
            _fail(node, f"has a block's keys split over {split_over(node)} in a program that is {stage}: no schedule")
        _infer(node, mesh)


def _joined(node: fx.Node, mesh: Mesh) -> None:
    xs, srcs, dst, dim = node.args
    for x, src in zip(xs, srcs, strict=True):  # type: ignore[arg-type]
        _change(node, src, str(dst), x, node.meta["layout"])
    pieces = [Layout.parse(src) for src in srcs]  # type: ignore[union-attr]
    try:
        for rank in range(mesh.ranks):
            join_order(pieces, Layout.parse(str(dst)), int(str(dim)), mesh, rank)
    except ValueError as error:
        _fail(node, str(error))


def _change(node: fx.Node, src: str, dst: str, x: Any, layout: Any) -> None:
    if Layout.parse(src) != x.meta["layout"]:
        _fail(node, f"takes {src}, but {x.name} is {x.meta['layout']}")
    if Layout.parse(dst) != layout:
        _fail(node, f"gives {dst}, but is noted as {layout}")


def _infer(node: fx.Node, mesh: Mesh) -> None:
    call = Call.of(node)
    ins = tuple(n.meta["layout"] for n in call.operands)
    noted = node.meta["layout"]
    outs = (noted,) if isinstance(noted, Layout) else tuple(x for x in noted if x is not None)
    if all(x.is_whole for x in (*ins, *outs)):
        return
    decision = rule_for(call).decide(call, ins, mesh)
    for have, want, operand in zip(ins, decision.inputs, call.operands, strict=True):
        if have != want:
            _fail(node, f"wants {operand.name} as {want}, and gets {have}")
    if decision.outputs != outs:
        _fail(node, f"is noted as {_texts(outs)}, inferred {_texts(decision.outputs)}")


def _texts(layouts: tuple[Layout, ...]) -> str:
    return " and ".join(map(str, layouts))


def order(program: Program) -> dict[tuple[str, ...], list[str]]:
    """Collectives of a localised program per group, in order: equal on all ranks of it."""
    out: dict[tuple[str, ...], list[str]] = {}
    for node in program.graph.nodes:
        name = target_name(node.target) if node.op == "call_function" else ""
        if name.startswith("_c10d_functional.") and "wait" not in name:
            out.setdefault((str(node.args[-1]),), []).append(name)
    return out


def check_order(programs: list[Program]) -> None:
    """Raise CheckError unless the ranks' programs start the same collectives in the same order, wait for each of
    them, and what each sends is what the other expects."""
    for rank, program in enumerate(programs):
        for node in program.graph.nodes:
            name = target_name(node.target) if node.op == "call_function" else ""
            if name.startswith("_c10d_functional.") and "wait" not in name and not node.users:
                raise CheckError(f"rank {rank} starts {node.name} and never waits for it")
    first = order(programs[0])
    for rank, program in enumerate(programs[1:], start=1):
        if order(program) != first:
            raise CheckError(f"rank {rank} starts other collectives, or in another order, than rank 0")
    mesh: Mesh = programs[0].mesh
    splits = [
        [n for n in p.graph.nodes if n.target is torch.ops._c10d_functional.all_to_all_single.default] for p in programs
    ]
    for k, node in enumerate(splits[0] if splits else []):
        axes = tuple(str(node.args[-1]).split("."))
        if not set(axes) <= set(mesh.names):
            return  # mapped to process groups already
        for rank in range(mesh.ranks):
            group = mesh.group(rank, axes)
            me = group.index(rank)
            for position, peer in enumerate(group):
                sent, expected = splits[peer][k].args[2][me], splits[rank][k].args[1][position]
                if sent != expected:
                    raise CheckError(f"{node.name}: rank {peer} sends {sent} elements, rank {rank} expects {expected}")


def _fail(node: fx.Node, what: str) -> None:
    where = source_line(node)
    raise CheckError(f"{node.name} ({target_name(node.target)}) {what}" + (f" [{where}]" if where else ""))


def numel(layout: Layout, mesh: Mesh, rank: int) -> int:
    """Elements that ``rank`` holds."""
    return math.prod(layout.local_shape(mesh, rank))
