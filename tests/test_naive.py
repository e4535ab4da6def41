"""naive=N: the same layouts, and nothing but the output travels."""

from __future__ import annotations

import pytest
import torch

import fastpar
from fastpar.core.errors import PlanError
from tests.test_cfg import Block, inputs

torch.set_num_threads(1)


class Convolutions(torch.nn.Module):
    """What a U-Net's block is made of: halos, and a group norm over all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5  # the input itself is whole on every rank: a halo of it is no exchange
        return self.outward(self.norm(self.inward(x)).relu())


@pytest.mark.parametrize("plan", ["naive=2", "naive=3", "cfg=2,naive=2"])
def test_only_the_output_travels(plan: str) -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Block().double().eval(), inputs(2), plan=plan)
    assert report.ok and report.tolerance == float("inf")
    assert 1e-6 < report.max_rel_err < 1  # it is not the model's function, and says so
    assert any("never exchange" in note for note in report.notes)
    assert {c.why for c in report.collectives} == {"output"}
    assert report.bytes_per_rank <= 1.1 * report.bytes_formula


def test_a_patch_is_computed_as_if_it_were_the_image() -> None:
    """Halos are zeros, norms are the patch's own: each rank's rows are those of its patch alone."""
    torch.manual_seed(0)
    model, x = Convolutions().double().eval().requires_grad_(False), torch.randn(1, 2, 8, 5, dtype=torch.float64)
    for out in fastpar.simulate(model, (x,), plan="naive=2"):
        alone = torch.cat([model(part) for part in x.chunk(2, 2)], 2)
        assert torch.allclose(out, alone, rtol=0, atol=1e-12)


def test_one_rank_is_exact() -> None:
    torch.manual_seed(0)
    assert fastpar.verify(Block().double().eval(), inputs(1), plan="naive=1").max_rel_err == 0


def test_a_sum_over_all_rows_as_output_is_refused() -> None:
    torch.manual_seed(0)
    block, head = Block().double().eval(), torch.nn.Linear(12, 3).double()
    with pytest.raises(PlanError, match="no common value"):
        fastpar.explain(lambda *args: head(block(*args).mean(1)), inputs(1), plan="naive=2")
