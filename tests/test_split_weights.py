"""``split-weights``: columns of what every rank repeats, gathered once per level, where that pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing import FileCheck

import fastpar
from fastpar.core.errors import OptionError
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.pipeline import PassContext, Pipeline
from fastpar.ops.collectives import COLLECTIVES
from fastpar.plan.expand import pipeline_text
from fastpar.registry import PASSES
from fastpar.run.build import Built, build
from tests.test_cfg import Block, inputs

PLANS = ["ulysses=2", "ulysses=5", "ring=3", "gather=4", "torus=2,ring=2", "tp=2", "ulysses=2,tp=2", "ulysses=3,tp=2",
         "cfg=2,ulysses=2", "cfg=2,tp=3"]  # fmt: skip


def always(plan: str) -> str:
    return pipeline_text(Plan.parse(plan)).replace("split-weights", "split-weights{always=true}")


class Layers(nn.Module):
    """A time embedding of two layers, which modulates ``depth`` blocks as in DiT: three levels."""

    def __init__(self, width: int = 12, depth: int = 2, per: int = 3) -> None:
        super().__init__()
        self.heads = 2
        self.one, self.two = nn.Linear(4, width), nn.Linear(width, width)
        self.modulations = nn.ModuleList(nn.Linear(width, per * width) for _ in range(depth))
        self.qkvs = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.two(F.silu(self.one(t)))
        for modulation, qkv in zip(self.modulations, self.qkvs, strict=True):
            several = modulation(F.silu(time))[:, None].unflatten(-1, (3, -1, x.shape[-1]))
            shift, scale, gate = several.sum(-2).unbind(-2)
            q, k, v = qkv(x * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + gate * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def layers(batch: int = 1, tokens: int = 10, dtype: torch.dtype | None = torch.float64, width: int = 12, depth: int = 2,
           heads: int = 2, per: int = 3) -> fastpar.Captured:  # fmt: skip
    torch.manual_seed(0)
    model = Layers(width, depth, per).eval()
    model.heads = heads
    model = model.to(dtype) if dtype is not None else model
    return fastpar.capture(model, (torch.randn(batch, tokens, width, dtype=dtype), torch.randn(batch, 4, dtype=dtype)))


def wide(width: int, tokens: int = 64, per: int = 3) -> fastpar.Captured:
    """Eight blocks in bfloat16, which need not exist."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            return layers(1, tokens, None, width, 8, 16, per)
    finally:
        torch.set_default_dtype(before)


def shared(built: Built) -> list[int]:
    """Results per exchange of columns."""
    found = [n for n in built.lowered.graph.nodes if n.target in COLLECTIVES and n.meta.get("why") == "columns"]
    return [len(n.args[0]) for n in found]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_exact(plan: str, batch: int) -> None:
    torch.manual_seed(0)
    for captured in (layers(batch), fastpar.capture(Block().double().eval(), inputs(batch))):
        report = fastpar.verify(captured, plan=plan, passes=always(plan))
        assert report.ok and not report.fallbacks, report.diverged_at
        plain = fastpar.explain(captured, plan=plan, passes=always(plan).replace("split-weights{always=true},", ""))
        assert report.flops_share < plain.flops_share
        # columns of these are shared out evenly by none of the degrees that do not divide them
        columns = sum(c.bytes for c in report.collectives if c.why == "columns")
        assert columns and report.bytes_formula > plain.bytes_formula


def test_levels_are_gathered_together() -> None:
    captured = layers(tokens=12)
    built = build(captured.programs[0].program, "ulysses=2", passes=always("ulysses=2").removesuffix(",overlap,pin"))
    assert shared(built) == [1, 1, 2]
    report = fastpar.explain(captured, plan="ulysses=2", passes=always("ulysses=2").removesuffix(",overlap,pin"))
    assert sum(c.count for c in report.collectives) == report.collectives_formula
    assert report.bytes_per_rank == report.bytes_formula  # 12 tokens and 12 columns: all is even
    calls = " ".join(str(n.target) for n in built.lowered.graph.nodes if n.op == "call_function")
    first = "aten.addmm.default fastpar.all_gather.default"
    check = FileCheck().check(first).check(first).check_count("aten.addmm.default", 2)
    check.check("fastpar.all_gather.default").check("fastpar.attention.default").run(calls)


def test_a_rank_needs_the_columns_of_a_weight_only() -> None:
    """Slices are of the weights themselves, so that ``shard_weights`` need not give the whole ones."""
    built = build(layers().programs[0].program, "ulysses=2", passes=always("ulysses=2"), hold=True)
    cut = {i.name for n, i in zip(built.lowered.placeholders, built.lowered.inputs, strict=True)
           if not n.meta["layout"].is_whole}  # fmt: skip
    assert cut >= {"modulations.0.weight", "modulations.1.weight", "one.weight", "two.weight", "modulations.0.bias"}
    assert not any("qkv" in name for name in cut)


@pytest.mark.parametrize("box", ["h100-8", "l40-8", "a100-4x8"])
def test_wide_layers_pay_and_narrow_ones_do_not(box: str) -> None:
    """Megabytes of weights for one row: reading an eighth of them saves more than a gather of the results takes."""
    built = build(wide(3072, per=9).programs[0].program, "ulysses=8", topology=box)
    assert shared(built) == [8]  # the time embedding stays whole: a level of its own would take longer
    assert shared(build(wide(128).programs[0].program, "ulysses=8", topology=box)) == []


def test_what_does_not_pay_is_said() -> None:
    built = build(wide(3072).programs[0].program, "ulysses=8", topology="l40-8")
    assert shared(built) == [8]
    (note,) = (n for n in built.notes if n.startswith("split-weights: 1 of the products"))
    assert "save 16 us of computing, and their gather takes 35 us (" in note and "self.two" in note


def test_what_hides_exchanges_stays_whole() -> None:
    """An eighth of each modulation takes less time than all of it, but leaves tokens nothing to travel under."""
    captured, plan = wide(3072), "ulysses=8"
    built = build(captured.programs[0].program, plan, topology="h100-8")
    assert shared(built) == []
    (note,) = (n for n in built.notes if n.startswith("split-weights"))
    assert "8 of the products that every rank repeats stay whole: a call would take" in note
    seconds = [fastpar.explain(captured, plan=plan, topology="h100-8", passes=p).predicted["seconds"]
               for p in (pipeline_text(Plan.parse(plan)), always(plan))]  # fmt: skip
    assert seconds[0] < seconds[1]


def test_what_is_repeated_is_read_by_nobody_twice() -> None:
    """The share of time is closer to 1/N."""
    captured, plan = wide(3072, 512, per=9), "ulysses=8"
    passes = pipeline_text(Plan.parse(plan)).replace("hoist", "hoist{varying=x:t}")
    split = fastpar.explain(captured, plan=plan, topology="h100-8", passes=passes)
    whole = fastpar.explain(captured, plan=plan, topology="h100-8", passes=passes.replace("split-weights,", ""))
    assert split.time_share < whole.time_share and split.predicted["compute"] < whole.predicted["compute"]


def test_naive_ranks_never_talk() -> None:
    assert "split-weights" not in pipeline_text(Plan.parse("naive=2"))


def test_it_needs_a_cost_model() -> None:
    program = layers().programs[0].program.copy()
    program.mesh = Mesh((("sp", 2),))
    with pytest.raises(OptionError, match="cost model"):
        Pipeline.parse("shard,lower,split-weights", PASSES).run(program, PassContext(mesh=program.mesh))
