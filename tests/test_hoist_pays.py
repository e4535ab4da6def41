"""What ``hoist`` takes: what saves more than the check of its inputs costs, and would not have hidden exchanges.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpar
from fastpar.core.errors import OptionError
from fastpar.core.plan import Plan
from fastpar.graph.closure import best_closure
from fastpar.graph.pipeline import PassContext
from fastpar.graph.prologue import apart, bytes_on_ranks, checked, split
from fastpar.passes.hoist import Hoist
from fastpar.plan.expand import pipeline_text
from fastpar.run.build import build
from tests.test_split_weights import wide


class Crossed(nn.Module):
    """A prompt of few tokens through a wide weight: little work, and much to check; and one of more, through layers."""

    def __init__(self, wide: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.kv = nn.Linear(wide, 2 * 32, bias=False)
        self.deep = nn.Sequential(*(nn.Linear(*ends, bias=False) for ends in itertools.pairwise((32, *widths, 64))))

    def forward(self, x: Tensor, few: Tensor, many: Tensor) -> Tensor:
        for layer, text in ((self.kv, few), (self.deep, many)):
            q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (x, *layer(text).chunk(2, -1)))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def crossed(
    wide: int, tokens: int, widths: tuple[int, ...] = (1024, 1024), plan: str = "ulysses=1", hoist: str = "hoist"
) -> Any:
    """A built program; weights have no memory, so that they may be of any size."""
    with FakeTensorMode():
        model = Crossed(wide, widths).requires_grad_(False)
        given = (torch.randn(1, 64, 32), torch.randn(1, 2, wide), torch.randn(1, tokens, 32))
    recorded = fastpar.capture(model, given).programs[0]
    text = pipeline_text(Plan.parse(plan), schedule=False).removesuffix("split-weights,hoist")
    return build(recorded.program, plan, passes=text + hoist)


def read_by_prologue(built: Any) -> set[str]:
    parts = split(built.lowered)
    return {i.name for i in parts.prologue.inputs} if parts else set()


def test_what_costs_more_to_check_than_to_compute_stays_and_is_said() -> None:
    """A product that is bound by reading its weight saves no more than the check takes, which reads it too."""
    built = crossed(wide=1 << 20, tokens=1 << 14)
    assert read_by_prologue(built) == {"deep.0.weight", "deep.1.weight", "deep.2.weight", "many"}
    (said,) = [n for n in built.notes if str(n).startswith("hoist")]
    assert "1 operators" in said and f"{((1 << 26) + (1 << 21)) * 4:,} bytes" in said
    assert "layer(text)" in said  # where it is


def test_always_hoists_it_all() -> None:
    built = crossed(wide=1 << 20, tokens=1 << 14, hoist="hoist{always=true}")
    assert read_by_prologue(built) >= {"kv.weight", "few", "deep.1.weight", "many"}
    assert not [n for n in built.notes if str(n).startswith("hoist")]


def test_where_nothing_pays_there_is_no_check() -> None:
    built = crossed(wide=1 << 20, tokens=2, widths=())
    assert split(built.lowered) is None


def test_without_a_cost_model_it_says_so() -> None:
    program = crossed(wide=32, tokens=2).lowered
    with pytest.raises(OptionError, match="needs a cost model"):
        Hoist().apply(program, PassContext())


def test_only_the_part_of_a_weight_that_a_rank_reads_is_checked() -> None:
    """Columns of a product that are shared out: a rank reads its own rows of the weight, and so does the check."""
    passes = "split-weights{always=true},hoist{always=true}"
    built = crossed(wide=1 << 14, tokens=1 << 14, plan="ulysses=2", hoist=passes)
    for program in (built.lowered, built.localise(1)):
        parts = split(program)
        assert parts is not None
        (read,) = [several for x, several in checked(parts.prologue).items() if x.meta["val"].shape == (64, 1 << 14)]
        assert [max(bytes_on_ranks(program, part)) for part in read] == [32 * (1 << 14) * 4]
        assert apart(parts.prologue)  # so ranks have to agree


def test_ranks_that_check_the_same_need_not_agree() -> None:
    parts = split(crossed(wide=1 << 14, tokens=1 << 14, plan="ulysses=2", hoist="hoist{always=true}").lowered)
    assert parts is not None and not apart(parts.prologue)


@pytest.mark.parametrize("stays", ["x", "x:t"])
def test_what_hides_exchanges_stays_in_the_step(stays: str) -> None:
    """Modulations of a time that does not change take longer than their check, and tokens travel meanwhile."""
    program = wide(3072).programs[0].program
    built = build(program, "ulysses=8", topology="h100-8", passes=passes(f"hoist{{varying={stays}}}"))
    assert split(built.lowered) is None
    said = [n for n in built.notes if "for exchanges travel meanwhile" in str(n)]
    assert len(said) == (stays == "x")
    always = build(program, "ulysses=8", topology="h100-8", passes=passes("hoist{varying=x,always=true}"))
    assert split(always.lowered) is not None


def passes(hoist: str) -> str:
    return pipeline_text(Plan.parse("ulysses=8"), schedule=False).replace("hoist", hoist)


@given(st.data())
def test_the_best_closure_is_the_best_of_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    worth = {i: float(data.draw(st.integers(-5, 5))) for i in range(count)}
    needs = {i: data.draw(st.sets(st.integers(0, i - 1))) if i else set() for i in range(count)}
    closed = [set(c) for n in range(count + 1) for c in itertools.combinations(range(count), n)
              if all(needs[i] <= set(c) for i in c)]  # fmt: skip
    found = best_closure(worth, needs)
    assert found in closed
    assert sum(worth[i] for i in found) == max(sum(worth[i] for i in c) for c in closed)
