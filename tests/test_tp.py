"""tp=N: weights cut by columns and rows, found by reading the rules backward from every product."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import fastpar
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.sharding.weights import find_weights, layouts_of
from tests.programs import Recipe, build
from tests.prove import Way, prove

torch.set_num_threads(1)
Tensor = torch.Tensor


class Linear(torch.nn.Linear):
    def __init__(self, a: int, b: int, bias: bool = True) -> None:
        super().__init__(a, b, bias)


class Transformer(torch.nn.Module):
    """Two blocks of width ``d``: fused QKV, cross-attention with grouped heads, gated MLP, modulation."""

    def __init__(self, d: int = 24, heads: int = 6, groups: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.d, self.heads, self.depth = d, heads, depth
        kv = d // heads * groups
        self.embed, self.head = Linear(5, d), Linear(d, 5)
        self.time = torch.nn.ModuleList([Linear(1, d), Linear(d, d)])
        for i in range(depth):
            for name, (a, b) in dict(
                qkv=(d, 3 * d), out=(d, d), q=(d, d), k=(7, kv), v=(7, kv), cross=(d, d), up=(d, 8 * d), down=(4 * d, d)
            ).items():
                self.add_module(f"{name}{i}", Linear(a, b, bias=name != "k"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.d // self.heads)).transpose(1, 2) for y in (q, k, v))
        same = k.shape[1] == self.heads
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=not same).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        x = self.embed(x)
        scale = self.time[1](F.silu(self.time[0](t[:, None])))[:, None]
        for i in range(self.depth):
            qkv, out, q, k, v, cross, up, down = (
                getattr(self, f"{n}{i}") for n in ("qkv", "out", "q", "k", "v", "cross", "up", "down")
            )
            y = F.layer_norm(x, (self.d,)) * (1 + scale)
            x = x + out(self.attend(*qkv(y).chunk(3, -1)))
            x = x + cross(self.attend(q(x), k(prompt), v(prompt)))
            a, b = up(F.layer_norm(x, (self.d,))).chunk(2, -1)
            x = x + down(F.gelu(a) * b)
        return self.head(F.layer_norm(x, (self.d,)))


def inputs(batch: int = 2, tokens: int = 11) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(batch, tokens, 5).double(), torch.rand(batch).double(), torch.randn(batch, 4, 7).double()


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Transformer().double().eval(), inputs())


PLANS = ("tp=2", "tp=3", "tp=4", "ulysses=2,tp=2", "ulysses=3,tp=2", "ring=2,tp=2", "gather=2,tp=2", "cfg=2,tp=2",
         "cfg=2,ulysses=2,tp=2", "ulysses=2,ring=2,tp=2")  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_exact_alone_and_with_every_other_axis(captured: fastpar.Captured, plan: str) -> None:
    report = fastpar.verify(captured, plan=plan)
    assert report.ok, report.diverged_at
    assert not report.fallbacks
    assert report.bytes_per_rank <= 1.3 * report.bytes_formula  # 11 tokens and 3 grouped heads are dealt unevenly


def test_two_sums_per_attention_and_mlp_and_their_closed_form(captured: fastpar.Captured) -> None:
    report = fastpar.explain(captured, plan="tp=3")
    kinds = Counter(c.kind for c in report.collectives for _ in range(c.count))
    assert kinds == {"all_reduce": 2 * 3 + 1}  # 3 pairs per block and the time embedding
    one = 2 * 2 / 3 * 2 * 24 * 8  # 2 (N-1)/N of batch x width float64, per row
    assert report.bytes_per_rank == report.bytes_formula == round(6 * 11 * one + one)
    assert report.attainable_share < 0.36 and report.flops_share < 1.01 * report.attainable_share
    assert "(t - 1)/t" in report.formula


def test_weights_are_cut_where_chunks_and_heads_end(captured: fastpar.Captured) -> None:
    program = captured.programs[0].program
    names = {n: i.name for n, i in zip(program.placeholders, program.inputs, strict=True) if i.kind == "parameter"}
    mesh = Mesh((("tp", 2),))
    cuts = {names[n]: str(x) for n, x in layouts_of(find_weights(program.graph, names), ("tp",), mesh).items()}
    assert cuts["qkv0.weight"] == "[24@tp(12*2)+24@tp(12*2)+24@tp(12*2), 24]"  # every rank's part of every chunk
    assert cuts["q0.weight"] == "[24@tp(16,8), 24]" and cuts["k0.weight"] == "[12@tp(8,4), 7]"  # whole groups
    assert cuts["up0.weight"] == "[96@tp(48*2)+96@tp(48*2), 24]"
    assert "embed.weight" not in cuts and "head.weight" not in cuts  # a residual stream stays whole


def test_tp_does_not_gather_weights_and_reads_no_foreign_columns(captured: fastpar.Captured) -> None:
    report = fastpar.explain(captured, plan="tp=2")
    assert {c.kind for c in report.collectives} == {"all_reduce"}
    assert any("MB of weights" in note for note in report.notes)


def test_a_model_without_anything_to_cut_runs_and_says_so() -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Linear(4, 3).double(), (torch.randn(2, 4).double(),), plan="tp=2")
    assert report.ok and not report.collectives
    assert any("no weight of this graph can be cut" in note for note in report.notes)


STEPS = [
    ("gated", {}), ("feed_forward", {"bias": True, "merged": True}), ("self_attention", {"fused": True}),
    ("self_attention", {"rope": "complex"}), ("odd_heads", {"kv": "one"}), ("joint_attention", {"cut": "stride"}),
    ("linear_attention", {"normalised": True}), ("normalise", {"kind": "group"}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("decomposed", {"how": "baddbmm"}), ("factorised", {}), ("spatial", {"how": "wide"}))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), STEPS)
def test_every_pass_is_exact_on_small_programs(name: str, options: dict[str, object]) -> None:
    case = build(Recipe(batch=2, tokens=6, text=3, heads=3, width=4, steps=((name, options),)))
    for plan in ("tp=2", "ulysses=2,tp=2"):
        prove(case, Way.of(plan, case.program))


@pytest.mark.parametrize("plan", ["ulysses=2,tp=2", "ulysses=3,tp=2", "ulysses=2,ring=2,tp=2"])
@pytest.mark.parametrize("pick", [1, 2])
def test_grouped_heads_are_cut_further_within_a_ranks_own(plan: str, pick: int) -> None:
    """Query heads whose keys are shared stay in the order that tp, and then Ulysses, shares them out in."""
    case = build(Recipe(tokens=7, heads=6, width=2, steps=(("odd_heads", {"kv": "grouped", "pick": pick}),)))
    prove(case, Way.of(plan, case.program))


class Residual(torch.nn.Module):
    """A U-Net's residual block: group norms, convolutions, the time added between."""

    def __init__(self, c: int = 12) -> None:
        super().__init__()
        self.enter, self.time = torch.nn.Conv2d(3, c, 3, padding=1), Linear(4, 2 * c)
        self.a, self.b = torch.nn.Conv2d(c, 2 * c, 3, padding=1), torch.nn.Conv2d(2 * c, c, 3, padding=1)
        self.before, self.between = torch.nn.GroupNorm(3, c), torch.nn.GroupNorm(6, 2 * c)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.enter(x)
        y = self.a(F.silu(self.before(x))) + self.time(F.silu(t))[:, :, None, None]
        return x + self.b(F.silu(self.between(y)))


@pytest.mark.parametrize("plan", ["tp=2", "tp=4", "tp=7", "gather=2,tp=2"])
def test_convolutions_are_cut_by_whole_groups_of_channels(plan: str) -> None:
    torch.manual_seed(0)
    given = (torch.randn(1, 3, 8, 5).double(), torch.randn(1, 4).double())
    report = fastpar.verify(Residual().double().eval(), given, plan=plan)
    assert report.ok, report.diverged_at
    assert not report.fallbacks
    sums = sum(c.count for c in report.collectives if c.kind == "all_reduce" and c.axis == "tp")
    assert plan == "tp=7" or sums == 1  # nothing but the second convolution; without a group, statistics are summed
    if plan == "tp=2":
        assert report.bytes_per_rank == report.bytes_formula == 12 * 8 * 5 * 8
        assert report.flops_share < 0.62


def test_a_layout_over_two_axes_says_heads_of_both() -> None:
    """Ulysses divides the heads that a rank of tp has."""
    layout = Layout.parse("[6@tp.ulysses(2,2,1,1), 8]")
    mesh = Mesh((("ulysses", 2), ("tp", 2)))
    assert [layout.local_shape(mesh, r)[0] for r in range(4)] == [2, 1, 2, 1]
