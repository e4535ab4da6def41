"""Ring and USP: blocks that show a row no key, empty blocks, the order of starts and waits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastpar
from fastpar.ops.ring import attention_lse, merge
from fastpar.run.build import build
from tests import programs
from tests.prove import Way, prove

torch.set_num_threads(1)


class Masked(torch.nn.Module):
    """One self-attention over tokens with a mask, between products."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(12, 36)
        self.out = torch.nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def masks(b: int, h: int, s: int) -> dict[str, torch.Tensor]:
    """Masks of every broadcast shape; the first third of the keys is hidden from some rows, or from all."""
    torch.manual_seed(1)
    hidden = torch.ones(s, s, dtype=torch.bool)
    hidden[: s // 2, : s // 3] = False
    nobody = torch.ones(s, s, dtype=torch.bool)
    nobody[:, : s // 3] = False
    blind = torch.ones(b, 1, s, s, dtype=torch.bool)
    blind[:, :, 1] = False  # a row that sees no key at all
    return {
        "keys": torch.rand(1, s) > 0.3,
        "rows_keys": hidden,
        "block_hidden_from_all": nobody,
        "batch_keys": torch.rand(b, 1, 1, s) > 0.3,
        "batch_rows_keys": torch.rand(b, 1, s, s) > 0.3,
        "heads": torch.randn(1, h, 1, s, dtype=torch.float64),
        "full_additive": torch.randn(b, h, s, s).double().masked_fill(torch.rand(b, h, s, s) < 0.3, -math.inf),
        "blind_row": blind,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(masks(1, 1, 6)))
def test_masks_travel_with_rows_and_keys(name: str) -> None:
    torch.manual_seed(0)
    model = Masked().double().eval()
    x, mask = torch.randn(2, 11, 12, dtype=torch.float64), masks(2, 2, 11)[name]
    captured = fastpar.capture(model, (x, mask))
    plans = ("ring=2", "ring=3", "ring=5", "ulysses=2,ring=2", "ulysses=4,ring=2", "ulysses=3", "gather=4", "ring=13")
    for plan in plans:
        report = fastpar.verify(captured, plan=plan)
        assert report.ok, (plan, report.max_rel_err, report.diverged_at)


@pytest.mark.parametrize("shape", [(11, 11), (2, 1, 1, 11), (2, 1, 11, 11), (2, 2, 11, 11)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_a_large_number_hides(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scores vanish beside finfo's minimum: eager takes the mean of those keys, of some or of all."""
    torch.manual_seed(0)
    low, lower = torch.finfo(dtype).min / 2, torch.finfo(dtype).min
    mask = torch.zeros(shape, dtype=dtype).masked_fill(torch.rand(shape) < 0.3, low)
    mask[..., -1, :] = low  # a row without a key
    mask[..., -1, :2], mask[..., -1, 9] = -math.inf, lower  # of which these are further away
    if len(shape) > 2:
        mask[0] = low
    model = Masked().to(dtype).eval()
    captured = fastpar.capture(model, (torch.randn(2, 11, 12, dtype=dtype), mask))
    for plan in ("ring=2", "ring=3", "torus=3", "ulysses=2,ring=2", "torus=2,ring=2", "ulysses=2"):
        report = fastpar.verify(captured, plan=plan)
        assert report.ok, (plan, report.max_rel_err, report.diverged_at)


@pytest.mark.parametrize("plan", ["ring=3", "torus=3", "torus=2,ring=2"])
def test_a_mask_that_every_rank_has_does_not_travel(plan: str) -> None:
    """Each block cuts its own rows and columns of it, also where its large numbers are taken out first."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 12, 12, dtype=torch.float64), torch.randn(2, 1, 12, 12, dtype=torch.float64)
    report = fastpar.verify(Masked(6).double().eval(), (x, mask), plan=plan)
    assert report.ok and {c.why for c in report.collectives} == {"attention", "output"}


def test_masks_without_such_numbers_stay_as_they_are() -> None:
    x = torch.randn(2, 11, 12, dtype=torch.float16)
    for mask in (torch.zeros(11, 11, dtype=torch.float16), torch.zeros(11, 11) == 0):
        built = build(fastpar.capture(Masked().half().eval(), (x, mask)).programs[0].program, "ring=2")
        assert not any("amax" in str(n.target) for n in built.localise(0).graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_merged_blocks_are_the_whole_attention(dtype: torch.dtype, cut: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (5, 9, 9))
    mask = torch.rand(2, 1, 5, 9) > 0.4
    mask[0, 0, 2] = False  # no key at all
    mask[1, 0, 3, :4] = False  # none in the first block
    total = None
    for a, b in ((0, cut), (cut, 9)):
        block = attention_lse(q, k[:, :, a:b], v[:, :, a:b], mask[..., a:b])
        assert block[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        total = block if total is None else merge(*total, *block)
    assert total is not None
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    want = want.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(total[0].double(), want, atol=tolerance, rtol=tolerance)
    assert total[1][0, 0, 2] == -math.inf


@pytest.mark.parametrize("plan", ["ring=3", "torus=4"])
def test_keys_that_lie_as_columns(plan: str) -> None:
    """The kernels that give a log-sum-exp take the width to be what lies side by side, and do not look."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (y.transpose(-1, -2).contiguous().transpose(-1, -2) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 37, 4, dtype=torch.float64) for _ in range(3))
    report = fastpar.verify(function, (q, k, v), plan)
    assert report.ok, report.diverged_at
    q, k, v = (x[..., :n, :] for x, n in ((q, 37), (k, 11), (v, 11)))
    k, v = (y.transpose(-1, -2).contiguous().transpose(-1, -2) for y in (k, v))
    torch.testing.assert_close(attention_lse(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))


def test_a_block_without_keys_weighs_nothing() -> None:
    q = torch.randn(1, 1, 3, 4)
    out, lse = attention_lse(q, q[:, :, :0], q[:, :, :0])
    assert out.abs().max() == 0 and bool((lse == -math.inf).all())
    other = attention_lse(q, q, q)
    merged = merge(out, lse, *other)
    assert torch.equal(merged[0], other[0])
    nothing = merge(out, lse, out, lse)
    assert nothing[0].abs().max() == 0 and bool((nothing[1] == -math.inf).all())


def test_the_next_exchange_starts_before_this_block_is_attended() -> None:
    captured = fastpar.capture(Masked().double().eval(), (torch.randn(1, 10, 12, dtype=torch.float64),))
    built = build(captured.programs[0].program, "ring=3")
    names = [str(n.target) for n in built.localise(1).graph.nodes if n.op == "call_function"]
    steps = [n.split(".")[1] for n in names if "all_to_all" in n or "wait" in n or "attention_lse" in n]
    assert steps[:7] == ["all_to_all_single", "attention_lse", "wait_tensor", "all_to_all_single", "attention_lse",
                         "wait_tensor", "attention_lse"]  # fmt: skip


def test_one_message_per_step_and_its_bytes() -> None:
    captured = fastpar.capture(Masked().double().eval(), (torch.randn(1, 12, 12, dtype=torch.float64),))
    report = fastpar.explain(captured, plan="ring=4")
    attention = [c for c in report.collectives if c.why == "attention"]
    assert sum(c.count for c in attention) == 3
    assert sum(c.bytes for c in attention) == 2 * 12 * 12 * 8 * 3 // 4
    assert report.bytes_per_rank == report.bytes_formula


class Grouped(torch.nn.Module):
    """Grouped heads, then linear attention: the same tokens once by rows and once summed over."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(12, 24), torch.nn.Linear(12, 8)
        self.out = torch.nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (12, 2)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
        summary = x.transpose(1, 2) @ F.relu(x)  # contracts tokens: a partial sum on every rank
        return x @ summary + x.repeat(1, 2, 1)[:, : x.shape[1]]


@pytest.mark.parametrize("plan", ["ulysses=2", "ulysses=4", "ring=3", "gather=2", "ulysses=2,ring=2"])
def test_grouped_heads_and_sums_over_tokens(plan: str) -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Grouped().double().eval(), (torch.randn(2, 11, 12, dtype=torch.float64),), plan=plan)
    assert report.ok, report.diverged_at


class Joint(torch.nn.Module):
    """Joint attention of text and image tokens, each with projections of its own, text in front."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.text, self.image, self.out = torch.nn.Linear(12, 36), torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = torch.cat([self.text(text), self.image(image)], 1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


@pytest.mark.parametrize("text", [1, 5])
def test_every_shape_of_usp_up_to_8_ranks(text: int) -> None:
    """Text that is too short to split is counted once, for every U and R."""
    torch.manual_seed(0)
    captured = fastpar.capture(
        Joint(4).double().eval(), (torch.randn(1, text, 12).double(), torch.randn(1, 11, 12).double())
    )
    for u in range(1, 9):
        for r in range(1, 9 // u + 1):
            report = fastpar.verify(captured, plan=f"ulysses={u},ring={r}")
            assert report.ok, (u, r, report.max_rel_err, report.diverged_at)


@pytest.mark.parametrize(("batch", "plan"), [(1, "ring=2"), (1, "torus=3"), (2, "cfg=2,ulysses=2,ring=2")])
def test_a_single_query_under_a_mask_of_numbers(batch: int, plan: str) -> None:
    """The query is on one rank and its row of the mask on all of them, both of one row."""
    attend = ("cross_attention", {"mask": "add", "bits": 8, "pooled": False})
    steps = (("feed_forward", {"bias": False, "merged": False}), attend)
    case = programs.build(programs.Recipe(batch=batch, tokens=1, text=3, start=("token_ids", {}), steps=steps))
    prove(case, Way.of(plan, case.program))
