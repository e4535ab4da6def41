"""Helpers of the tests that capture: compare values, count operators, check records and metadata."""

from __future__ import annotations

import collections

import torch

from fastpar.graph.capture import capture


def leaves(value):
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def close(a, b, tol=1e-12):
    a, b = leaves(a), leaves(b)
    assert len(a) == len(b) and a
    for x, y in zip(a, b, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.is_floating_point() or x.is_complex():
            assert x.numel() == 0 or (x - y).abs().max() <= tol * max(1.0, float(y.abs().max()))
        else:
            assert torch.equal(x, y)


def targets(captured):
    nodes = [n for r in captured.programs for n in r.program.graph.nodes if n.op == "call_function"]
    return collections.Counter(str(n.target) for n in nodes)


def checked(model, inputs, graphs=1, tol=1e-12):
    """Capture, and check results, records, metadata and flatness; gives what was captured."""
    with torch.no_grad():
        expected = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    found = capture(model, inputs)
    close(found.outputs, expected, tol)
    assert len(found.programs) == graphs
    for recorded in found.programs:
        program = recorded.program
        assert len(program.inputs) == len(program.placeholders) == len(recorded.args)
        assert isinstance(program.graph.output_node().args[0], tuple)
        close(program.gm(*recorded.args), recorded.outputs, 0.0)
        assert all("val" in n.meta for n in program.graph.nodes if n.op != "output")
        Strides(program.gm).run(*recorded.args)
    return found


class Strides(torch.fx.Interpreter):
    """Runs a graph and compares every value's shape, dtype and strides with the metadata."""

    def run_node(self, n):
        result, value = super().run_node(n), n.meta.get("val")
        if isinstance(value, torch.Tensor) and n.op != "output":
            assert (result.shape, result.dtype) == (value.shape, value.dtype), n.format_node()
            sizes = zip(value.shape, value.stride(), result.stride(), strict=True)
            assert not value.numel() or all(a == b for size, a, b in sizes if size > 1), n.format_node()
        return result


def tensor(*shape):
    return torch.randn(shape, dtype=torch.float64)
