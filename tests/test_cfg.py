"""cfg=2: guidance that runs as a batch is split along it, and combines with every token plan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpar
from fastpar.graph.count import Collective

torch.set_num_threads(1)


class Block(torch.nn.Module):
    """Modulated self-attention, cross-attention on a prompt, and an MLP over merged batch and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.qkv, self.kv = torch.nn.Linear(1, 24), torch.nn.Linear(12, 36), torch.nn.Linear(6, 24)
        self.up, self.down = torch.nn.Linear(12, 48), torch.nn.Linear(48, 12)

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        shift, scale = self.time(t[:, None])[:, None].chunk(2, -1)
        q, k, v = self.qkv(x * (1 + scale) + shift).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        k, v = self.kv(prompt).unflatten(-1, (2, 2, 6)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(x.unflatten(-1, (2, 6)).transpose(1, 2), k, v).transpose(1, 2).flatten(2)
        rows = x.reshape(-1, 12)
        return (rows + self.down(F.gelu(self.up(rows)))).view_as(x)


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(batch, 11, 12).double(), torch.rand(batch).double(), torch.randn(batch, 5, 6).double()


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block().double().eval(), inputs(2))


@pytest.mark.parametrize(
    "plan", ["cfg=2", "cfg=2,ulysses=2", "cfg=2,ulysses=3", "cfg=2,ring=2", "cfg=2,gather=4", "cfg=2,ulysses=2,ring=3"]
)
def test_cfg_combines(captured: fastpar.Captured, plan: str) -> None:
    report = fastpar.verify(captured, plan=plan)
    assert report.ok, report.diverged_at
    assert not report.fallbacks
    # 11 rows are 2 on the busiest of 6 ranks, 1.83 on average
    assert report.flops_share < 1.3 * report.attainable_share


def test_only_the_outputs_move_between_branches(captured: fastpar.Captured) -> None:
    report = fastpar.explain(captured, plan="cfg=2")
    assert [(c.kind, c.why, c.count) for c in report.collectives] == [("all_gather", "output", 1)]
    assert report.bytes_per_rank == report.bytes_formula == 11 * 12 * 8
    assert report.flops_share < 0.51


def test_odd_batches_are_cut_unevenly() -> None:
    torch.manual_seed(0)
    assert fastpar.verify(Block().double().eval(), inputs(3), plan="cfg=2,ulysses=2").ok


class EachRow(torch.nn.Module):
    """Attention for one row of the batch after the other, each over its own number of keys (as Mochi's)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        each = []
        for i in range(len(x)):
            keys, values = k[i : i + 1, :, : 7 + i], v[i : i + 1, :, : 7 + i]
            each.append(F.scaled_dot_product_attention(q[i : i + 1], keys, values))
        return self.out(torch.cat(each).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("plan", "batch"), [("cfg=2", 2), ("cfg=2", 3), ("cfg=2,ulysses=2", 2), ("cfg=2,ring=3", 2)])
def test_one_row_of_a_batch_stays_where_it_is(plan: str, batch: int) -> None:
    torch.manual_seed(0)
    captured = fastpar.capture(EachRow().double().eval(), inputs(batch)[:1])
    report = fastpar.verify(captured, plan=plan)
    assert report.ok and not report.fallbacks, report.diverged_at
    if plan == "cfg=2":
        explained = fastpar.explain(captured, plan=plan)
        assert [(c.why, c.count) for c in explained.collectives] == [("output", 1)]
        assert explained.bytes_per_rank == (batch + 1) // 2 * 11 * 12 * 8
        assert explained.flops_share < 1.02 * ((batch + 1) // 2) / batch  # later rows have more keys


class Packed(Block):
    """Takes and gives tokens of one sequence, without a dimension for the batch."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return super().forward(x[None], t, prompt[None])[0]


@pytest.mark.parametrize("plan", ["cfg=2", "cfg=2,ulysses=2", "cfg=2,ring=3"])
def test_tokens_in_the_first_dimension_are_no_batch(plan: str) -> None:
    torch.manual_seed(0)
    x, t, prompt = inputs(1)
    report = fastpar.verify(Packed().double().eval(), (x[0], t, prompt[0]), plan=plan)
    assert report.ok, report.diverged_at
    assert any("whole calls are dealt" in note for note in report.notes)


@pytest.mark.parametrize(("plan", "share"), [("cfg=2", 0.5), ("cfg=2,ulysses=2", 0.29), ("cfg=2,ring=2", 0.29)])
def test_guidance_in_separate_calls_deals_them(plan: str, share: float) -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Block().double().eval(), inputs(1), plan=plan)
    assert report.ok and not report.fallbacks
    assert report.flops_share <= share  # of 11 rows one of two ranks has 6
    assert any("call k runs on part k mod 2" in note for note in report.notes)
    assert report.bytes_per_rank <= 1.1 * report.bytes_formula
    assert report.collectives[-1] == Collective("broadcast", "cfg", 11 * 12 * 8 // 2, 1, "", "output")


class Normalised(torch.nn.Module):
    """Its kernels, of as many channels as there are rows in the batch or more, become outputs of the graph."""

    def __init__(self) -> None:
        super().__init__()
        wide, narrow = torch.nn.Conv1d(2, 6, 3, padding=1), torch.nn.Conv1d(6, 2, 1)
        self.wide, self.narrow = torch.nn.utils.weight_norm(wide), torch.nn.utils.weight_norm(narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.sin(self.wide(x)))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("rows", "plan", "busiest"),
    [(9, "cfg=2,ulysses=2", 3), (9, "cfg=2,gather=3", 2), (2, "cfg=2,ulysses=2", 1), (9, "cfg=2,ulysses=2,tp=2", 3)],
)
def test_rows_that_are_the_batch_are_cut_over_both(rows: int, plan: str, busiest: int) -> None:
    """An expert of a mixture has a graph of its own, whose rows are those of tokens and batch together."""
    torch.manual_seed(0)
    expert = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 6)).double().eval()
    report = fastpar.verify(expert, (torch.randn(rows, 6).double(),), plan=plan)
    assert report.ok and not report.fallbacks
    assert report.flops_share == pytest.approx(busiest / rows / (2 if "tp" in plan else 1), abs=1e-3)


def test_channels_of_kernels_are_no_batch() -> None:
    torch.manual_seed(0)
    captured = fastpar.capture(Normalised().double().eval(), (torch.randn(2, 2, 11).double(),))
    assert len(captured.programs[0].program.outputs) > 1  # what weight_norm puts on its modules
    report = fastpar.verify(captured, plan="cfg=2")
    assert report.ok, report.diverged_at
    assert [(c.kind, c.why, c.count) for c in report.collectives] == [("all_gather", "output", 1)]
    assert report.fallbacks == []
    assert report.flops_share == 0.5
