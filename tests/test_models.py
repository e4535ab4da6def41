"""Real model classes of diffusers under every plan: exact on N virtual ranks, with the collectives they should have.

The full matrix (model x prompt length x size x dtype, each under every plan) takes hours and is marked ``slow``. The
default run takes a seeded sample of it that covers pairs of values. A model is captured once for all that is asked
of it, which is why a test is one capture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastpar
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text
from fastpar.run.build import build
from fastpar.sharding.candidates import is_attention
from tests.pairwise import Pair, greedy, pairs
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
TERMS = ("ulysses", "ring", "torus", "gather", "tp", "cfg")
# Most models of the zoo have 3 heads, and "odd" sizes have tokens that no number of ranks divides. All have a batch
# of 2, with prompts of unequal length where there is a mask. " on ...": placed by tests/topologies, which decides
# which of two axes joins neighbours.
PLANS = (
    "auto=4",
    *(f"ulysses={n}" for n in (1, 2, 3, 4, 5, 8)),
    *(f"ring={n}" for n in (2, 3, 4, 5, 8)),
    *(f"torus={n}" for n in (1, 2, 3, 4)),
    *(f"gather={n}" for n in (2, 3, 5)),
    *(f"tp={n}" for n in (2, 3, 4, 8)),
    "cfg=2",
    "ulysses=2,ring=2", "ulysses=4,ring=2", "ulysses=2,ring=4",
    "ulysses=2,ring=3 on machines-of-2", "ulysses=2,ring=3 on machines-of-3", "ulysses=3,ring=2 on machines-of-3",
    "torus=2,ring=2", "torus=3,ring=2", "torus=4,ring=2", "torus=2,ulysses=2", "torus=3,ulysses=2",
    "torus=2,ring=3 on machines-of-3",
    "cfg=2,ulysses=2", "cfg=2,ring=3", "cfg=2,torus=2", "cfg=2,gather=2",
    "ulysses=2,tp=2", "ring=2,tp=2", "torus=2,tp=2", "cfg=2,ulysses=2,tp=2",
)  # fmt: skip
TOPOLOGIES = Path(__file__).parent / "topologies"
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
    """A capture under a plan."""

    model: str
    text: int
    size: str
    dtype: str
    plan: str


def terms(plan: str) -> set[str]:
    """The terms that are in it, and whether they stand together."""
    found = {t for t in TERMS if f"{t}=" in plan.replace("=1", "")}
    return found | {"several"} if len(found) > 1 else found


def covers(row: Row) -> set[Pair]:
    """All pairs, but of model and plan only which terms the model meets; having no prompt (DiT) is no prompt length."""
    ours = {p for p in pairs(row) if (1, 0) not in (p[:2], p[2:]) and (p[0], p[2]) != (0, 4)}
    return ours | {(0, row.model, 4, term) for term in terms(row.plan)}


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


CAPTURES, ROWS = 16, 145  # what the default run may take


@lru_cache
def sample() -> dict[Capture, list[str]]:
    """Captures of the default run, one per model at least, and the plans that each is verified under."""
    chosen = [FLUX_EVEN, PIXART, WAN, LATTE_ODD]
    for model in MODELS:
        if all(c.model != model for c in chosen):
            own = [c for c in captures() if c.model == model]
            chosen = greedy(own, most=len(chosen) + 1, seed=SEED, first=chosen)
    chosen = greedy(captures(), most=CAPTURES, seed=SEED, first=chosen)
    rows = [Row(*c, plan) for c in chosen for plan in PLANS]
    under: dict[Capture, list[str]] = {c: [] for c in chosen}
    for row in greedy(rows, most=ROWS, seed=SEED, covers=covers):
        under[Capture(*row[:4])].append(row.plan)
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


def proved(c: Capture, plan: str) -> fastpar.Report:
    text, _, box = plan.partition(" on ")
    topology = str(TOPOLOGIES / f"{box}.toml") if box else None
    name, _, ranks = text.partition("=")
    if name == "auto":
        return fastpar.verify(captured(c), plan=name, ranks=int(ranks))
    return fastpar.verify(captured(c), plan=text, topology=topology)


def verified(c: Capture, plans: Iterable[str]) -> list[str]:
    """One line for every plan under which the captured model is not what eager is."""
    failures = []
    for plan in plans:
        report = proved(c, plan)
        if not report.ok:
            failures.append(f"{plan}: {report.max_rel_err} > {report.tolerance}: {report.diverged_at}")
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
    assert verified(c, PLANS) == []


def test_what_the_sample_covers() -> None:
    """Every model under every term, and all pairs of prompt, size, dtype and plan, within the allowance."""
    rows = [Row(*c, plan) for c, under in sample().items() for plan in under]
    seen = set().union(*map(covers, rows))
    every = [Row(*c, plan) for c in captures() for plan in PLANS]
    column = Row._fields.index
    free = (column("text"), column("size"), column("dtype"))  # of a model only what two captures of it can have
    wanted = {p for p in set().union(*map(covers, every)) if p[0] != column("model") or p[2] not in free}
    assert wanted - seen == set()
    assert all(sample().values()) and len(sample()) <= CAPTURES and len(rows) <= ROWS


def test_a_topology_decides_which_axis_joins_neighbours() -> None:
    """Else the plans that are placed would prove one order twice."""
    program = captured(FLUX_EVEN).programs[0].program

    def mesh(plan: str) -> tuple[str, ...]:
        text, _, box = plan.partition(" on ")
        return build(program, text, topology=str(TOPOLOGIES / f"{box}.toml")).mesh.names

    assert mesh("ulysses=2,ring=3 on machines-of-2") == mesh("ulysses=3,ring=2 on machines-of-3") == ("ring", "ulysses")
    assert mesh("ulysses=2,ring=3 on machines-of-3") == ("ulysses", "ring")
    assert proved(FLUX_EVEN, "ulysses=2,ring=3 on machines-of-3").ok


# -- the collectives that a model should have ---------------------------------------------------


def count(c: Capture, plan: str, pack: bool = False) -> dict[str, int]:
    """Collectives per step by what they are for, as written; or with those of one place in one."""
    out: dict[str, int] = {}
    passes = pipeline_text(Plan.parse(plan), schedule=False) + ",pack" * pack
    for collective in fastpar.explain(captured(c), plan=plan, passes=passes).collectives:
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
    assert count(c, "ulysses=3", pack=True) == {"attention": 2 * 2, "output": 1}
    assert count(c, "gather=4") == {"attention": 2 * 2, "output": 1}
    assert count(c, "gather=4", pack=True) == {"attention": 2, "output": 1}


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
    assert count(c, "ulysses=3") == {"attention": 4 * 4, "output": 1}
    assert count(c, "ulysses=3", pack=True) == {"attention": 4 * 2, "output": 1}
    assert {(x.kind, x.why) for x in report.collectives} == {("all_to_all", "attention"), ("all_gather", "output")}
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
