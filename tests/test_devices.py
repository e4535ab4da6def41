"""Graphs that compute on the host beside an accelerator, on fake tensors: no device is needed to rewrite them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from fastpar.core.errors import CaptureError
from fastpar.graph.devices import accelerator, on_one_device

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def tables(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A rotary table made on the host from its own tensors and numbers, sent over, and also returned as it is."""
    rows = aten.unsqueeze.default(aten.arange.default(4, dtype=torch.float64, device=CPU), 1)
    table = aten.cos.default(aten.mul.Tensor(rows, aten.mul.Tensor(aten._to_copy.default(t, dtype=torch.float64), s)))
    there = aten._to_copy.default(table, dtype=torch.float32, device=GPU)
    y = aten.add.Tensor(aten.mul.Tensor(x, there), aten.mul.Tensor(aten.sum.default(x), s))
    total = aten.sum.default(t)
    count = aten._to_copy.default(aten.sum.default(x), device=CPU)
    return y, aten.mul.Tensor(table, 2), aten.add.Tensor(total, s), t, count


def traced(f: Any, *devices: torch.device) -> tuple[fx.GraphModule, FakeTensorMode, list[torch.Tensor]]:
    mode = FakeTensorMode()
    with mode:
        xs = [torch.empty(shape, device=d) for shape, d in zip(((4, 6), (6,), ()), devices, strict=True)]
        return make_fx(f)(*xs), mode, xs


def test_what_the_host_computes_is_computed_there() -> None:
    gm, mode, xs = traced(tables, GPU, CPU, CPU)
    with mode:
        before = [y.device for y in gm(*xs)]
    on_one_device(gm)
    inner = [n for n in gm.graph.nodes if n.op == "call_function"]
    copies = [n for n in inner if n.target is aten._to_copy.default and n.kwargs.get("device") == CPU]
    for node in inner:
        if node not in copies:
            assert all(v.device == GPU for v in tree_leaves(node.meta["val"])), node.format_node()
    with mode:
        after = gm(*xs)
    assert [y.device for y in after] == before == [GPU, CPU, CPU, CPU, CPU]
    assert [y.shape for y in after] == [(4, 6), (4, 6), (), (6,), ()]
    for node in gm.graph.nodes:  # what is noted is what there is
        if node.op == "call_function":
            with mode:
                got = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]), **node.kwargs)
            assert got.device == node.meta["val"].device and got.dtype == node.meta["val"].dtype
    assert len(copies) == 3, "the table and the total back to the host, and the number that was asked for there"


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_graph_on_one_device_is_left_alone(device: torch.device) -> None:
    gm, _, _ = traced(lambda x, t, s: aten.add.Tensor(aten.mul.Tensor(x, t), s), device, device, CPU)
    before = str(gm.graph)
    on_one_device(gm)
    assert str(gm.graph) == before


def test_two_accelerators_are_refused() -> None:
    mode = FakeTensorMode()
    with mode:
        values = [("x", torch.empty(2, device=GPU)), ("y", torch.empty(2, device="cuda:1")), ("n", 3)]
    with pytest.raises(CaptureError, match="several devices: 'x' on cuda:0, 'y' on cuda:1"):
        accelerator(values)
    assert accelerator(values[:1]) == GPU and accelerator([("t", torch.empty(2))]) is None
    with pytest.raises(CaptureError, match="'w' on meta, 't' on cpu"):  # a weight that was never loaded
        accelerator([("w", torch.empty(2, device="meta")), ("t", torch.empty(2))])
