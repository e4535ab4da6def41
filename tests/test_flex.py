"""Flex attention: what capture makes of its two functions, against torch's own eager flex attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention as flex

import fastpar
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.pipeline import PassContext, Pipeline
from fastpar.graph.program import Program
from fastpar.ops.attention import attention
from fastpar.plan.expand import mesh_for, pipeline_text
from fastpar.registry import PASSES

torch.set_num_threads(1)
F64 = torch.float64
B, H, S, E = 2, 4, 37, 8  # S is no multiple of a block; block masks are padded to 128


@pytest.fixture(autouse=True)
def eager_flex(monkeypatch):
    """Uncompiled, flex attention would compile itself with Dynamo on every call of the reference."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    yield
    torch._dynamo.reset()


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.sort(torch.randint(0, 4, (S,), generator=gen))[0],
        "slopes": torch.rand(H, generator=gen, dtype=F64),
        "bias": torch.randn(B, H, S, S, generator=gen, dtype=F64),
        "keys": torch.randn(B, S, generator=gen, dtype=F64),
        "short": torch.randint(S // 2, S, (B,), generator=gen),
    }


Mod = Callable[[dict[str, torch.Tensor]], Callable[..., torch.Tensor]]
# B and H of the block mask, and the mask_mod
MASKS: dict[str, tuple[int | None, int | None, Mod]] = {
    "causal": (None, None, lambda t: lambda b, h, q, k: q >= k),
    "method": (None, None, lambda t: lambda b, h, q, k: q.ge(k)),
    "window": (None, None, lambda t: lambda b, h, q, k: (q - k).abs() <= 5),
    "documents": (None, None, lambda t: lambda b, h, q, k: t["ids"][q] == t["ids"][k]),
    "prefix": (None, None, lambda t: lambda b, h, q, k: (k < 9) | (q >= k)),
    "lengths": (B, None, lambda t: lambda b, h, q, k: k < t["short"][b]),
    "heads": (B, H, lambda t: lambda b, h, q, k: (q - k).abs() <= 3 + 2 * h + b),
    "blind rows": (None, None, lambda t: lambda b, h, q, k: (q > k) & (q % 5 != 2)),
    "reversed": (None, None, lambda t: lambda b, h, q, k: t["ids"][S - 1 - q] <= t["ids"][k]),
}  # fmt: skip
BIASES: dict[str, Mod] = {
    "alibi": lambda t: lambda s, b, h, q, k: s - t["slopes"][h] * (q - k).abs(),
    "tensor": lambda t: lambda s, b, h, q, k: s + t["bias"][b, h, q, k],
    "transposed": lambda t: lambda s, b, h, q, k: t["bias"][b, h, k, q] + s,
    "keys": lambda t: lambda s, b, h, q, k: 0.5 * s + t["keys"][b, k],
    "hidden": lambda t: lambda s, b, h, q, k: torch.where(q >= k, 2 * s, -float("inf")),
    "offset": lambda t: lambda s, b, h, q, k: t["slopes"][h] - s / 2,
}
OTHERS: dict[str, Mod] = {
    "soft cap": lambda t: lambda s, b, h, q, k: 3 * torch.tanh(s / 3),
    "per head": lambda t: lambda s, b, h, q, k: s * t["slopes"][h],
    "floor": lambda t: lambda s, b, h, q, k: torch.where(q >= k, s, -2.0),
    "relative": lambda t: lambda s, b, h, q, k: torch.where(s > 0, s, 2 * s),
}


Tensors = dict[str, torch.Tensor]


def block_mask(mask: str, t: Tensors, rows: int = S, keys: int = S, device: str = "cpu") -> Any:
    batch, heads, mod = MASKS[mask]
    return flex.create_block_mask(mod(t), batch, heads, rows, keys, device=device)


def attend(q: Any, k: Any, v: Any, t: Tensors, mask: Any = None, score: Mod | None = None, **options: Any) -> Any:
    """``mask`` is a block mask, or the name of one that is made here, which Dynamo is slow to trace."""
    block = block_mask(mask, t, q.shape[2], k.shape[2], q.device.type) if isinstance(mask, str) else mask
    return flex.flex_attention(q, k, v, score(t) if score is not None else None, block, **options)


def qkv(heads: int = H, groups: int = H, rows: int = S, keys: int = S, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    sizes = (B, heads, rows, E), (B, groups, keys, E), (B, groups, keys, E)
    return [torch.randn(s, generator=gen, dtype=F64).to(dtype) for s in sizes]


def captured(function: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The one program of ``function``, and what it gave."""
    found = fastpar.capture(function, args)
    (recorded,) = found.programs
    return recorded.program, found.outputs


def attentions(program: Program) -> int:
    return sum(n.target is attention for n in program.graph.nodes)


def close(mine: torch.Tensor, true: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert mine.shape == true.shape and mine.dtype == true.dtype
    torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)


# -- what the operator computes -----------------------------------------------------------


def test_masks():
    t = tensors()
    made = {name: block_mask(name, t) for name in MASKS}
    program, outs = captured(lambda q, k, v, t: [attend(q, k, v, t, made[name]) for name in MASKS], *qkv(), t)
    for name, out in zip(MASKS, outs, strict=True):
        close(out, attend(*qkv(), t, name))
    assert attentions(program) == len(MASKS) and not program.notes


def test_what_only_scales_and_adds_is_a_bias():
    t = tensors()
    program, outs = captured(lambda q, k, v, t: [attend(q, k, v, t, None, mod) for mod in BIASES.values()], *qkv(), t)
    for mod, out in zip(BIASES.values(), outs, strict=True):
        close(out, attend(*qkv(), t, None, mod))
    assert attentions(program) == len(BIASES) and not program.notes


@pytest.mark.parametrize("score", OTHERS)
def test_any_other_score_mod_is_written_out_and_that_is_said(score):
    t = tensors()
    mask = block_mask("prefix", t)
    program, out = captured(lambda q, k, v, t: attend(q, k, v, t, mask, OTHERS[score]), *qkv(), t)
    close(out, attend(*qkv(), t, mask, OTHERS[score]))
    (note,) = program.notes
    assert attentions(program) == 0 and "test_flex.py" in note and "written out" in note


def test_both_with_grouped_heads_other_lengths_and_scale():
    t = tensors()
    options = {"enable_gqa": True, "scale": 0.7}

    def function(q, k, v, t):
        return attend(q, k, v, t, "causal", BIASES["alibi"], **options)

    args = qkv(groups=2, rows=S - 9)
    program, out = captured(function, *args, t)
    close(out, function(*args, t))
    assert attentions(program) == 1
    program, _ = captured(lambda q, k, v: attend(q, k, v, {}, None, None, **options), *args)
    (node,) = (n for n in program.graph.nodes if n.target is attention)
    assert node.args[3] is None  # what hides nothing is no mask


def test_keys_of_one_batch_serve_all():
    q, k, v = qkv()
    mask = block_mask("lengths", tensors())  # torch asks for a mask that knows the batch
    program, out = captured(lambda q, k, v: attend(q, k, v, {}, mask), q, k[:1], v[:1])
    close(out, attend(q, k[:1], v[:1], {}, mask))
    assert attentions(program) == 1


@pytest.mark.parametrize("score", [None, BIASES["alibi"], OTHERS["soft cap"]], ids=["plain", "bias", "soft cap"])
def test_rows_without_keys_are_zero_and_their_log_sum_exp_is_minus_infinity(score):
    t = tensors()
    mask = block_mask("blind rows", t)

    def function(q, k, v, t):
        return attend(q, k, v, t, mask, score, return_lse=True)

    _, (out, lse) = captured(function, *qkv(), t)
    true, true_lse = function(*qkv(), t)
    close(out, true)
    close(lse, true_lse)
    assert not out[:, :, 2].any() and bool((lse[:, :, 2] == -math.inf).all()) and bool(out[:, :, 3].any())


@pytest.mark.gpu  # where alone torch gives them
def test_largest_scores():
    def function(q, k, v):
        wanted = flex.AuxRequest(lse=True, max_scores=True)
        out, aux = flex.flex_attention(q, k, v, lambda s, b, h, i, j: s + h, return_aux=wanted)
        return out, aux.lse, aux.max_scores

    args = [x.cuda() for x in qkv()]
    _, outs = captured(function, *args)
    for mine, true in zip(outs, function(*args), strict=True):
        close(mine, true)


@pytest.mark.gpu
@pytest.mark.parametrize("mask, score", [("documents", None), ("causal", "alibi"), ("blind rows", "soft cap")])
def test_torchs_compiled_kernel_gives_the_same(mask, score):
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, H, 200, 64, generator=gen).bfloat16().cuda() for _ in range(3))
    t = {"ids": torch.arange(200).cuda() // 60, "slopes": torch.rand(H, generator=gen).cuda()}
    mod = (BIASES | OTHERS)[score](t) if score else None
    block = block_mask(mask, t, 200, 200, "cuda")
    true = torch.compile(flex.flex_attention)(q, k, v, mod, block)
    _, out = captured(lambda q, k, v: flex.flex_attention(q, k, v, mod, block), q, k, v)
    torch.testing.assert_close(out, true, rtol=2e-2, atol=2e-2)


def test_on_fake_tensors():
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(x) for x in qkv()]
        t = {n: mode.from_tensor(x) for n, x in tensors().items()}

    def function(q, k, v, t):
        return attend(q, k, v, t, "documents", BIASES["alibi"])

    found = fastpar.capture(function, (*args, t))
    assert isinstance(found.outputs, FakeTensor) and found.outputs.shape == (B, H, S, E)
    assert attentions(found.programs[0].program) == 1 and not found.programs[0].program.notes


def test_the_result_lies_in_memory_as_the_queries_do():
    q, k, v = qkv()
    for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        true = attend(x, k, v, {})
        close(captured(lambda q, k, v: attend(q, k, v, {}).transpose(1, 2) + 0, x, k, v)[1], true.transpose(1, 2))
        assert captured(lambda q, k, v: attend(q, k, v, {}), x, k, v)[1].stride() == true.stride()
    view = captured(lambda q, k, v: attend(q, k, v, {}).view(B, H * S, E), q, k, v)[1]
    close(view, attend(q, k, v, {}).view(B, H * S, E))


@pytest.mark.parametrize("score", ["keys", "tensor"])
def test_a_bias_is_not_rounded_to_the_queries_dtype(score):
    """Around 300, a bfloat16 goes in steps of 2."""
    t = tensors()
    t |= {"keys": (300 + t["keys"]).float(), "bias": t["bias"].bfloat16()}
    low, wide = qkv(dtype=torch.bfloat16), [x.double() for x in qkv(dtype=torch.bfloat16)]
    program, out = captured(lambda q, k, v, t: attend(q, k, v, t, None, BIASES[score]), *low, t)
    true = attend(*wide, {n: x.double() if x.is_floating_point() else x for n, x in t.items()}, None, BIASES[score])
    own = float((attend(*low, t, None, BIASES[score]) - true).abs().max())
    assert attentions(program) == 1 and out.dtype == torch.bfloat16
    assert float((out - true).abs().max()) <= 2 * own + 2**-8 * float(true.abs().max())


def test_autocast():
    q, k, v = qkv(dtype=torch.float32)
    t = tensors()
    mask = block_mask("causal", t)

    def function(q, k, v, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(q, k, v, t, mask, OTHERS["soft cap"]), attend(q, k, v, t, mask)

    _, outs = captured(function, q, k, v, t)
    for out in outs:
        assert out.dtype == torch.bfloat16
    true = attend(q.double(), k.double(), v.double(), t, "causal")
    torch.testing.assert_close(outs[1].double(), true, rtol=0.02, atol=0.02)


def test_an_index_that_names_every_row_is_none():
    t = tensors()
    masks = block_mask("documents", t), block_mask("reversed", t)
    program, _ = captured(lambda q, k, v, t: attend(q, k, v, t, masks[0], BIASES["tensor"]), *qkv(), t)
    assert not any("index" in str(n.target) for n in program.graph.nodes)
    program, _ = captured(lambda q, k, v, t: attend(q, k, v, t, masks[1]), *qkv(), t)
    assert any("index" in str(n.target) for n in program.graph.nodes)  # this one does not


def test_blocks_that_only_a_block_mask_leaves_out_are_computed_as_eager_does_and_that_is_said():
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    which = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)

    def function(q, k, v):
        mask = flex.BlockMask.from_kv_blocks(0 * counts, which, counts, which, BLOCK_SIZE=32, seq_lengths=(64, 64))
        return flex.flex_attention(q, k, v, block_mask=mask)

    args = qkv(rows=64, keys=64)
    program, out = captured(function, *args)
    close(out, function(*args))
    (note,) = program.notes
    assert attentions(program) == 1 and "blocks" in note and "test_flex.py" in note


def test_what_cannot_be_evaluated_everywhere_stays_and_that_is_said(monkeypatch):
    from fastpar.graph import flex as ours

    monkeypatch.setattr(ours, "written_out", _refusing)
    t = tensors()
    mask = block_mask("causal", t)
    program, out = captured(lambda q, k, v, t: attend(q, k, v, t, mask), *qkv(), t)
    close(out, attend(*qkv(), t, mask))
    (note,) = program.notes
    assert attentions(program) == 0 and "stays one operator" in note and "no rule for sorting" in note


def _refusing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("vmap: no rule for sorting")


# -- on N ranks ----------------------------------------------------------------------------


class Stack(nn.Module):
    """Residual flex attentions over tokens, each with other functions; some captured tensors are made of the tokens."""

    LAYERS: tuple[tuple[str | None, str | None, int], ...] = (
        ("documents", None, H),
        ("window", "alibi", 2),
        ("heads", "tensor", H),
        ("blind rows", "made", H),
        (None, "hidden", 2),
    )

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = H * E
        self.inner = nn.ModuleList(nn.Linear(width, (H + 2 * groups) * E) for *_, groups in self.LAYERS)
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in self.LAYERS)
        self.weigh = nn.Linear(width, H)

    def forward(self, x: torch.Tensor, t: Tensors, masks: dict[str, Any]) -> torch.Tensor:
        for inner, outer, (mask, score, groups) in zip(self.inner, self.outer, self.LAYERS, strict=True):
            sizes = [H * E, groups * E, groups * E]
            q, k, v = (y.unflatten(2, (-1, E)).transpose(1, 2) for y in inner(x).split(sizes, 2))
            mod = (BIASES | OTHERS).get(score or "")
            if score == "made":
                made = self.weigh(x)
                mod = lambda t, made=made: lambda s, b, h, i, j: s + made[b, i, h] * made[b, j, h]  # noqa: E731
            y = attend(q, k, v, t, masks.get(mask), mod, enable_gqa=groups != H)
            x = x + outer(y.transpose(1, 2).flatten(2))
        return x


class Capped(Stack):
    LAYERS = (("documents", "soft cap", H), (None, "soft cap", 2))


@lru_cache
def stack(kind: type[Stack]) -> fastpar.Captured:
    model = kind().double().eval().requires_grad_(False)
    gen = torch.Generator().manual_seed(2)
    t = tensors()
    args = torch.randn(B, S, H * E, generator=gen, dtype=F64), t, {name: block_mask(name, t) for name in MASKS}
    found = fastpar.capture(model, args)
    close(found.outputs, model(*args), 1e-11)
    return found


PLANS = "ulysses=2 ulysses=3 ring=3 torus=4 gather=5 ulysses=2,ring=2 torus=2,ring=2 tp=2 cfg=2".split()


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_splits_it(plan):
    report = fastpar.verify(stack(Stack), plan=plan)
    assert report.ok, (report.max_rel_err, report.diverged_at)
    assert report.flops_share <= 1.15 * report.attainable_share
    forced = {f.operator for f in report.fallbacks}
    # of what the scores are weighed with, the keys' rows must be there for every query, and nothing else
    assert forced <= {"aten::mul"} and "fastpar::attention" not in forced


@pytest.mark.parametrize("plan", ["ulysses=3", "ring=2", "tp=2"])
def test_written_out_it_is_split_by_rows(plan):
    report = fastpar.verify(stack(Capped), plan=plan)
    assert report.ok, (report.max_rel_err, report.diverged_at)
    assert report.flops_share <= 1.15 * report.attainable_share
    assert any("written out" in note for note in report.notes)


def test_naive_ranks_attend_to_their_own():
    report = fastpar.explain(stack(Stack), plan="naive=3")
    assert report.flops_share < 0.5 and not report.fallbacks


PARTS = {"gather=3": 1 / 3, "ring=3": 1 / 3, "ulysses=4": 1 / 4, "torus=4": 1 / 2}


@pytest.mark.parametrize("plan, most", PARTS.items())
def test_no_rank_makes_a_whole_mask_that_it_only_has_a_part_of(plan, most):
    """A mask is cut by rows. Under Ulysses a rank has all rows of its heads: one mask for all heads stays whole."""
    program = stack(Stack).programs[0].program.copy()
    parsed = Plan.parse(plan)
    mesh: Mesh = mesh_for(parsed, program.graph, ())
    program.mesh = mesh
    passes = pipeline_text(parsed).partition(",lower")[0]
    after = Pipeline.parse(passes, PASSES).run(program, PassContext(mesh=mesh))
    least = B * H * S * S if "ulysses" in plan or "torus" in plan else S * S
    made = [n for n in after.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    places = [n for n in made if n.meta["val"].shape[-2:] == (S, S) and n.meta["val"].numel() >= least]
    assert places
    for node in places:
        held = max(math.prod(node.meta["layout"].local_shape(mesh, r)) for r in range(mesh.ranks))
        assert held <= 1.1 * most * node.meta["val"].numel(), (node.name, node.target, node.meta["layout"])
