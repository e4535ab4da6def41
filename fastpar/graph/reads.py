"""Where a Dynamo graph reads values of tensors, and what must run to know them (see :mod:`fastpar.graph.sizes`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from fastpar.graph.program import Input, source_line
from fastpar.graph.scalars import is_integer_scalar, written_to
from fastpar.graph.unbroken import Broken

_UNKNOWN = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
_READS = {"item", "nonzero", "argwhere", "where", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
_TAKE_SIZES = {"arange", "broadcast_to", "empty", "expand", "full", "linspace", "narrow", "new_empty", "new_full"}
_TAKE_SIZES |= {"new_ones", "new_zeros", "ones", "pad", "repeat", "reshape", "split", "tile", "unflatten", "view"}
_TAKE_SIZES |= {"zeros"}
_POINTWISE: dict[Any, Callable[..., Any]] = {
    **{getattr(operator, name): getattr(operator, name) for name in ("add", "mul", "neg", "sub", "truediv")},
    **{getattr(operator, f"i{name}"): getattr(operator, name) for name in ("add", "mul", "sub", "truediv")},
}
_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal")


def symbols(value: Any, known: bool = False) -> set[Any]:
    """The symbols of tensors' shapes and of numbers in ``value`` that stand for what tensors' values decide; with
    ``known``, also those whose value Dynamo knows."""
    found: set[Any] = set()
    for leaf in pytree.tree_leaves(value):
        numbers = leaf.shape if isinstance(leaf, torch.Tensor) else (leaf,)
        for number in numbers:
            if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                found |= {s for s in number.node.expr.free_symbols if known or symbol_is_type(s, _UNKNOWN)}
    return found


def _reads_values(gm: fx.GraphModule) -> bool:
    """Whether a Dynamo graph has symbols for what values of tensors decide."""
    tracing_on = torch._dynamo.config.capture_scalar_outputs or torch._dynamo.config.capture_dynamic_output_shape_ops
    return tracing_on and any(n.meta.get("unbacked_bindings") or _reads_integer(n) for n in gm.graph.nodes)


def _reads_integer(node: fx.Node) -> bool:
    """``item`` of an integer tensor. Where that is an argument of the call Dynamo knows its value, and would guard on
    it; floats are other ones in every step, and AOT takes them for what they are (``fastpar.graph.scalars``)."""
    return node.target == "item" and isinstance(node.meta.get("example_value"), torch.SymInt)


def reads_of(gm: fx.GraphModule, inputs: Sequence[Input]) -> list[fx.Node]:
    """The reads of a Dynamo graph, in order, after rows that a mask picks are written as rows of given numbers.

    Changes ``gm`` in place, to an equivalent graph. Raises ``Broken`` where they cannot run before the program. Where
    Dynamo splits graphs at reads, there are none.
    """
    if not _reads_values(gm):
        return []
    for node in list(gm.graph.nodes):
        _choose_rows(node)
    for node in list(gm.graph.nodes):
        _number_the_rows(node)
        _write_items(node)
    reads = [n for n in gm.graph.nodes if _is_read(n)]
    before = leading_to(reads)
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for read in reads:
        if isinstance(read.meta.get("example_value"), torch.SymFloat) and any(n in given for n in leading_to([read])):
            raise Broken(f"a float, at {source_line(read)}")
    for node in before:
        if node.op == "get_attr" or (node in given and given[node].kind == "parameter"):
            raise Broken(f"it depends on weights, at {source_line(reads[0])}")
        if node.op != "placeholder" and any(word in name_of(node) for word in _RANDOM):
            raise Broken(f"it depends on random numbers, at {source_line(node)}")
        for value in pytree.tree_leaves(node.meta.get("example_value")):
            if isinstance(value, torch.Tensor) and written_to(gm.graph.nodes, value):
                raise Broken(f"its memory is written to, at {source_line(node)}")
    return reads


def name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def is_symbolic(node: fx.Node) -> bool:
    """Whether a node of a Dynamo graph gives a number for which Dynamo has a symbol."""
    return isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_read(node: fx.Node) -> bool:
    """Whether a node reads values: others with new symbols have them from sizes that Dynamo could not work out."""
    if _reads_integer(node):
        return True
    if not node.meta.get("unbacked_bindings"):
        return False
    return name_of(node) in _READS or not any(symbols(n.meta.get("example_value")) for n in node.all_input_nodes)


def _choose_rows(node: fx.Node) -> None:
    """Write ``x[mask] = f(x[mask])``, for an ``f`` that looks at one number at a time, as a choice: nothing is read."""
    if node.target is not operator.setitem or not _is_mask(node.args[1]):
        return
    x, mask, at = node.args
    steps: list[fx.Node] = []
    while isinstance(at, fx.Node) and at.target in _POINTWISE and len(at.all_input_nodes) == 1 and not at.kwargs:
        steps.append(at)
        at = at.all_input_nodes[0]
    chain = {node, *steps}
    if not isinstance(at, fx.Node) or at.target is not operator.getitem or at.args != (x, mask):
        return
    checks = [u for step in (at, *steps) for u in step.users if u not in chain]
    for check in checks:  # and what Dynamo asserts of the number of rows
        if not (check.target is torch.ops.aten.sym_size.int or is_symbolic(check) or "assert" in name_of(check)):
            return
        checks += [u for u in check.users if u not in checks]
    between = [n for n in node.graph.nodes if at < n < node]
    if any(written_to(between, n.meta["example_value"]) for n in (x, mask)):
        return
    wide = x.meta["example_value"].dim() - mask.meta["example_value"].dim()
    with node.graph.inserting_before(node):

        def call(function: Any, *args: Any) -> fx.Node:
            kind = "call_method" if isinstance(function, str) else "call_function"
            new = node.graph.create_node(kind, function, args)
            new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
            return new

        value = x
        for step in reversed(steps):
            value = call(_POINTWISE[step.target], *fx.node.map_arg(step.args, lambda _, value=value: value))
        rows = call(operator.getitem, mask, (..., *[None] * wide))
        call("copy_", x, call(torch.where, rows, value, x))
    for old in sorted({node, *checks, *steps, at}, reverse=True):
        node.graph.erase_node(old)


def _number_the_rows(node: fx.Node) -> None:
    """Write ``x[mask]`` and ``x[mask] = y`` with the numbers of the rows: only the mask is then read, never ``x``."""
    if node.op != "call_function" or node.target not in (operator.getitem, operator.setitem):
        return
    picked = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
    if not any(map(_is_mask, picked)):
        return
    if node.target is operator.setitem and not symbols([n.meta.get("example_value") for n in node.all_input_nodes]):
        return  # a mask of the shape of what is written
    indices: list[Any] = []
    graph = node.graph
    for index in picked:
        if not _is_mask(index):
            indices.append(index)
            continue
        mask = index.meta["example_value"]
        with graph.inserting_before(node):
            rows = graph.call_function(torch.nonzero, (index,), {"as_tuple": True})
            rows.meta = {**node.meta, "example_value": _played(mask, lambda m: torch.nonzero(m, as_tuple=True))}
            rows.meta["unbacked_bindings"] = dict.fromkeys(symbols(rows.meta["example_value"]), ())
            for i, value in enumerate(rows.meta["example_value"]):
                indices.append(graph.call_function(operator.getitem, (rows, i)))
                indices[-1].meta = {**rows.meta, "example_value": value, "unbacked_bindings": None}
    node.args = (node.args[0], indices[0] if len(indices) == 1 else tuple(indices), *node.args[2:])
    node.meta.pop("unbacked_bindings", None)


def _write_items(node: fx.Node) -> None:
    """Where torch takes tensors for sizes (``x.view(height, width)``, ``x[:length]``), say that they are read."""

    def item(arg: fx.Node) -> fx.Node:
        if not is_integer_scalar(arg):
            return arg
        with node.graph.inserting_before(node):
            new = node.graph.call_method("item", (arg,))
        value = _played(arg.meta["example_value"], torch.Tensor.item)
        new.meta = {**node.meta, "example_value": value, "unbacked_bindings": None}
        return new

    def bounds(index: Any) -> Any:
        return fx.node.map_arg(index, item) if isinstance(index, slice) else index

    if node.target in (operator.getitem, operator.setitem):
        index = node.args[1]
        node.update_arg(1, tuple(map(bounds, index)) if isinstance(index, tuple) else bounds(index))
    elif name_of(node) in _TAKE_SIZES:
        first = node.args[:1] if node.op == "call_method" else ()
        node.args = (*first, *fx.node.map_arg(node.args[len(first) :], item))
        node.kwargs = fx.node.map_arg(node.kwargs, item)


def _played(value: torch.Tensor, function: Callable[[torch.Tensor], Any]) -> Any:
    """What a function gives for a fake tensor; nobody need account for the symbols in it."""
    mode: FakeTensorMode = value.fake_mode  # type: ignore[attr-defined]
    assert mode.shape_env is not None
    with mode, mode.shape_env.ignore_fresh_unbacked_symbols():
        return function(value)


def _is_mask(index: Any) -> bool:
    value = index.meta.get("example_value") if isinstance(index, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() > 0


def leading_to(reads: Iterable[fx.Node]) -> list[fx.Node]:
    """The reads and all that they need, in the order of the graph."""
    todo = list(reads)
    found: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return sorted(found)
