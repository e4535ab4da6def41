"""Real model classes of diffusers under every plan: exact on N virtual ranks, with the collectives they should have.

The full matrix (model x prompt length x size x dtype, each under plan x ranks) takes most of an hour and is marked
``slow``. The default run takes a seeded sample of it that covers pairs of values. A model is captured once for
all that is asked of it, which is why a test is one capture.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

import fastpar
from fastpar.run.build import build
from fastpar.sharding.candidates import is_attention
from tests.pairwise import greedy, pairs
from tests.zoo import CASES

pytestmark = pytest.mark.zoo

MODELS = {
    "FLUX.1": "FluxTransformer2DModel",
    "SD3": "SD3Transformer2DModel",
    "SD3.5": "SD3Transformer2DModel/dual",
    "Qwen-Image": "QwenImageTransformer2DModel",  # batch 2, prompts of unequal lengths
    "Wan": "WanTransformer3DModel",
    "CogVideoX": "CogVideoXTransformer3DModel",
    "HunyuanVideo": "HunyuanVideoTransformer3DModel",
    "PixArt": "PixArtTransformer2DModel",
    "Sana": "SanaTransformer2DModel",
    "DiT": "DiTTransformer2DModel",
    "LTX-Video": "LTXVideoTransformer3DModel",
    "HunyuanDiT": "HunyuanDiT2DModel",
    "Latte": "LatteTransformer3DModel",
}
PLANS = ("ulysses", "torus", "gather", "tp")
RANKS = (1, 2, 3, 4, 5, 8)  # most models of the zoo have 3 heads
TEXTS = (1, 77, 333)
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# "odd": token counts that no number of ranks divides; "even": that every one divides. Videos: frames first.
IMAGES = {"odd": (7, 11), "even": (8, 15)}
VIDEOS = {"odd": (7, 1, 11), "even": (4, 6, 5)}
LATTE = {"odd": (7, 7, 11), "even": (8, 6, 5)}  # it splits tokens of a frame or frames: both odd, or one even
SEED = 2024


class Capture(NamedTuple):
    """What is captured once. ``text`` is 0 where the model has no prompt."""

    model: str
    text: int
    size: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model}-text{self.text}-{self.size}-{self.dtype}"


class Row(NamedTuple):
    model: str
    text: int
    size: str
    dtype: str
    plan: str
    ranks: int


def captures() -> list[Capture]:
    """Every combination that a model can have."""
    out = []
    for model in MODELS:
        fixed = model == "DiT"  # learned positions, and labels instead of a prompt
        texts, sizes = ((0,), ("odd",)) if fixed else (TEXTS, tuple(IMAGES))
        out += [Capture(model, *rest) for rest in itertools.product(texts, sizes, DTYPES)]
    return out


# Those whose collectives are counted below; they are in the sample.
FLUX_EVEN = Capture("FLUX.1", 333, "even", "float64")  # 333 and 120 tokens, and 3 heads: on 3 ranks all is even
PIXART = Capture("PixArt", 333, "odd", "float64")
WAN = Capture("Wan", 333, "odd", "float32")
LATTE_ODD = Capture("Latte", 1, "odd", "float64")


@lru_cache
def sample() -> dict[Capture, list[tuple[str, int]]]:
    """Captures of the default run, one per model at least, and what each is verified under."""
    chosen = [FLUX_EVEN, PIXART, WAN, LATTE_ODD]
    for model in MODELS:
        if all(c.model != model for c in chosen):
            own = [c for c in captures() if c.model == model]
            chosen = greedy(own, most=len(chosen) + 1, seed=SEED, first=chosen)
    chosen = greedy(captures(), most=16, seed=SEED, first=chosen)
    rows = [Row(*c, plan, n) for c in chosen for plan in PLANS for n in RANKS]
    under: dict[Capture, list[tuple[str, int]]] = {c: [] for c in chosen}
    for row in greedy(rows, most=58, seed=SEED):
        under[Capture(*row[:4])].append((row.plan, row.ranks))
    return under


def rest() -> list[Capture]:
    """The slow matrix: float64 with every prompt, odd and even sizes; the other dtypes once per model."""
    return [c for c in captures() if c.dtype == "float64" or (c.text in (0, 77) and c.size == "odd")]


@lru_cache(maxsize=1)
def captured(c: Capture) -> fastpar.Captured:
    torch.set_num_threads(1)
    torch._dynamo.reset()
    case = CASES[MODELS[c.model]]
    sizes = LATTE if c.model == "Latte" else VIDEOS if case.family == "video" else IMAGES
    if "size" not in case.fixed:
        case = case.at(size=sizes[c.size])
    if c.text:
        case = case.at(text=c.text)
    dtype = DTYPES[c.dtype]
    return fastpar.capture(case.build(dtype), lambda: case.inputs(dtype))


def verified(c: Capture, under: list[tuple[str, int]]) -> list[str]:
    """One line for every plan under which the captured model is not what eager is."""
    failures = []
    for plan, n in under:
        report = fastpar.verify(captured(c), plan=f"{plan}={n}")
        if not report.ok:
            failures.append(f"{plan}={n}: {report.max_rel_err} > {report.tolerance}: {report.diverged_at}")
    return failures


@pytest.mark.parametrize("c", sample(), ids=str)
def test_sample(c: Capture) -> None:
    assert verified(c, sample()[c]) == []
    if c in COLLECTIVES:
        COLLECTIVES[c](c)
        assert rounded(c) == []


def rounded(c: Capture) -> list[str]:
    """One line for every plan that is not the same rounding on one device, or rounds nothing."""
    failures = []
    for plan in ("ulysses=3,fp8(qvo)", "torus=2,ring=2,fp8(qkvo)"):
        report = fastpar.verify(captured(c), plan=plan)
        if not report.ok or not 1e-6 < report.max_rel_err < 0.2:
            failures.append(f"{plan}: {report.max_rel_err} > {report.tolerance}: {report.notes}")
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("c", rest(), ids=str)
def test_matrix(c: Capture) -> None:
    assert verified(c, list(itertools.product(PLANS, RANKS))) == []


def test_what_the_sample_covers() -> None:
    """Every model under every plan, and all pairs of prompt, size, dtype, plan and ranks, within the allowance."""
    rows = [Row(*c, plan, n) for c, under in sample().items() for plan, n in under]
    seen = set().union(*map(pairs, rows))
    every = [Row(*c, plan, n) for c in captures() if c.text for plan in PLANS for n in RANKS]
    wanted = {p for p in set().union(*map(pairs, every)) if p[0] != 0 or p[2] == Row._fields.index("plan")}
    assert wanted - seen == set()
    assert all(sample().values()) and len(sample()) <= 16 and len(rows) <= 58


# -- the collectives that a model should have ---------------------------------------------------


def count(c: Capture, plan: str) -> dict[str, int]:
    """Collectives per step by what they are for."""
    out: dict[str, int] = {}
    for collective in fastpar.explain(captured(c), plan=plan).collectives:
        out[collective.why] = out.get(collective.why, 0) + collective.count
    return out


def lengths(c: Capture) -> list[tuple[int, int]]:
    """(queries, keys) of every attention."""
    graph = captured(c).programs[0].program.graph
    shapes = [[a.meta["val"].shape[-2] for a in n.args[:2]] for n in graph.nodes if is_attention(n)]
    return [(q, k) for q, k in shapes]


def cross_attention_needs_none(c: Capture) -> None:
    """Keys and values of the prompt are whole everywhere, so only self-attention communicates."""
    attentions = lengths(c)
    assert attentions.count((77, 77)) == attentions.count((77, c.text)) == 2
    assert count(c, "ulysses=3") == {"attention": 4 * 2, "output": 1}
    assert count(c, "gather=4") == {"attention": 2 * 2, "output": 1}


def one_of_space_and_time_needs_none(c: Capture) -> None:
    """Latte attends within a frame, then across frames: the one whose tokens are whole is local."""
    frames, tokens = 7, 77
    attentions = lengths(c)
    space, time = attentions.count((tokens, tokens)), attentions.count((frames, frames))
    assert space and time
    built = build(captured(c).programs[0].program, "ulysses=3")
    split = {n.meta["val"].shape[-2] for n in built.lowered.graph.nodes if n.meta.get("split_keys")}
    assert len(split) == 1
    expected = space if split == {tokens} else time
    assert count(c, "ulysses=3") == {"attention": 4 * expected, "output": 1}


def flux_sends_what_the_formula_says(c: Capture) -> None:
    report = fastpar.explain(captured(c), plan="ulysses=3")
    assert lengths(c) == [(453, 453)] * 4
    counts = {(x.kind, x.why): x.count for x in report.collectives}
    assert counts == {("all_to_all", "attention"): 4 * 4, ("all_gather", "output"): 1}
    assert report.fallbacks == []
    assert report.bytes_formula <= report.bytes_per_rank <= 1.05 * report.bytes_formula


COLLECTIVES = {
    FLUX_EVEN: flux_sends_what_the_formula_says,
    PIXART: cross_attention_needs_none,
    WAN: cross_attention_needs_none,
    LATTE_ODD: one_of_space_and_time_needs_none,
}

# -- masks of every broadcast shape ---------------------------------------------------------------

B, H, S, D = 2, 2, 11, 4
MASKS = {  # torch takes no mask of one dimension, in eager neither
    "1,Sk": (1, S),
    "Sq,Sk": (S, S),
    "B,1,1,Sk": (B, 1, 1, S),
    "B,1,Sq,Sk": (B, 1, S, S),
    "B,H,Sq,Sk": (B, H, S, S),
    "1,H,1,Sk": (1, H, 1, S),
}


class Attention(torch.nn.Module):
    """Projections, heads, masked attention, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(H * D, 3 * H * D)
        self.out = torch.nn.Linear(H * D, H * D)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (H, D)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS)
def test_masks(shape: str, kind: str) -> None:
    """The last query of a mask with a query dimension sees no key at all; on 8 ranks two have one row."""
    torch.manual_seed(0)
    model = Attention().double().requires_grad_(False)
    mask = torch.rand(MASKS[shape]) < 0.6
    mask[..., 0] = True  # at least one key for the others
    if "Sq" in shape:
        mask[..., -1, :] = False
    given = mask if kind == "bool" else torch.randn(MASKS[shape], dtype=torch.float64).masked_fill(~mask, -torch.inf)
    graphs = fastpar.capture(model, (torch.randn(B, S, H * D, dtype=torch.float64), given))
    for plan in ("ulysses=2", "ulysses=3", "gather=3", "ulysses=8", "gather=8"):
        report = fastpar.verify(graphs, plan=plan)
        assert report.ok, (plan, report.max_rel_err, report.diverged_at)
