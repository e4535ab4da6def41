"""``promote``: the same graph with every float computed in float64.

Many models cast to float32 inside, whatever their own dtype: rotary tables,
timestep embeddings, norms. Two programs that compute the same function would
then differ by float32's rounding, which hides small errors. With the casts
promoted on both sides, equality can be asked for to 1e-9.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from fastpar.core.inherit import inherited
from fastpar.graph.program import Program, source_line

aten = torch.ops.aten

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_LOW_COMPLEX = (torch.complex64, torch.complex32)
# Operands of kernels for narrow dtypes that are floats all the same: the dtype they take (None: the result's).
_NARROW: dict[Any, dict[str, torch.dtype | None]] = {
    aten._scaled_mm.default: {"scale_a": torch.float32, "scale_b": torch.float32, "bias": None},
}
_BITS = {aten.view.dtype}  # reads the bits of one dtype as another: promoting would change the meaning


def promote(program: Program, dtype: torch.dtype = torch.float64) -> Program:
    """A copy of ``program`` in which float32, float16 and bfloat16 are ``dtype``, and complex likewise.

    Dtype arguments (casts, creations, reductions), constants and ``meta["val"]``
    are promoted; where integers become floats by default, they are cast first.
    float8 stays: it is what a lossy plan asks for. The number of promoted casts
    is added to ``notes``. Call the result with :func:`promote_args`.
    """
    result = program.copy()
    work = _Promotion(result.gm, dtype)
    work.run()
    result.gm.recompile()
    result.notes.append(f"promoted to {str(dtype).split('.')[-1]}: {work.casts} casts, {work.others} other dtypes")
    result.notes.extend(work.notes)
    return result


def promote_args(args: Iterable[Any], dtype: torch.dtype = torch.float64) -> list[Any]:
    """Flat arguments with float and complex tensors (not float8) in ``dtype`` or its complex kind."""
    table = _table(dtype)

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in table:
            return value.detach().to(table[value.dtype])
        return value

    return [one(value) for value in args]


def _table(dtype: torch.dtype) -> dict[torch.dtype, torch.dtype]:
    table = dict.fromkeys(_LOW, dtype)
    if dtype.is_floating_point and dtype.itemsize >= 4:
        table.update(dict.fromkeys(_LOW_COMPLEX, dtype.to_complex()))
    return table


class _Promotion:
    def __init__(self, gm: fx.GraphModule, dtype: torch.dtype) -> None:
        self.gm, self.dtype, self.table = gm, dtype, _table(dtype)
        self.casts = self.others = 0
        self.notes: list[str] = []
        self.was: dict[fx.Node, torch.dtype] = {}  # of what was promoted
        modes = (v.fake_mode for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor))
        self.mode = next(modes, None) or FakeTensorMode()

    def run(self) -> None:
        for node in list(self.gm.graph.nodes):
            if node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function" and node.target in _NARROW:
                self._narrow(node)
                continue
            elif node.op == "call_function":
                self._call(node)
            if "val" in node.meta:
                value = node.meta["val"]
                node.meta["val"] = self._value(value)
                if isinstance(value, torch.Tensor) and value.dtype in self.table:
                    self.was[node] = value.dtype
            node.meta.pop("tensor_meta", None)

    def _value(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([self._value(v) for v in value])
        if not isinstance(value, torch.Tensor) or value.dtype not in self.table:
            return value
        # Shapes and strides do not depend on the dtype, so nothing needs to be propagated again.
        return self._fake(value, self.table[value.dtype])

    def _fake(self, value: torch.Tensor, dtype: torch.dtype) -> FakeTensor:
        """A fake tensor like ``value`` of another dtype, made without a dispatch through the mode."""
        mode = value.fake_mode if isinstance(value, FakeTensor) else self.mode
        with unset_fake_temporarily():
            meta = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")
        return FakeTensor(mode, meta, value.device)

    def _constant(self, node: fx.Node) -> None:
        path = str(node.target)
        parent, _, name = path.rpartition(".")
        owner = self.gm.get_submodule(parent)
        value = getattr(owner, name)
        if isinstance(value, torch.Tensor) and value.dtype in self.table:
            fresh = f"_promoted_{path.replace('.', '_')}"
            with unset_fake_temporarily():
                self.gm.register_buffer(fresh, value.detach().to(self.table[value.dtype]), persistent=False)
            node.target = fresh
        elif isinstance(value, fx.GraphModule):  # the body of an operator such as flex_attention
            copy = Program(value, ()).copy().gm
            inner = _Promotion(copy, self.dtype)
            inner.run()
            copy.recompile()
            fresh = f"_promoted_{path.replace('.', '_')}"
            setattr(self.gm, fresh, copy)
            node.target = fresh

    def _call(self, node: fx.Node) -> None:
        if node.target in _BITS:
            source = node.args[0]
            if source in self.was:
                with node.graph.inserting_before(node):
                    self._cast(source, self.was[source], node)
            self.notes.append(f"not promoted: {node.target} at {source_line(node)} reads the bits of its input")
            return
        before = (node.args, node.kwargs)
        node.args, node.kwargs = _map_dtypes(node.args, self.table), _map_dtypes(node.kwargs, self.table)
        if node.target is aten._to_copy.default:
            self.casts += (node.args, node.kwargs) != before
        else:
            self.others += (node.args, node.kwargs) != before
        if node.target in (aten._softmax.default, aten._log_softmax.default):
            node.args = (*node.args[:2], False)  # half_to_float: the input is no half any more
        if self._floats(node.meta.get("val")) and not any(self._float_input(n) for n in node.all_input_nodes):
            self._from_integers(node)

    def _narrow(self, node: fx.Node) -> None:
        """A kernel that knows no wide floats keeps its dtypes, between casts."""
        for name, dtype in _NARROW[node.target].items():
            position = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
            source = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            if isinstance(source, fx.Node) and source.meta["val"].dtype == self.dtype:
                with node.graph.inserting_before(node):
                    self._cast(source, dtype or node.meta["val"].dtype, node)
        if node.meta["val"].dtype in self.table:
            users = list(node.users)
            with node.graph.inserting_after(node):
                wide = self._cast(node, self.dtype, None)
            for user in users:
                user.replace_input_with(node, wide)
        self.notes.append(f"not promoted: {node.target} at {source_line(node)} has narrow kernels only")

    def _cast(self, source: fx.Node, dtype: torch.dtype, user: fx.Node | None) -> fx.Node:
        cast = source.graph.call_function(aten._to_copy.default, (source,), {"dtype": dtype})
        cast.meta["val"] = self._fake(source.meta["val"], dtype)
        cast.meta.update(inherited(source.meta))
        if user is not None:
            user.replace_input_with(source, cast)
        return cast

    def _floats(self, value: Any) -> bool:
        values = value if isinstance(value, (list, tuple)) else [value]
        return any(isinstance(v, torch.Tensor) and v.dtype in self.table for v in values)

    @staticmethod
    def _float_input(node: fx.Node) -> bool:
        value = node.meta.get("val")
        values = value if isinstance(value, (list, tuple)) else [value]
        return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)

    def _from_integers(self, node: fx.Node) -> None:
        """Make an operator promote that gives floats without float inputs."""
        if _gives_dtype(node):
            return
        schema = getattr(node.target, "_schema", None)
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if not tensors and schema is not None and any(a.name == "dtype" for a in schema.arguments):
            node.kwargs = {**node.kwargs, "dtype": self.table[node.meta["val"].dtype]}  # the default dtype
            self.others += 1
            return
        for source in tensors:
            with node.graph.inserting_before(node):
                self._cast(source, self.dtype, node)
        self.others += 1


def _gives_dtype(node: fx.Node) -> bool:
    """Whether an argument of ``node`` says which dtype its result has."""
    found: list[torch.dtype] = []
    _map_dtypes((node.args, dict(node.kwargs)), {}, found)
    return any(d.is_floating_point or d.is_complex for d in found)


def _map_dtypes(value: Any, table: dict[torch.dtype, torch.dtype], found: list[torch.dtype] | None = None) -> Any:
    if isinstance(value, torch.dtype):
        if found is not None:
            found.append(value)
        return table.get(value, value)
    if isinstance(value, dict):
        return {k: _map_dtypes(v, table, found) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items: Sequence[Any] = [_map_dtypes(v, table, found) for v in value]
        return type(value)(items) if type(value) in (list, tuple) else value
    return value
