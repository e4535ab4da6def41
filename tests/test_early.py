"""Cuts move up to what is made only to be cut, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastpar
from fastpar.backends.simulate import run_global
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.check import check
from fastpar.graph.decompose import TABLE
from fastpar.graph.program import Input, Program, draws
from fastpar.ops.redistribute import redistribute
from fastpar.run.build import build
from fastpar.sharding import early
from fastpar.sharding.early import cut_early
from tests.test_torus import attention

MESH = Mesh((("a", 3),))
S = 8


def outer(x, y):
    """A table of places [S, S], made of two rows of numbers."""
    places = torch.arange(S)
    return ((x[:, None] * y >= places[:, None] - places) & (x[:, None] > 0)).to(torch.float64)


def program(function, *layouts: str) -> tuple[Program, list[torch.Tensor]]:
    """``function`` of two rows of S numbers over whole values, each result cut to its layout and put together again."""
    args = [torch.randn(S, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2)]
    with FakeTensorMode() as mode:
        gm = make_fx(function, decomposition_table=TABLE)(*map(mode.from_tensor, args))
    for node in gm.graph.nodes:
        if node.op != "output":
            node.meta["layout"] = Layout.whole(tuple(node.meta["val"].shape))
    output = gm.graph.output_node()
    results, outs = output.args[0] if isinstance(output.args[0], (list, tuple)) else [output.args[0]], []
    with gm.graph.inserting_before(output):
        for node, layout in zip(results, [*layouts, *[""] * (len(results) - len(layouts))], strict=True):
            for src, dst in ((str(node.meta["layout"]), layout), (layout, str(node.meta["layout"]))):
                if layout:
                    cut = gm.graph.call_function(redistribute, (node, src, dst))
                    cut.meta = {"val": node.meta["val"], "layout": Layout.parse(dst), "why": "seed"}
                    node = cut
            outs.append(node)
    output.args = (tuple(outs),)
    gm.recompile()
    made = Program(gm, (Input("x", "user"), Input("y", "user")), "sharded", mesh=MESH)
    check(made)
    return made, args


def largest(graph: fx.Graph) -> int:
    """Most numbers that a rank makes at once, moving aside."""
    made = [n for n in graph.nodes if n.op == "call_function" and n.target is not redistribute]
    return max(math.prod(n.meta["layout"].local_shape(MESH, r)) for n in made for r in range(3))


def same(made: Program, args: list[torch.Tensor]) -> None:
    expected = run_global(made.copy(), args)
    cut_early(made.graph, MESH)
    made.gm.recompile()
    check(made)
    for mine, true in zip(run_global(made, args), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, true, strict=True))


@pytest.mark.parametrize("layout, most", [("[8@a(3*2,2), 8]", 24), ("[8, 8@a(2,6,0)]", 48), ("[8@a(8,0*2), 8]", 64)])
def test_a_table_is_made_in_parts(layout, most):
    made, args = program(outer, layout)
    assert largest(made.graph) == S * S
    same(made, args)
    assert largest(made.graph) == most


def test_what_is_needed_whole_stays_whole():
    made, args = program(lambda x, y: [outer(x, y)] * 2, "[8@a(3*2,2), 8]", "")
    before = [n.name for n in made.graph.nodes]
    same(made, args)
    assert [n.name for n in made.graph.nodes] == before


def test_parts_that_are_more_than_the_whole_are_cut_from_it():
    layouts = "[8@a(6,1*2), 8]", "[8, 8@a(1,6,1)]"
    made, args = program(lambda x, y: [outer(x, y)] * 2, *layouts)
    same(made, args)
    assert largest(made.graph) == S * S
    made, args = program(lambda x, y: [outer(x, y)] * 2, "[8@a(3*2,2), 8]", "[8, 8@a(3*2,2)]")
    same(made, args)
    assert largest(made.graph) == 3 * S


def test_products_stay_where_they_are():
    made, args = program(lambda x, y: x[:, None] @ y[None], "[8@a(3*2,2), 8]")
    same(made, args)
    assert largest(made.graph) == S * S


def test_a_number_that_no_rule_can_cut_ends_the_way_up():
    made, args = program(lambda x, y: torch.cumsum(outer(x, y), 0) * 2, "[8@a(3*2,2), 8]")
    same(made, args)
    held = {str(n.target): n.meta["layout"].is_whole for n in made.graph.nodes if n.op == "call_function"}
    assert held["aten.cumsum.default"] and not held["aten.mul.Tensor"]


# -- halos of what all ranks have ---------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["gather=3", "ulysses=2", "cfg=2,gather=2"])
def test_the_first_convolution_exchanges_nothing(plan: str) -> None:
    """Its operand is the sample, with what a model does to it first and zeros around it."""
    torch.manual_seed(0)
    first, second = (torch.nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False) for _ in range(2))
    x = torch.randn(2, 4, 12, 6).double()
    report = fastpar.verify(lambda x: second(first((2 * x - 1).clamp(-1, 1))), (x,), plan=plan)
    assert report.ok and [c.count for c in report.collectives if c.why == "plan"] == [1]


def test_what_is_large_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "AT_ONCE", 0)
    torch.manual_seed(0)
    wide = torch.nn.Conv2d(2, 32, 3, padding=1).double().requires_grad_(False)
    narrow = torch.nn.Conv2d(32, 2, 3, padding=1).double().requires_grad_(False)
    x, many = torch.randn(1, 2, 12, 6).double(), torch.randn(1, 32, 12, 6).double()
    for model, given, halos in ((wide, x, 0), (narrow, many, 1)):
        report = fastpar.verify(model, (given,), plan="gather=2")
        assert report.ok and sum(c.count for c in report.collectives if c.why == "plan") == halos


def modulated(x: torch.Tensor, text: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Rows of two inputs behind one another, scaled by what a time step gives, spread over all of them; as ERNIE-Image
    does it, where the rows are the first operand once, and the modulation is."""
    rows = torch.cat([x @ w[:, :8], text @ w[:, 8:]], 1)
    scale, gate = (t @ w).unsqueeze(1).expand(-1, rows.shape[1], -1).contiguous().chunk(2, -1)
    q = ((1 + scale) * rows).unflatten(-1, (2, 4)).transpose(1, 2)
    return rows + gate * F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("plan", ["ulysses=4", "ring=3", "cfg=2,ring=3", "cfg=2,ulysses=2"])
def test_what_is_spread_over_rows_is_spread_over_those_it_meets(plan: str) -> None:
    """The rows are shared out by inputs, and the modulation, alone, would be as one: it is made anew, also where its
    batch is split and only a rank's own half of it is there to make it from."""
    torch.manual_seed(0)
    given = [torch.randn(*shape).double() for shape in ((2, 13, 8), (2, 7, 8), (2, 8), (8, 16))]
    report = fastpar.verify(modulated, tuple(given), plan=plan)
    assert report.ok and {c.why for c in report.collectives} == {"attention", "output"}


def test_what_a_plan_sends_is_sent() -> None:
    """Though every rank could make the queries, keys and values here, which in a model are products."""
    for plan in ("ulysses=4", "ring=3", "gather=4"):
        report = fastpar.explain(attention(24, 96), plan=plan)
        assert "attention" in {c.why for c in report.collectives} and report.bytes_per_rank == report.bytes_formula


def biased(x: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A bias for each pair of tokens, of what a product gives for each sample of a batch."""
    a, b = (t @ w).chunk(2, -1)
    x = x * t[:, None, None]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(a[:, :, None].sin() + b[:, None])[:, None])


def test_of_a_part_of_the_batch_a_rank_makes_its_rows() -> None:
    given = [torch.randn(*shape).double() for shape in ((2, 1, 12, 8), (2, 8), (8, 24))]
    program = fastpar.capture(biased, tuple(given)).programs[0].program
    graph = build(program, "cfg=2,gather=3").lowered.graph
    mesh = Mesh((("cfg", 2), ("gather", 3)))
    made = {n.meta["layout"].local_shape(mesh, 0) for n in graph.nodes if n.target is torch.ops.aten.add.Tensor}
    assert made == {(1, 4, 12)}
    assert fastpar.verify(biased, tuple(given), plan="cfg=2,gather=3").ok


def test_what_takes_longer_to_make_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "AT_ONCE", 0)
    torch.manual_seed(0)

    def long(x: torch.Tensor, text: torch.Tensor, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([x, text], 1)
        gate = (t @ w).unsqueeze(1).expand(-1, rows.shape[1], -1).contiguous()
        for _ in range(40):
            gate = gate.sin()
        rows = gate * rows
        return F.scaled_dot_product_attention(rows, rows, rows)

    given = [torch.randn(*shape).double() for shape in ((2, 13, 8), (2, 7, 8), (2, 8), (8, 8))]
    report = fastpar.verify(long, tuple(given), plan="ulysses=4")
    assert report.ok and "plan" in {c.why for c in report.collectives}


@pytest.mark.parametrize("draw", [lambda x: F.dropout(x, 0.5, True), lambda x: torch.bernoulli(x.sigmoid())])
def test_random_numbers_are_drawn_whole_and_once(draw: Any) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        x = draw(conv(x))
        return conv(x) + x

    program = fastpar.capture(dropped, (torch.randn(1, 2, 12, 6).double(),)).programs[0].program
    [drawn] = [n for n in build(program, "gather=2").lowered.graph.nodes if draws(n)]
    assert drawn.meta["layout"].is_whole


def test_a_long_way_from_the_sample() -> None:
    """As many operators as a recursion would not survive."""
    conv = torch.nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)

    def far(x: torch.Tensor) -> torch.Tensor:
        for _ in range(1200):
            x = x * 0.5 + 0.25
        return conv(x)

    report = fastpar.explain(far, (torch.randn(1, 2, 12, 6).double(),), plan="gather=2")
    assert [c.why for c in report.collectives] == ["output"]
