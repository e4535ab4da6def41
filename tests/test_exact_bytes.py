"""What programs send, by link and in numbers of collectives, is what the closed forms say."""

from __future__ import annotations

import pytest
import torch

import fastpar
from benchmarks.exact_bytes import MODELS, row, rows, wrong
from fastpar.graph.count import bytes_crossing, collectives
from fastpar.plan.expand import pipeline_text
from fastpar.plan.formula import volume
from fastpar.run.build import build
from tests.test_cfg import Block, inputs
from tests.test_torus import attention

torch.set_num_threads(1)

PLANS = [
    "ulysses=8", "ring=8", "gather=8", "ulysses=4,ring=2", "ulysses=2,ring=4", "torus=4,ulysses=2", "torus=4,ring=2",
    "torus=2,ring=4", "torus=2,ulysses=4", "ulysses=6,ring=2", "ring=6", "gather=6", "torus=3,ring=4",
]  # fmt: skip


def _written(plan: str) -> str:
    """The pipeline up to where messages of one place would be joined."""
    return pipeline_text(fastpar.Plan.parse(plan), schedule=False)


def _uniform(plan: str, span: int) -> bool:
    """Of a torus the form holds where blocks are (parts of) its machines; else stages leave a block by turns."""
    found = fastpar.Plan.parse(plan)
    return not found.torus or found.degree // found.torus % span == 0


@pytest.mark.parametrize(("plan", "span"), [(p, s) for p in PLANS for s in (1, 2, 3, 4) if _uniform(p, s)])
def test_bytes_that_leave_a_block_of_ranks(plan: str, span: int) -> None:
    """Blocks need not be where an axis ends: of an exchange among all, the pairs that are apart decide."""
    built = build(attention(24, 96, 2).programs[0].program, plan, passes=_written(plan))
    form = volume(built.lowered, built.plan, built.mesh)
    assert max(bytes_crossing(built.lowered, span)) == form.crossing(built.mesh, span) > 0
    assert sum(c.count for c in collectives(built.lowered)) == form.collectives


@pytest.mark.parametrize(
    ("plan", "number"),
    [("ulysses=2", 2 + 1), ("ulysses=4", 4 + 1), ("ulysses=3", 2 + 1), ("ring=5", 4 + 1), ("gather=3", 2 + 1)],
)
def test_numbers_of_collectives(plan: str, number: int) -> None:
    """One attention with two heads: four exchanges to heads and back, two where ranks share rows only (also of two
    ranks, among which gathering keys sends no more), R-1 in a ring."""
    report = fastpar.explain(attention(2, 24), plan=plan, passes=_written(plan))
    assert not any("do not divide" in note for note in report.notes if plan == "ulysses=2")
    assert sum(c.count for c in report.collectives) == report.collectives_formula == number


@pytest.mark.parametrize("plan", ["cfg=2", "cfg=2,ulysses=2", "tp=2", "tp=2,ulysses=2", "cfg=2,tp=2", "tp=3,ring=2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_and_cut_weights(plan: str, batch: int) -> None:
    torch.manual_seed(0)
    captured = fastpar.capture(Block().double().eval(), inputs(batch))
    report = fastpar.explain(captured, plan=plan, passes=_written(plan))
    assert sum(c.count for c in report.collectives) == report.collectives_formula
    assert [v for v in report.symbols if "S" in v] if "tp" in plan else report.symbols or plan == "cfg=2"


def test_what_a_view_needs_whole_goes_to_the_output_in_one_gather() -> None:
    """Rows that a view cannot cut are gathered before it; halves of the batch then too, not once more behind it."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (2, 4)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return out.unflatten(1, (3, 5)).permute(0, 2, 1, 3).flatten(1, 2)

    captured = fastpar.capture(attend, (torch.randn(2, 15, 8).double(),))
    report = fastpar.verify(captured, plan="cfg=2,ulysses=2", passes=_written("cfg=2,ulysses=2"))
    assert report.ok
    assert [(c.axis, c.count) for c in report.collectives if c.why == "output"] == [("cfg.ulysses", 1)]
    assert sum(c.count for c in report.collectives) == report.collectives_formula


def test_halos_and_sums_of_rows() -> None:
    """Each boundary between two ranks is crossed by k - s rows of a convolution, of three taps one up and one down; not
    for the first one, since all ranks have the sample."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 4, 3, padding=1)
    ).double()
    captured = fastpar.capture(model.eval(), (torch.randn(1, 4, 8, 6).double(),))
    row, sums, output = 4 * 6 * 8, 2 * 8, 4 * 8 * 6 * 8  # bytes: a row, the sums of two groups, the picture
    for n in (2, 4):
        report = fastpar.explain(captured, plan=f"ulysses={n}")
        crossing = row if n == 2 else 2 * row  # to one neighbour, or to two
        assert report.bytes_per_rank == report.bytes_formula == crossing + (2 * 2 * sums + output) * (n - 1) / n
        # halos, the sums of values and squares together, the picture
        assert sum(c.count for c in report.collectives) == report.collectives_formula == 3
        assert "plus halos R" in report.formula and "sums over ranks 2*S*(t - 1)/t" in report.formula


def test_links_of_a_topology() -> None:
    """Heads across machines, a ring inside: the network carries the torus, its own links all of it."""
    report = fastpar.explain(attention(24, 96, 2), plan="torus=4,ring=8", topology="a100-4x8")
    inside, between = report.links
    assert (inside.axes, between.axes) == (["ring"], ["torus"])
    assert (inside.ranks, between.ranks) == (1, 8)
    assert inside.bytes == report.bytes_per_rank and between.bytes == between.formula < 8 * inside.bytes
    (only,) = fastpar.explain(attention(24, 96, 2), plan="ring=8", topology="h100-8").links
    assert only.bytes == only.formula == fastpar.explain(attention(24, 96, 2), plan="ring=8").bytes_per_rank


def test_a_row_that_is_off_is_told() -> None:
    good = row("one attention", attention(24, 96, 2), 1, "ulysses=8")
    assert wrong(good) == []
    assert wrong({**good, "ratio": 1.06}) and wrong({**good, "ratio_between_machines": 0.9})
    assert wrong({**good, "collectives": good["collectives"] + 1})


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_models_at_their_real_size(model: str) -> None:
    plans = ("ulysses=8", "ring=8", "ulysses=4,ring=2", "torus=4,ring=2", "cfg=2,ulysses=4", "tp=8", "ulysses=7")
    found = rows(model, plans)
    assert len(found) == len(plans) + 1
    assert {(r["plan"], *wrong(r)) for r in found if wrong(r)} == set()
