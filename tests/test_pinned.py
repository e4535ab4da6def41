"""``pin``: the order of a program is the order of the code that Inductor makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fastpar.backends.pinned import anchors, pin
from fastpar.core.errors import OptionError
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text
from fastpar.run.build import build
from tests.test_replicas import torchrun
from tests.test_torus import attention

C10D = torch.ops._c10d_functional


def exchanging(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    before = x @ w
    first = C10D.all_reduce(before, "sum", "g")
    hides = (x @ w).relu()
    second = C10D.all_reduce(hides, "sum", "g")
    product = hides @ w
    added = C10D.wait_tensor(first) + C10D.wait_tensor(second)
    return (added @ w + product,)


def traced() -> torch.fx.GraphModule:
    return make_fx(exchanging, tracing_mode="fake")(torch.randn(4, 4), torch.randn(4, 4))


def short(node: torch.fx.Node) -> str:
    return str(node.target).split(".")[1]


def test_anchors_are_collectives_waits_and_products_under_them() -> None:
    graph = traced().graph
    assert [short(n) for n in anchors(graph)] == ["all_reduce", "mm", "all_reduce", "mm", "wait_tensor", "wait_tensor"]
    assert [short(n) for n in anchors(graph, compute=False)] == ["all_reduce"] * 2 + ["wait_tensor"] * 2


def test_every_anchor_depends_on_the_one_before() -> None:
    gm = traced()
    pin(gm.graph)
    gm.graph.lint()
    chained = [n for n in gm.graph.nodes if "control_deps" in str(n.target)]
    assert len(chained) == 5  # all but the first
    for before, after in zip(chained, chained[1:], strict=False):
        assert before in after.args[0]
    gm = traced()
    pin(gm.graph, compute=False)
    assert sum("control_deps" in str(n.target) for n in gm.graph.nodes) == 3


def test_a_plan_ends_in_it_and_it_needs_an_order() -> None:
    assert pipeline_text(Plan.parse("ulysses=2")).endswith("overlap,pin")
    program = attention(2, 24).programs[0].program
    built = build(program, "ulysses=2")
    assert built.localise(0).gm.meta["pinned"]
    assert "pinned" not in build(program, "ulysses=2", passes=str(built.pipeline).removesuffix(",pin")).lowered.gm.meta
    with pytest.raises(OptionError, match="pin"):
        build(program, "ulysses=2", passes="shard,attention-ulysses,lower,pin")


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "plans"), [(2, ["ulysses=2"])])
def test_generated_code_keeps_the_order(ranks: int, plans: list[str]) -> None:
    _keeps(ranks, plans)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "plans"), [(3, ["ring=3", "ulysses=3"]), (4, ["ulysses=2,ring=2", "torus=2,ring=2", "gather=4"])]
)
def test_generated_code_keeps_the_order_of_more_plans(ranks: int, plans: list[str]) -> None:
    _keeps(ranks, plans)


def _keeps(ranks: int, plans: list[str]) -> None:
    printed = torchrun(*plans, script="tests.scripts.order", ranks=ranks)
    rows = [json.loads(line) for line in printed.replace("}{", "}\n{").splitlines() if line.startswith("{")]
    assert len(rows) == ranks * len(plans)
    for plan in plans:
        own = [row for row in rows if row["plan"] == plan]
        for row in own:
            assert row["error"] < 1e-12
            assert row["pinned"]["code"] == row["pinned"]["program"]
            assert row["pinned"]["code"].count("sp") > 0  # products run while exchanges are under way
            collectives = [row[way]["program"].replace("p", "") for way in ("pinned", "free")]
            assert row["free"]["code"].replace("p", "") == collectives[1]  # the same on all ranks in any case
        assert len({row["pinned"]["code"] for row in own}) == 1
