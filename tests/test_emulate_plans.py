"""fastpar's own programs on emulated links: as the first and the last rank, and what their exchanges cost."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

import fastpar
from fastpar.plan import clock
from fastpar.plan.topology import load
from fastpar.run.build import build


def attend(tokens: int = 16) -> tuple[Any, dict[str, Any]]:
    """Attention of eight heads between two products, after which weights can be cut as well."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (y.unflatten(-1, (8, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    return Block().eval().requires_grad_(False), {"x": torch.randn(2, tokens, 64)}


def flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, num_attention_heads=8, attention_head_dim=16,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    inputs = dict(
        hidden_states=torch.randn(1, 35, 8), encoder_hidden_states=torch.randn(1, 9, 24),
        pooled_projections=torch.randn(1, 16), timestep=torch.ones(1), img_ids=torch.randn(35, 3),
        txt_ids=torch.zeros(9, 3), return_dict=False,
    )  # fmt: skip
    return model.eval().requires_grad_(False), inputs


def compiled(model: Any, plan: str, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="fastpar", options={"plan": plan, **options})


PLANS = ("ulysses=8", "ring=8", "ulysses=4,ring=2", "torus=2,ulysses=4", "tp=4", "cfg=2,gather=2", "ulysses=2,fp8(qvo)")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tokens", [16, 13])
def test_plans_run_as_the_first_and_the_last_rank(plan: str, tokens: int) -> None:
    model, inputs = attend(tokens)
    whole, ranks = model(**inputs), fastpar.Plan.parse(plan).degree
    for rank in (0, ranks - 1):
        check(model, inputs, plan, rank, ranks, whole)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ulysses=4,ring=2", *(p for p in PLANS if p.count("=") == 1)])
def test_flux_runs(plan: str) -> None:
    """35 + 9 tokens, which no plan's ranks divide."""
    model, inputs = flux()
    ranks = fastpar.Plan.parse(plan).degree
    check(model, inputs, plan, ranks - 1, ranks, model(**inputs)[0])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ulysses=8", "gather=8", "tp=4"])
def test_inductor_s_code_runs_on_emulated_links(plan: str) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    model, inputs = attend()
    ranks = fastpar.Plan.parse(plan).degree
    check(model, inputs, plan, 0, ranks, model(**inputs), lowering="inductor")


def check(model: Any, inputs: Any, plan: str, rank: int, ranks: int, whole: torch.Tensor, **options: Any) -> None:
    """Right shape, finite numbers, exchanges on every call."""
    with fastpar.emulate.start("h100-8", rank=rank, ranks=ranks) as emulation:
        split = compiled(model, plan, **options)
        counts = []
        for _ in range(2):
            emulation.reset()
            out = split(**inputs)
            out = out[0] if isinstance(out, tuple) else out
            assert out.shape == whole.shape and out.dtype == whole.dtype and torch.isfinite(out).all()
            counts.append(sum(t.count for t in emulation.tallies.values()))
        assert counts[0] >= counts[1] > 0  # what is hoisted is sent once


@pytest.mark.parametrize("plan", ["ulysses=8", "ring=8", "gather=8", "tp=4"])
def test_seconds_are_the_clock_s(plan: str) -> None:
    """What the exchanges of a program cost here is what they cost when the clock plays it, one by one."""
    model, inputs = attend()
    ranks, topology = int(plan[-1]), load("l40-8")
    loads = {}
    for program in fastpar.capture(model, inputs).programs:
        built = build(program.program, plan, ranks, topology="l40-8")
        script = clock.call([built.localise(r) for r in range(ranks)], topology)[0]
        loads |= {s.number: s.load.latency + s.load.moving for s in script if isinstance(s, clock.Start)}
    with fastpar.emulate.start(topology, ranks=ranks) as emulation:
        compiled(model, plan, topology="l40-8")(**inputs)
        assert sum(t.count for t in emulation.tallies.values()) == len(loads) > 0
        assert sum(t.seconds for t in emulation.tallies.values()) == pytest.approx(sum(loads.values()), rel=1e-6)
