"""Operators that are written out in others: traced once per shape and layout, and named after nothing captured."""

from __future__ import annotations

import pytest
import torch

import fastpar
from fastpar.run.build import build
from fastpar.sharding import expand
from fastpar.sharding.candidates import find

torch.set_num_threads(1)


class Norms(torch.nn.Module):
    """Group norms that differ in nothing but their names, in their epsilon, and in their place; a view before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(2, 4, eps) for eps in (1e-5, 1e-5, 0.5, 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.view(1, 4, 7, 5))
        for norm in self.norms:
            x = x + norm(x)
        return x


def norms() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Norms().double().eval(), torch.randn(4, 7, 5, dtype=torch.float64)


def test_equal_norms_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    trace = expand._trace
    monkeypatch.setattr(expand, "_trace", lambda call, written: traced.append(call.name) or trace(call, written))
    captured = fastpar.capture(*norms())
    program = captured.programs[0].program
    built = build(program, "gather=2")
    tried = len(find(program.graph))  # rows, columns: each has layouts of its own
    assert traced.count("aten::native_group_norm") == 2 * tried  # of four norms three are alike
    assert len([n for n in built.lowered.graph.nodes if n.target is torch.ops.aten.rsqrt.default]) == 4
    assert fastpar.verify(captured, plan="gather=2").ok


def test_what_is_written_out_is_not_named_after_what_was_captured() -> None:
    """Its operators have names as captured ones have: where outputs differ, they would be compared."""
    program = fastpar.capture(*norms()).programs[0].program
    built = build(program, "gather=2")
    captured = {n.name: n.meta["val"] for n in program.graph.nodes if "val" in n.meta}
    named = [n for n in built.lowered.graph.nodes if n.meta.get("origin") in captured]
    assert {"view", "convolution"} <= {n.meta["origin"] for n in named}
    for node in named:
        if isinstance(node.meta["val"], torch.Tensor):
            assert node.meta["val"].shape == captured[node.meta["origin"]].shape, node
