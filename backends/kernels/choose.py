"""Where a rank's program uses kernels: ``with_kernels`` puts them in place of the operators that they fuse.

| in the program | becomes |
|---|---|
| ``pack`` of what ``quantize`` gives | ``pack_quantized`` |
| ``unpack`` to what only ``dequantize`` takes | ``unpack_dequantized`` |
| other ``quantize``, ``dequantize`` | ``quantize``, ``dequantize`` |
| ``pack`` and ``unpack`` of messages in many pieces | ``pack``, ``unpack`` |
| ``merge`` | ``merge`` |
| ``checksums`` | ``checksums`` |

Other messages stay as they are: Inductor gets them as a few views (``fastpar.ops.folded``), which it fuses with what
computes their values. Of more than ``PIECES`` pieces, as where heads do not divide over the ranks, it would launch a
kernel for each.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from fastpar.backends.kernels import launch
from fastpar.backends.kernels.checksums import checksums_operator
from fastpar.backends.kernels.copies import movable, pack_operator, unpack_operator
from fastpar.backends.kernels.merge import merge as merge_kernel
from fastpar.backends.kernels.pack_quantized import pack_quantized_operator, quantizable
from fastpar.backends.kernels.pack_quantized import sizes_of as sent_sizes
from fastpar.backends.kernels.rows import dequantize_operator, quantize_operator
from fastpar.backends.kernels.table import RANK, make_table, ranks
from fastpar.backends.kernels.unpack_dequantized import sizes_of, unpack_dequantized_operator
from fastpar.graph.program import copy_module
from fastpar.ops.checksum import checksums
from fastpar.ops.collectives import dtypes_named, names_of, pack, unpack
from fastpar.ops.folded import pieces
from fastpar.ops.quantize import dequantize, quantize
from fastpar.ops.ring import merge

PIECES = 8
"""As many tensors Inductor concatenates in one kernel (its ``max_pointwise_cat_inputs``)."""


def available() -> bool:
    """Whether there is a Triton to run kernels with."""
    return launch.triton is not None


def with_kernels(gm: fx.GraphModule, device: torch.device) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """A copy of a localised program with kernels in it, and the tables that it takes behind its other inputs."""
    gm = copy_module(gm)
    graph, tables = gm.graph, list[torch.Tensor]()
    inputs = [n for n in graph.nodes if n.op == "placeholder"]

    def table(boxes: list[int], itemsizes: list[int]) -> fx.Node:
        last = inputs[-1] if inputs else None
        place = graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes)))
        with place:
            inputs.append(graph.placeholder(f"table_{len(tables)}"))
        with _disable_current_modes():  # a tensor that is there, also while others are fake
            tables.append(make_table(boxes, itemsizes, device))
        return inputs[-1]

    for rewrites in (_REWRITES, _ALONE):
        for node in list(graph.nodes):
            if rewrite := rewrites.get(node.target):
                rewrite(graph, node, table)
        for node in reversed(list(graph.nodes)):  # what kernels took the place of; never a collective
            if not node.users and node.target in (quantize, dequantize, pack, unpack, merge, checksums, getitem):
                graph.erase_node(node)
    gm.recompile()
    return gm, tables


_Table = Callable[[list[int], list[int]], fx.Node]


def _pack(graph: fx.Graph, node: fx.Node, table: _Table) -> None:
    xs: Any = node.args[0]
    rounded = [x.target is quantize and len(x.users) == 1 and _takes(x.args[0]) for x in xs]
    sources = [x.args[0] if is_rounded else x for x, is_rounded in zip(xs, rounded, strict=True)]
    values = [x.meta["val"] for x in sources]
    boxes: Any = node.args[1]
    if not all(isinstance(v, torch.Tensor) and v.dim() <= RANK for v in values):
        return
    if not any(rounded) and (pieces(boxes) <= PIECES or not all(movable(v.dtype) for v in values)):
        return
    made = table(boxes, sent_sizes(values, rounded))
    with graph.inserting_before(node):
        if any(rounded):
            new = graph.call_function(_overload(pack_quantized_operator), (sources, rounded, boxes, made))
        else:
            new = graph.call_function(_overload(pack_operator), (sources, boxes, made))
    _replace(node, new)


def _unpack(graph: fx.Graph, node: fx.Node, table: _Table) -> None:
    buffer, shapes, boxes, *given = node.args
    count = ranks(shapes)  # type: ignore[arg-type]
    sent = dtypes_named(given[0]) if given else []  # type: ignore[arg-type]
    rounded, dtypes = [False] * len(count), sent or [_dtype(node)] * len(count)
    parts: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
    for lane, part in parts.items():
        users = list(part.users)
        if [user.target for user in users] == [dequantize] and _takes(users[0]):
            rounded[lane], dtypes[lane] = True, users[0].args[1]
    many = pieces(boxes) > PIECES and all(map(movable, dtypes))  # type: ignore[arg-type]
    if max(count, default=0) > RANK or not (any(rounded) or many):
        return
    made = table(boxes, sizes_of(dtypes, rounded))  # type: ignore[arg-type]
    kernel: Any = unpack_operator
    args: tuple[Any, ...] = (buffer, shapes, boxes, given[0] if given else "", made)
    if any(rounded):
        kernel, args = unpack_dequantized_operator, (buffer, shapes, boxes, names_of(dtypes), rounded, made)
    with graph.inserting_before(node):
        new = graph.call_function(_overload(kernel), args)
        new.meta = dict(node.meta)
        for lane, part in parts.items():
            old = next(iter(part.users)) if rounded[lane] else part
            _replace(old, graph.call_function(getitem, (new, lane)))


def _dtype(node: fx.Node) -> torch.dtype:
    """Of what an ``unpack`` without dtypes gives."""
    value = node.meta["val"]
    dtype: torch.dtype = (value if isinstance(value, torch.Tensor) else value[0]).dtype
    return dtype


def _same(kernel: Any) -> Callable[[fx.Graph, fx.Node, _Table], None]:
    """The kernel in the operator's place, on the same arguments."""

    def rewrite(graph: fx.Graph, node: fx.Node, table: _Table) -> None:
        with graph.inserting_before(node):
            _replace(node, graph.call_function(_overload(kernel), node.args))

    return rewrite


_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node, _Table], None]] = {
    pack: _pack,
    unpack: _unpack,
    merge: _same(merge_kernel),
    checksums: _same(checksums_operator),
}


def _alone(kernel: Any) -> Callable[[fx.Graph, fx.Node, _Table], None]:
    """``_same``, of rows that kernels compute on."""

    def rewrite(graph: fx.Graph, node: fx.Node, table: _Table) -> None:
        if _takes(node if node.target is dequantize else node.args[0]):  # type: ignore[arg-type]
            _same(kernel)(graph, node, table)

    return rewrite


_ALONE = {quantize: _alone(quantize_operator), dequantize: _alone(dequantize_operator)}


def _takes(node: fx.Node) -> bool:
    """Whether kernels compute on rows like these. Of ``meta`` only what is the same on every rank counts."""
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and quantizable(value) and value.dim() <= RANK


def _overload(operator: Any) -> Any:
    return operator._opoverload


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
