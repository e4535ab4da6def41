"""``speeds``: rows, heads and columns shared out by how fast ranks are; unequal devices in a topology."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastpar
from fastpar.core.errors import OptionError
from fastpar.core.layout import even_parts, shared_parts
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.plan import clock
from fastpar.plan.durations import Durations
from fastpar.plan.expand import mesh_for
from fastpar.plan.planner import choose
from fastpar.plan.predict import predict
from fastpar.plan.topology import Topology, load, parse
from fastpar.plan.workload import workload
from fastpar.run.build import build

SPEED = st.floats(0.01, 100)


class Block(nn.Module):
    """``heads`` heads over text and picture, and an MLP."""

    def __init__(self, heads: int = 8, width: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = torch.cat([text, x], 1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(both).chunk(3, -1))
        both = both + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (both + self.down(F.gelu(self.up(both))))[:, text.shape[1] :]


def captured(tokens: int = 112, text: int = 16, batch: int = 1, dtype: Any = torch.float64) -> fastpar.Captured:
    torch.manual_seed(0)
    x, words = torch.randn(batch, tokens, 32, dtype=dtype), torch.randn(batch, text, 32, dtype=dtype)
    return fastpar.capture(Block().to(dtype).eval(), (x, words))


# -- parts ------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.lists(SPEED, min_size=1, max_size=9), st.sampled_from((1, 2, 8)), st.integers(0, 50))
def test_parts_are_in_proportion(units: int, speeds: list[float], unit: int, before: int) -> None:
    """To less than a unit, all rows and no more."""
    shares = Mesh((("sp", len(speeds)),), tuple(speeds)).shares(("sp",))
    parts = shared_parts(units * unit, shares, unit, before * unit)
    assert sum(parts) == units * unit and not any(part % unit for part in parts)
    assert all(abs(part - units * unit * share) < unit for part, share in zip(parts, shares, strict=True))


@given(st.integers(0, 3000), st.integers(1, 9), st.sampled_from((0.1, 1.0, 0.3, 7.0)), st.integers(0, 99))
def test_equal_speeds_are_an_even_split(size: int, n: int, speed: float, before: int) -> None:
    mesh = Mesh((("sp", n),), (speed,) * n)
    assert shared_parts(size, mesh.shares(("sp",)), 1, before) == even_parts(size, n, 1, before)


@given(st.integers(2, 300), st.integers(2, 6), st.integers(1, 4))
def test_what_does_not_divide_goes_where_it_is_done_soonest(size: int, n: int, times: int) -> None:
    """No rank could take its last row's work off another and be done before it."""
    shares = Mesh((("sp", n),), tuple(1.0 + (i % times) for i in range(n))).shares(("sp",))
    parts = shared_parts(size, shares)
    done = [part / share for part, share in zip(parts, shares, strict=True)]
    more = [(part + 1) / share for part, share in zip(parts, shares, strict=True)]
    floor = [int(size * share) for share in shares]
    assert max((d for d, p, f in zip(done, parts, floor, strict=True) if p > f), default=Fraction(0)) <= min(
        (m for m, p, f in zip(more, parts, floor, strict=True) if p == f), default=Fraction(10**9)
    )


def test_a_mesh_with_speeds_is_text() -> None:
    mesh = Mesh((("ring", 2), ("ulysses", 2)), (1.0, 0.6, 0.1 + 0.2, 3.0))
    assert Mesh.parse(str(mesh)) == mesh and str(mesh).startswith("ring:2,ulysses:2;1.0:0.6")
    assert sum(mesh.shares(("ring",))) == 1 and mesh.shares(("ulysses", "ring"))[1] == mesh.shares(mesh.names)[2]
    for bad in ((1.0,), (1.0, 2.0, 3.0, 0.0)):
        with pytest.raises(ValueError, match="a mesh of 4 ranks takes as many speeds above 0"):
            Mesh(mesh.axes, bad)


@pytest.mark.parametrize(
    ("plan", "order", "speeds"),
    [
        ("gather=2,speeds(1:0.6)", (), (1, 0.6)),
        ("cfg=2,ring=2,speeds(1:0.6)", (), (1, 0.6, 1, 0.6)),
        ("cfg=2,ring=2,speeds(1:0.6)", ("ring", "cfg"), (1, 1, 0.6, 0.6)),
        ("tp=2,ulysses=2,speeds(1:0.6)", (), (1, 1, 0.6, 0.6)),
        ("ulysses=2,ring=2,speeds(4:3:2:1)", ("ulysses", "ring"), (4, 3, 2, 1)),
    ],
)
def test_speeds_are_those_of_ranks(plan: str, order: tuple[str, ...], speeds: tuple[float, ...]) -> None:
    """In their order, however axes are placed; ranks that have the same tokens share an entry."""
    graph = captured(batch=2).programs[0].program.graph
    assert mesh_for(Plan.parse(plan), graph, order).speeds == speeds


# -- programs ---------------------------------------------------------------------------------------

PLANS = (
    "gather=2,speeds(1:0.6)", "ulysses=2,speeds(1:0.6)", "ring=2,speeds(1:0.6)", "torus=2,speeds(1:0.6)",
    "gather=3,speeds(1:1:0.5)", "ulysses=2,ring=2,speeds(1:0.6:0.6:1)", "torus=2,ring=2,speeds(1:0.5:1:0.5)",
    "torus=2,ulysses=2,speeds(1:0.6:0.3:1)", "ulysses=5,speeds(1:0.8:0.8:0.8:0.6)", "gather=4,speeds(1:1:0.02:0.01)",
)  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_exact_and_balanced(plan: str) -> None:
    """No rank has more of the work than its speed is of all speeds, but for what heads and tokens do not divide."""
    report = fastpar.verify(captured(), plan=plan)
    speeds = Plan.parse(plan).speeds
    assert report.ok and not report.fallbacks and report.plan == str(Plan.parse(plan))
    assert report.attainable_share == pytest.approx(max(speeds) / sum(speeds), rel=1e-6)
    assert report.flops_share <= 1.1 * report.attainable_share
    if "gather" in plan:
        assert report.bytes_per_rank <= 1.05 * report.bytes_formula
    else:
        assert report.bytes_per_rank <= 1.1 * report.bytes_formula


@pytest.mark.parametrize("plan", ["cfg=2,ulysses=2,speeds(1:0.5)", "tp=2,gather=2,speeds(0.5:1)"])
def test_beside_guidance_and_cut_weights(plan: str) -> None:
    report = fastpar.verify(captured(batch=2), plan=plan)
    assert report.ok and report.flops_share <= 1.05 * report.attainable_share


def test_lossy_plans_take_speeds() -> None:
    assert fastpar.verify(captured(dtype=torch.float32), plan="ulysses=2,fp8(qvo),speeds(1:0.6)").ok
    assert fastpar.simulate(Block().eval(), (torch.randn(1, 20, 32), torch.randn(1, 5, 32)), "naive=2,speeds(3:1)")


def test_one_sided_messages_of_unequal_ranks() -> None:
    report = fastpar.verify(captured(), plan="ring=2,ulysses=2,speeds(1:0.6:0.25:1)", transport="one-sided")
    assert report.ok and any("one-sided" in note for note in report.notes)


def test_rows_of_a_picture_keep_the_multiples_that_sampling_needs() -> None:
    """Down twice and up again: rows in multiples of four, 5/8 of them on the first rank."""
    torch.manual_seed(0)
    down = [nn.Conv2d(2, 8, 3, 1, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, 2, 1)]
    up = [nn.Upsample(scale_factor=4), nn.Conv2d(8, 2, 3, 1, 1)]
    model = nn.Sequential(*down, *up).double().eval()
    report = fastpar.verify(model, (torch.randn(1, 2, 32, 24).double(),), plan="gather=2,speeds(1:0.6)")
    assert report.ok and not report.fallbacks
    assert report.flops_share <= 1.02 * report.attainable_share


def test_the_layouts_say_who_has_how_many() -> None:
    built = build(captured().programs[0].program, "gather=2,speeds(1:0.6)")
    texts = {str(n.meta["layout"]) for n in built.lowered.graph.nodes if "layout" in n.meta}
    assert any(re.search(r"16@gather\(10,6\)\+112@gather\(70,42\)", text) for text in texts)


# -- unequal devices --------------------------------------------------------------------------------

UNEQUAL = """
speeds = [1, 0.6]
[device]
name = "card"
flops = 1e12
bandwidth = 1e12
memory = 1e9
[[level]]
name = "wire"
size = 2
bandwidth = 1e12
latency = 1e-9
"""


def unequal() -> Topology:
    return parse(UNEQUAL, "two")


@pytest.mark.parametrize("given", ["[1]", "[1, 0]", "[1, true]", '["a", "b"]', "1", "[1, 2, 3]", "[1, inf]"])
def test_speeds_of_a_topology_are_one_per_device(given: str) -> None:
    assert unequal().speeds == (1.0, 0.6) and load("h100-8").speeds == ()
    with pytest.raises(OptionError, match="speeds are 2 numbers above 0, one per device"):
        parse(UNEQUAL.replace("[1, 0.6]", given), "two")


def big() -> fastpar.Captured:
    return captured(tokens=8192, text=512, dtype=torch.float32)


def test_a_balanced_plan_takes_what_the_speeds_allow() -> None:
    """As the clock plays it, and as it is predicted: 1/(1 + 0.6) of one device, where even halves take 0.5/0.6."""
    program = big().programs[0].program
    work, box, even = workload(program), unequal(), Plan.parse("gather=2")
    took, told = {}, {}
    for speeds in ((), (1.0, 0.6)):
        built = build(program, replace(even, speeds=speeds), topology=box)
        took[speeds] = clock.run([built.localise(rank) for rank in range(2)], box).seconds
        told[speeds] = predict(work, replace(even, speeds=speeds), box).compute
    best = (0.5 / 0.6) * 1.6
    assert took[()] / took[(1.0, 0.6)] == pytest.approx(best, rel=0.05)
    assert told[()] / told[(1.0, 0.6)] == pytest.approx(best, rel=0.05)
    equal = replace(box, speeds=())
    assert predict(work, even, equal).compute < told[(1.0, 0.6)] < told[()]


def test_passes_see_how_long_the_slow_device_takes() -> None:
    program = big().programs[0].program
    built = build(program, "gather=2", topology=unequal())
    [product, *_] = [n for n in built.lowered.graph.nodes if "addmm" in str(n.target)]
    boxes = unequal(), replace(unequal(), speeds=())
    slow, fast = (Durations(box, built.mesh).task(product).compute for box in boxes)
    assert slow == pytest.approx(fast / 0.6)


def test_auto_shares_out_by_the_devices_speeds() -> None:
    work = workload(big().programs[0].program)
    found = choose(work, 2, unequal())
    assert found.plan.speeds == (1.0, 0.6)
    assert {v.plan.partition("speeds")[2] for v in found.verdicts if v.prediction} == {"(1:0.6)", ""}  # "": one device
    assert choose(work, 2, replace(unequal(), speeds=(2.0, 2.0))).plan.speeds == ()


def test_of_ranks_with_the_same_rows_the_slowest_counts() -> None:
    box = load("h100-8")
    work = workload(captured(batch=2).programs[0].program)
    plans = {v.plan for v in choose(work, 4, replace(box, speeds=(1, 0.5, 0.7, 0.9, 1, 1, 1, 1))).verdicts}
    assert "ulysses=4,speeds(1:0.5:0.7:0.9)" in plans and "ulysses=2,cfg=2,speeds(0.7:0.5)" in plans
