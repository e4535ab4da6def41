"""Float arguments that a model turns into tensors: keep them inputs.

Dynamo passes a Python float as a 0-d float64 tensor with an ``item()``, and AOT
turns arithmetic on the item back into arithmetic on the tensor. It does not do
so for ``torch.tensor([t])``: there it fixes the value and guards on it, so that
every step of a sampler that passes a float timestep to a U-Net would compile
again. Here that creation becomes a cast of the tensor.

A row that a 0-d integer tensor picks, ``table[step]``, is read by Python through the tensor's value, which no graph
has. Here that becomes an index.

Dynamo itself fixes a float that is passed to ``torch.full`` or that decides a
branch, and one that its caller marked static; such models compile for each value.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext
from torch.utils._sympy.symbol import SymT, symbol_is_type

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg}
_TENSOR = {torch.tensor, torch._refs.tensor}
_NOT_IN_PLACE = {operator.and_, operator.or_, operator.not_, operator.is_}  # named so for Python's keywords


def floats_as_tensors(gm: fx.GraphModule) -> None:
    """Replace, in place on a Dynamo graph, tensors made from float inputs by casts of those inputs."""
    lifted: dict[fx.Node, fx.Node] = {}  # number -> 0-d float64 tensor with the same value
    for node in list(gm.graph.nodes):
        if node.op == "call_method" and node.target == "item":
            if isinstance(node.meta.get("example_value"), torch.SymFloat):
                lifted[node] = _lift(node)
        elif lifted and node.op == "call_function":
            if node.target in _ARITHMETIC:
                _arithmetic(node, lifted)
            elif node.target in _TENSOR:
                _tensor(node, lifted)
    for number, tensor in reversed(lifted.items()):
        for node in (tensor, *tensor.all_input_nodes, number):
            if not node.users and node.op != "placeholder":
                gm.graph.erase_node(node)


def numbers_as_indices(gm: fx.GraphModule) -> None:
    """Write ``x[t]`` with a 0-d integer tensor ``t``, in place on a Dynamo graph, as an index by a tensor.

    An index copies where Python gives a view; where ``x`` or what shares its memory is written to, all stays as it is.
    """
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not operator.getitem:
            continue
        source, picked = _tensor_value(node.args[0]), node.args[1]
        picked = picked if isinstance(picked, tuple) else (picked,)
        if source is None or not any(map(is_integer_scalar, picked)) or written_to(gm.graph.nodes, source):
            continue
        if all(is_integer_scalar(x) or (isinstance(x, slice) and x == slice(None)) for x in picked):
            indices = [x if isinstance(x, fx.Node) else None for x in picked]
            node.target, node.args = torch.ops.aten.index.Tensor, (node.args[0], indices)


def written_to(nodes: Iterable[fx.Node], value: torch.Tensor) -> bool:
    """Whether one of these operators of a Dynamo graph may change the memory of ``value``."""
    memory = value.untyped_storage()._cdata
    for node in nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        changes = name == "setitem" or (name[:1] == "i" and hasattr(operator, f"__{name[1:]}__"))  # iadd, not invert
        changes = changes or (name.endswith("_") and node.target not in _NOT_IN_PLACE)
        written = [node.kwargs.get("out"), *(node.args[:1] if changes else ())]
        if any(v is not None and v.untyped_storage()._cdata == memory for v in map(_tensor_value, written)):
            return True
    return False


def _tensor_value(x: Any) -> torch.Tensor | None:
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_integer_scalar(x: Any) -> bool:
    """Whether ``x`` is a node of a Dynamo graph for a 0-d tensor of integers."""
    value = _tensor_value(x)
    if value is None or value.dim() or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _lift(item: fx.Node) -> fx.Node:
    """A float64 tensor that AOT's own pass will turn into the tensor behind ``item``.

    Not that tensor itself: AOT fixes the value of every float that its pass did not see in use.
    """
    with item.graph.inserting_after(item):
        one = item.graph.call_function(torch.ones, ((),), {"dtype": torch.float64})
    with item.graph.inserting_after(one):
        new = item.graph.call_function(operator.mul, (one, item))
    one.meta, new.meta = _plain(item), _plain(item)
    return new


def _arithmetic(node: fx.Node, lifted: dict[fx.Node, fx.Node]) -> None:
    inputs = node.all_input_nodes
    if not isinstance(node.meta.get("example_value"), torch.SymFloat) or not all(n in lifted for n in inputs):
        return
    with node.graph.inserting_after(node):
        new = node.graph.call_function(node.target, fx.node.map_arg(node.args, lambda n: lifted[n]))
    new.meta = _plain(node)
    lifted[node] = new


def _plain(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key != "example_value"}


def _tensor(node: fx.Node, lifted: dict[fx.Node, fx.Node]) -> None:
    if not any(n in lifted for n in node.all_input_nodes):
        return
    if len(node.args) != 1 or set(node.kwargs) - {"dtype", "device"}:
        return
    value, before = node.meta["example_value"], node.prev
    options = {"dtype": value.dtype, "device": value.device}
    with node.graph.inserting_before(node):
        new = _nested(node.graph, node.args[0], lifted, options)
    while (before := before.next) is not node:
        before.meta = _plain(node)
    if new is not None:
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)


def _nested(graph: fx.Graph, data: Any, lifted: dict[fx.Node, fx.Node], options: dict[str, Any]) -> Any:
    if isinstance(data, fx.Node):
        return graph.call_method("to", (lifted[data],), options) if data in lifted else None
    if isinstance(data, (int, float)):
        return graph.call_function(torch.full, ((), data), options)
    if not isinstance(data, (list, tuple)):
        return None
    parts = [_nested(graph, item, lifted, options) for item in data]
    if any(part is None for part in parts):
        return None
    return graph.call_function(torch.stack, (parts,))


@contextlib.contextmanager
def scalar_tensors_stay(gm: fx.GraphModule) -> Iterator[None]:
    """While AOT runs on ``gm``: 0-d float64 CPU tensors that are no Python floats are left alone.

    torch gives each of them a symbol for its ``item()``, and AOT, finding that nothing uses it, takes
    it for a float that must be fixed: Dynamo then traces everything again, and on the way loses writes
    to such a tensor (``buffer.add_(1)`` has no effect with aot_eager and inductor in torch 2.13).
    """
    mode = TracingContext.get().fake_mode
    env = mode.shape_env if mode is not None else None
    if env is None:
        yield
        return
    used: set[Any] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat):
            used |= value.node.expr.free_symbols
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    names = {str(s) for s in known if symbol_is_type(s, SymT.FLOAT) and s not in used}
    names -= TensorifyState.force_specializations
    TensorifyState.force_specializations |= names  # "already fixed": no reason to start again
    try:
        yield
    finally:
        TensorifyState.force_specializations -= names
