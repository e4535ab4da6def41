"""Torus Attention: exact for any heads, rows and masks; what leaves a machine; what travels under what."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

import fastpar
from fastpar.core.errors import CheckError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.check import check
from fastpar.graph.count import bytes_across
from fastpar.graph.pipeline import PassContext, Pipeline
from fastpar.ops.join import join, join_order
from fastpar.ops.ring import attention_lse
from fastpar.plan.expand import pipeline_text
from fastpar.plan.formula import between_machines
from fastpar.registry import PASSES
from fastpar.run.build import build
from tests.programs import build as program
from tests.prove import Way, prove
from tests.test_cases import PLANS as CASES
from tests.test_replicas import torchrun
from tests.test_ring import Grouped, Joint, Masked, masks

torch.set_num_threads(1)

PLANS = ("torus=2", "torus=3", "torus=4", "torus=2,ring=2", "torus=2,ulysses=2", "torus=3,ring=2")


@cache
def attention(heads: int, tokens: int, width: int = 2, batch: int = 1) -> fastpar.Captured:
    """One attention with nothing around it that talks, so that all bytes are its own and its output's."""
    torch.manual_seed(0)
    x = torch.randn(batch, heads, tokens, width).double()
    return fastpar.capture(lambda x: F.scaled_dot_product_attention(x * 2, x.sin(), x.cos()).tanh(), (x,))


def verified(captured: fastpar.Captured, *plans: str) -> None:
    for plan in plans:
        report = fastpar.verify(captured, plan=plan)
        assert report.ok and report.max_rel_err < 1e-12, (plan, report.max_rel_err, report.diverged_at)


# -- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3, 4, 6])
def test_any_number_of_heads_and_machines(heads: int) -> None:
    """One head, fewer heads than machines, heads that they do not divide; 11 rows, also on 12 ranks."""
    more = ("torus=1", "torus=6", "torus=2,ring=3", "torus=4,ulysses=3") if heads == 4 else ()
    verified(attention(heads, 11, batch=2), *PLANS, *more)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_machines_without_rows(tokens: int) -> None:
    verified(attention(4, tokens), "torus=4", "torus=2,ring=2", "torus=2,ulysses=2")


@pytest.mark.parametrize("name", list(masks(1, 1, 6)))
def test_masks_follow_the_stages(name: str) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 11, 12, dtype=torch.float64), masks(2, 2, 11)[name]
    verified(fastpar.capture(Masked().double().eval(), (x, mask)), "torus=2", "torus=3", "torus=2,ring=2")


@pytest.mark.parametrize("text", [1, 5])
def test_text_is_counted_once(text: int) -> None:
    """A text of one token is too short to be split: every rank has it, and one row of each stage is its."""
    torch.manual_seed(0)
    inputs = (torch.randn(1, text, 12).double(), torch.randn(1, 11, 12).double())
    verified(fastpar.capture(Joint(4).double().eval(), inputs), *PLANS, "cfg=2,torus=2")


def test_grouped_heads_and_sums_over_tokens() -> None:
    torch.manual_seed(0)
    captured = fastpar.capture(Grouped().double().eval(), (torch.randn(2, 11, 12, dtype=torch.float64),))
    verified(captured, *PLANS, "torus=2,tp=2")


PROGRAMS = ("a mask of rows and keys on a ring", "rows that see no key on a ring", "grouped heads in a ring",
            "one key head for all", "heads merged with the batch")  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_pass_is_right_by_itself(name: str) -> None:
    case = program(CASES[name][0])
    for plan in ("torus=2,ring=2", "torus=2,ulysses=2"):
        prove(case, Way.of(plan, case.program))


class Cross(torch.nn.Module):
    """Attention of tokens to a text that every rank has whole."""

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q, k = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (x.sin(), text))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


def test_attention_to_whole_keys_does_not_talk() -> None:
    inputs = (torch.randn(1, 12, 8).double(), torch.randn(1, 5, 8).double())
    captured = fastpar.capture(Cross(), inputs)
    verified(captured, "torus=2", "torus=2,ring=2")
    assert {c.why for c in fastpar.explain(captured, plan="torus=2,ring=2").collectives} == {"output"}


# -- what travels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("machines", [1, 2, 3, 4])
@pytest.mark.parametrize("inside", ["", "ring=2", "ulysses=2", "ring=3"])
def test_bytes_between_machines(machines: int, inside: str) -> None:
    """4 (N-1)/N of B L H D / N elements leave a machine (StreamFusion); with the ring across, 2 (N-1) of it."""
    heads, tokens, width = 24, 72, 2
    plan = Plan.parse(",".join(t for t in (f"torus={machines}", inside) if t))
    built = build(attention(heads, tokens, width).programs[0].program, plan)
    ranks = built.mesh.ranks // machines
    axes = ("torus",) if machines > 1 else ()
    sent = bytes_across(built.lowered, axes, "attention")
    volume = tokens * heads * width * 8
    assert [sum(sent[i : i + ranks]) for i in range(0, len(sent), ranks)] == [
        4 * (machines - 1) * volume // machines**2
    ] * machines
    assert between_machines(built.lowered, plan, built.mesh) == sent[0]
    report = fastpar.explain(attention(heads, tokens, width), plan=str(plan))
    assert report.bytes_per_rank == report.bytes_formula


@pytest.mark.parametrize("machines", [2, 3, 4])
def test_usp_with_its_ring_between_machines_sends_half_n_times_as_much(machines: int) -> None:
    built = build(attention(24, 72).programs[0].program, f"ring={machines},ulysses=2")
    sent = bytes_across(built.lowered, ("ring",), "attention")
    assert sum(sent[:2]) == 2 * (machines - 1) * 72 * 24 * 2 * 8 // machines


@pytest.mark.parametrize(
    ("plan", "count"),
    [
        ("torus=2", 3), ("torus=3", 6), ("torus=4", 9),  # N-1 each for queries, keys with values, and outputs
        ("torus=2,ring=2", 3 + 2), ("torus=3,ring=4", 6 + 3 * 3),  # every machine's keys go round the ring once
        ("torus=2,ulysses=2", 3 + 4), ("torus=7", 6), ("torus=8,ring=2", 2 * 7 + 7 + 8),
    ],
)  # fmt: skip
def test_collectives_per_attention(plan: str, count: int) -> None:
    """24 heads on 7 machines are all on each: only keys and values are pulled."""
    written = pipeline_text(Plan.parse(plan), schedule=False)
    report = fastpar.explain(attention(24, 120), plan=plan, passes=written)
    assert sum(c.count for c in report.collectives if c.why == "attention") == count
    axes = {c.axis for c in report.collectives if c.why == "attention"}
    assert axes == set(plan.replace("=", ",").split(",")[::2])  # no exchange meets more ranks than it has to


def test_every_exchange_starts_before_what_it_hides_under() -> None:
    """As written. Three machines: q0, q1, q2 to own keys; all to the next; all to the last, pushed when complete."""
    written = pipeline_text(Plan.parse("torus=3"), schedule=False)
    built = build(attention(6, 12).programs[0].program, "torus=3", passes=written)
    steps = []
    for node in built.localise(1).graph.nodes:
        name = str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""
        steps += {"all_to_all_single": "s", "attention_lse": "a", "wait_tensor": "w", "cat": "c"}.get(name, "")
    assert "".join(steps[: steps.index("c") + 1]) == "sa" + "swa" + "swa" + "sw" + "aaa" + "w" + "asasa" + "wwc"


def test_a_ring_inside_sends_keys_round_once_for_all_queries() -> None:
    built = build(attention(6, 12).programs[0].program, "torus=3,ring=2")
    blocks = [n for n in built.lowered.graph.nodes if n.target is attention_lse]
    assert len(blocks) == 9 * 2
    assert sum(bool(n.meta["split_keys"]) for n in blocks) == 1


@pytest.mark.parametrize("plan", ["torus=2", "torus=3", "torus=2,ring=2", "torus=2,ulysses=2"])
def test_every_score_is_computed_once(plan: str) -> None:
    """Also those of a text that every rank has, as it is too short to be split."""
    joint = (torch.randn(1, 1, 12).double(), torch.randn(1, 11, 12).double())
    captured = fastpar.capture(Joint(4).double().eval(), joint)
    built = build(captured.programs[0].program, plan)
    blocks = [n for n in built.lowered.graph.nodes if n.target is attention_lse]
    scores = 0
    for node in blocks:
        q, k = (n.meta["layout"] for n in node.args[:2])
        shapes = [(q.local_shape(built.mesh, r), k.local_shape(built.mesh, r)) for r in range(built.mesh.ranks)]
        scores += sum(rows[1] * rows[2] * keys[2] for rows, keys in shapes)
    assert scores == 4 * 12 * 12


# -- what is refused ------------------------------------------------------------------------------


def test_blocks_that_no_ring_follows_are_refused() -> None:
    captured = attention(4, 8).programs[0].program
    mesh = Mesh((("torus", 2), ("ring", 2)))
    start = captured.copy()
    start.mesh = mesh
    pipeline = Pipeline.parse("shard,attention-torus{axes=torus},cancel,lower", PASSES)
    with pytest.raises(CheckError, match=r"block's keys split over \('ring',\)"):
        check(pipeline.run(start, PassContext(mesh=mesh)))


def test_pieces_that_do_not_make_up_the_whole_are_refused() -> None:
    mesh = Mesh((("torus", 2),))
    pieces = [Layout.parse(t) for t in ("[4@torus(2*2;0,2), 6@torus(3*2)]", "[4@torus(2*2;2,0), 6@torus(3*2)]")]
    whole = Layout.parse("[4, 6@torus(3*2)]")
    assert [join_order(pieces, whole, 0, mesh, r) for r in range(2)] == [[0, 1], [1, 0]]
    for wrong in (pieces[:1], [pieces[0], pieces[0]]):
        with pytest.raises(ValueError, match="do not make up"):
            join_order(wrong, whole, 0, mesh, 0)
    x = torch.randn(4, 6)
    assert torch.equal(join([x, x], [str(p) for p in pieces], str(whole), 0), x)


# -- real processes -------------------------------------------------------------------------------


@pytest.mark.distributed
def test_late_processes_get_the_same_bits() -> None:
    printed = torchrun("torus=2,ring=2", "torus=2,ulysses=2", script="tests.scripts.delays", ranks=4)
    assert printed.count("bits equal") == 4 * 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "plans"), [(2, ["torus=2"]), (3, ["torus=3", "ring=3"]), (4, ["torus=4", "ring=4", "ulysses=2,ring=2"])]
)
def test_late_processes_on_more_machines_and_rings(ranks: int, plans: list[str]) -> None:
    printed = torchrun(*plans, script="tests.scripts.delays", ranks=ranks)
    assert printed.count("bits equal") == ranks * len(plans)
