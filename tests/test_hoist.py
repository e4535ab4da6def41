"""Hoisting: what stays the same between steps is computed once per generation and stream, and results stay right.

Every call is held against the model run plainly, and the programs that ran are counted.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpar
import fastpar.backend as backend
from fastpar.core.plan import Plan
from fastpar.graph.pipeline import Pipeline
from fastpar.graph.prologue import split
from fastpar.ops.collectives import COLLECTIVES
from fastpar.plan.expand import pipeline_text
from fastpar.registry import PASSES
from fastpar.run.artefact import Artefact
from fastpar.run.build import build
from fastpar.run.stream import PATIENCE, STREAMS, Streams, current_generation
from tests.test_replicas import torchrun

torch.set_num_threads(1)


class Denoiser(nn.Module):
    """Cross-attention to a projected prompt, with positions; the prompt can be refined by attention of its own."""

    def __init__(self, depth: int = 2, refine: bool = False) -> None:
        super().__init__()
        self.caption, self.time = nn.Linear(6, 12), nn.Linear(1, 12)
        self.q, self.kv, self.out = (nn.ModuleList(nn.Linear(12, n) for _ in range(depth)) for n in (12, 24, 12))
        self.refine = nn.Linear(12, 36) if refine else None

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        x = x + torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None].sin() + self.time(t[:, None])[:, None]
        text = F.silu(self.caption(prompt))
        if self.refine is not None:
            q, k, v = (self._heads(y) for y in self.refine(text).chunk(3, -1))
            text = text + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for q, kv, out in zip(self.q, self.kv, self.out, strict=True):
            k, v = (self._heads(y) for y in kv(text).chunk(2, -1))
            x = x + out(F.scaled_dot_product_attention(self._heads(q(x)), k, v).transpose(1, 2).flatten(2))
            x = x + F.scaled_dot_product_attention(*[self._heads(x)] * 3).transpose(1, 2).flatten(2)
        return x

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)


def denoiser(**options: Any) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(**options).double().eval().requires_grad_(False)


def prompt(seed: int, tokens: int = 5) -> Tensor:
    return torch.randn(1, tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


_seeds = itertools.count()


def sample(rows: int = 9) -> tuple[Tensor, Tensor]:
    """A new sample and time, as every step has them."""
    rng = torch.Generator().manual_seed(next(_seeds))
    x = torch.randn(1, rows, 12, dtype=torch.float64, generator=rng)
    return x, torch.rand(1, dtype=torch.float64, generator=rng)


class Watched:
    """A model compiled for one rank; every call is compared with the model itself, programs are counted."""

    def __init__(self, model: nn.Module, made: list[Artefact], lowering: str = "eager", **options: Any) -> None:
        self.model, self.made, self.mine = model, made, len(made)
        torch._dynamo.reset()
        options = {"plan": "ulysses=1", "lowering": lowering, **options}
        self.compiled = torch.compile(model, backend="fastpar", options=options)
        self.ran: Counter[str] = Counter()

    def __call__(self, *args: Any) -> Tensor:
        with torch.no_grad():
            before = torch.random.get_rng_state()
            expected = self.model(*args)
            after = torch.random.get_rng_state()
            torch.random.set_rng_state(before)
            found = self.compiled(*args)
            assert torch.equal(torch.random.get_rng_state(), after)
        self.count()
        for a, b in zip(found if isinstance(found, tuple) else (found,),
                        expected if isinstance(expected, tuple) else (expected,), strict=True):  # fmt: skip
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()
        return found

    def count(self) -> None:
        """Programs are watched from the call on that compiled them: that one is not counted."""
        for artefact in self.made[self.mine :]:
            if getattr(artefact, "watched", None) is not artefact.programs:
                artefact.programs = {k: self._counting(k, run) for k, run in artefact.programs.items()}
                artefact.watched = artefact.programs  # type: ignore[attr-defined]

    def _counting(self, name: str, run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        def counted(args: list[Any]) -> Any:
            self.ran[name] += 1
            return run(args)

        return counted

    def took(self, **expected: int) -> None:
        """Exactly these programs ran since this was last asked."""
        assert dict(self.ran) == expected
        self.ran.clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Artefact]]:
    """Artefacts in the order in which they were compiled."""
    found: list[Artefact] = []
    make = backend.artefact_of

    def keep(*args: Any) -> Artefact:
        found.append(make(*args))
        return found[-1]

    monkeypatch.setattr(backend, "artefact_of", keep)
    yield found


@pytest.fixture
def watched(made: list[Artefact]) -> Watched:
    """The small denoiser, compiled, with one prompt of its own behind it."""
    found = Watched(denoiser(), made)
    found(*sample(), prompt(99))
    return found


# -- the pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hoist", "hoist{varying=x:t}", "hoist{varying=(added.0)}", "hoist{limit=3}",
                                  "hoist{varying=()}", "hoist{varying=x:t,limit=0}"])  # fmt: skip
def test_its_text_round_trips(text: str) -> None:
    assert str(Pipeline.parse(text, PASSES)) == text


@pytest.mark.parametrize("plan", ["ulysses=2", "ulysses=3", "ring=2", "gather=2", "torus=2,ring=2", "cfg=2,ulysses=2",
                                  "tp=2"])  # fmt: skip
@pytest.mark.parametrize("refine", [False, True])
def test_every_plan_hoists_and_is_exact(plan: str, refine: bool) -> None:
    inputs = (torch.randn(2, 9, 12).double(), torch.rand(2).double(), torch.randn(2, 5, 6).double())
    report = fastpar.verify(denoiser(refine=refine), inputs, plan=plan)
    assert report.ok, report.diverged_at
    assert report.hoisted.varying == ("x", "t") and report.hoisted.flops_share > 0.02
    assert report.hoisted.values >= 2 and report.hoisted.kept_bytes > 0
    given = report.to_dict()
    assert given["hoisted"]["flops_share"] + given["step_flops_share"] == pytest.approx(report.flops_share)
    assert report.step_collectives == sum(c.count for c in report.collectives) - report.hoisted.collectives


def test_what_is_sent_for_the_prompt_goes_too() -> None:
    """The refiner's attention splits the prompt, so that its keys, values and rows travel: once."""
    found = fastpar.explain(denoiser(refine=True), (*sample(), prompt(0, 64)), plan="ulysses=2")
    assert found.hoisted.collectives > 0 and found.hoisted.bytes > 0
    assert found.step_bytes_per_rank == found.bytes_per_rank - found.hoisted.bytes > 0
    whole = fastpar.explain(denoiser(refine=True), (*sample(), prompt(0, 64)), plan="ulysses=2",
                            passes=pipeline_text(Plan.parse("ulysses=2")).replace(",hoist", ""))  # fmt: skip
    assert whole.hoisted.values == 0 and whole.flops_share == pytest.approx(found.flops_share)
    assert whole.bytes_per_rank == found.bytes_per_rank


def lowered(model: nn.Module, inputs: tuple[Any, ...], plan: str = "ulysses=2", hoist: str = "hoist") -> Any:
    recorded = fastpar.capture(model, inputs).programs[0]
    text = pipeline_text(Plan.parse(plan), schedule=False).removesuffix("hoist")
    return build(recorded.program, plan, passes=text + hoist).lowered


def test_views_copies_and_other_forms_of_a_weight_are_not_kept() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(-9, 9, (24, 6), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(24, 1).double())

        def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
            k, v = F.linear(prompt, self.weight.double() * self.scale).unflatten(-1, (2, 2, 6)).permute(2, 0, 3, 1, 4)
            k, v = k.expand(3, -1, -1, -1).contiguous(), v.expand(3, -1, -1, -1)
            rows = F.linear(x[..., :6], self.weight.double() * self.scale)[..., :12]
            q = rows.unflatten(-1, (2, 6)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    inputs = (torch.randn(3, 8, 12).double(), torch.randn(1, 5, 6).double())
    parts = split(lowered(Quantised(), inputs, hoist="hoist{always=true}"))
    assert parts is not None
    kept = parts.prologue.outputs
    assert [tuple(n.meta["val"].shape) for n in kept] == [(5, 24)]  # the product: neither its halves nor their copies
    assert "aten.mul.Tensor" in {str(n.target) for n in parts.step.graph.nodes}  # dequantised on every call


def test_the_limit_bounds_what_is_kept_and_is_exact() -> None:
    model, inputs = denoiser(), (*sample(), prompt(0))
    some = fastpar.verify(model, inputs, plan="ulysses=2")
    none = fastpar.verify(model, inputs, plan="ulysses=2", passes="shard,attention-ulysses,cancel,lower,hoist{limit=0}")
    assert some.ok and none.ok
    assert some.hoisted.values > 0 and none.hoisted.values == 0 == none.hoisted.flops_share


def test_varying_inputs_can_be_named_and_unknown_ones_are_said() -> None:
    model, inputs = denoiser(), (*sample(), prompt(0))
    report = fastpar.verify(model, inputs, plan="ulysses=2",
                            passes="shard,attention-ulysses,cancel,lower,hoist{varying=x:t:prompt:promt}")  # fmt: skip
    assert report.ok and report.hoisted.flops_share == 0
    assert any("promt not among the inputs of this graph: x, t, prompt" in n for n in report.notes)


def test_an_exchange_of_fixed_and_varying_values_is_divided() -> None:
    from fastpar.ops.collectives import all_to_all

    program = lowered(denoiser(refine=True), (*sample(), prompt(0, 64)), "ring=2", "hoist")
    for node in program.graph.nodes:
        if node.target is all_to_all:
            assert len({bool(x.meta.get("hoisted")) for x in node.args[0]}) == 1
    once = [n for n in program.graph.nodes if n.target in COLLECTIVES and n.meta.get("hoisted")]
    assert once


def test_the_sample_is_told_from_what_stays() -> None:
    class Takes(nn.Module):
        def forward(self, latents: Tensor, residual: Tensor, t: Tensor, size: int, text: Tensor, ids: Tensor) -> Tensor:
            return latents[:, :4] + residual + t.view(-1, 1, 1, 1) * size + text.mean() + ids.sum()

    shapes = ((2, 9, 8, 8), (2, 4, 8, 8), (2,))
    latents, residual, t = (torch.randn(s) for s in shapes)
    program = lowered(Takes(), (latents, residual, t, 3, torch.randn(2, 5, 6), torch.randn(64, 3)), "ulysses=1")
    assert set(program.gm.meta["varying"]) >= {"latents", "residual", "t"}
    assert not {"text", "ids"} & set(program.gm.meta["varying"])


# -- generations and streams ----------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2, 3, STREAMS])
@pytest.mark.parametrize("inside", [False, True])
def test_calls_per_step(watched: Watched, calls: int, inside: bool) -> None:
    prompts = [prompt(i) for i in range(calls)]
    watched.took()
    with fastpar.generation() if inside else contextlib.nullcontext():
        for _ in range(3):
            x, t = sample()
            for p in prompts:
                watched(x, t, p)
    watched.took(prologue=calls, step=3 * calls, check=3 * calls)


def test_without_a_generation_inputs_decide(watched: Watched) -> None:
    for seed in (1, 2):  # two runs with a prompt each
        given = prompt(seed)
        for _ in range(3):
            watched(*sample(), given)
    watched.took(prologue=2, step=6, check=6)


def test_values_never_cross_a_generation_and_are_freed_with_it(watched: Watched) -> None:
    p = prompt(1)
    run = fastpar.generation()
    with run:
        watched(*sample(), p)
    (stream,) = next(iter(run._kept.values())).kept
    held = [weakref.ref(v) for v in stream.values or ()]
    assert held
    del stream, run
    gc.collect()
    assert all(ref() is None for ref in held)
    with fastpar.generation():
        watched(*sample(), p)
    watched.took(prologue=2, step=2, check=2)


def test_interleaved_runs(watched: Watched) -> None:
    runs = [(fastpar.generation(), prompt(i)) for i in range(2)]
    for _ in range(3):
        for run, p in runs:
            with run:
                watched(*sample(), p)
    watched.took(prologue=2, step=6, check=6)


def test_an_aborted_run(watched: Watched) -> None:
    ps = [prompt(0), prompt(1)]
    with pytest.raises(KeyboardInterrupt), fastpar.generation():
        watched(*sample(), ps[0])
        watched(*sample(), ps[1])
        watched(*sample(), ps[0])
        raise KeyboardInterrupt
    with fastpar.generation():
        for _ in range(2):
            for p in ps:
                watched(*sample(), p)
    watched.took(prologue=4, step=7, check=7)


def test_two_models_in_turn(made: list[Artefact]) -> None:
    """As Wan 2.2 has one for the noisy half of the steps."""
    one = Watched(denoiser(), made)
    one(*sample(), prompt(9))
    two = Watched.__new__(Watched)
    two.model, two.made, two.mine, two.ran = denoiser(depth=1), made, len(made), Counter()
    two.compiled = torch.compile(two.model, backend="fastpar", options={"plan": "ulysses=1"})
    two(*sample(), prompt(9))
    p = prompt(0)
    with fastpar.generation():
        for i in range(6):
            (one if i % 2 else two)(*sample(), p)
    one.took(prologue=1, step=3, check=3)
    two.took(prologue=1, step=3, check=3)


# -- what changes without a trace -----------------------------------------------------------------


def settled(watched: Watched, p: Tensor) -> None:
    """Two calls with ``p``, after which its values are kept."""
    for _ in range(2):
        watched(*sample(), p)
    watched.took(prologue=1, step=2, check=2)


def test_a_write_through_data_is_noticed(watched: Watched) -> None:
    p = prompt(0)
    settled(watched, p)
    version = p._version
    p.data.mul_(-1)
    assert p._version == version
    watched(*sample(), p)
    watched.took(prologue=1, step=2, check=1)  # tried with what was kept, and again
    p.data = prompt(3)  # the same object with other memory
    watched(*sample(), p)
    watched.took(prologue=1, step=2, check=1)
    watched(*sample(), p)
    watched.took(step=1, check=1)


def test_a_write_that_is_counted_is_not_even_tried(watched: Watched) -> None:
    p = prompt(0)
    settled(watched, p)
    p.copy_(prompt(1))
    watched(*sample(), p)
    watched.took(prologue=1, step=1, check=1)
    assert len([s for s in current_generation().kept(watched.made[-1].select, Streams).kept
                if s.values is not None]) == 1  # fmt: skip


def test_a_lora_is_merged_and_unmerged(watched: Watched) -> None:
    p, layer = prompt(0), watched.model.kv[1]
    settled(watched, p)
    delta = torch.outer(torch.randn(24), torch.randn(12)).double()
    version = layer.weight._version
    for sign in (1, -1):
        layer.weight.data += sign * delta
        assert layer.weight._version == version
        watched(*sample(), p)
        watched.took(prologue=1, step=2, check=1)
        watched(*sample(), p)
        watched.took(step=1, check=1)


def test_a_weight_that_only_the_step_reads_does_not_matter(watched: Watched) -> None:
    p = prompt(0)
    settled(watched, p)
    watched.model.out[0].weight.data += 1
    watched(*sample(), p)
    watched.took(step=1, check=1)


def test_inference_mode(watched: Watched) -> None:
    with torch.inference_mode():
        p = prompt(0)
        watched(*sample(), p)  # compiles once more
        watched.count()
        watched.ran.clear()
        watched(*sample(), p)
        watched.took(step=1, check=1)
        p.copy_(prompt(1))  # no version
        watched(*sample(), p)
        watched.took(prologue=1, step=2, check=1)


def test_a_new_tensor_at_an_old_address_is_another_one(watched: Watched) -> None:
    p = prompt(0)
    settled(watched, p)
    stream = current_generation().kept(watched.made[-1].select, Streams).kept[-1]
    memory = p.untyped_storage()
    del p
    gc.collect()
    assert stream.values is None  # no call can come with it: let go at once
    new = torch.empty(0, dtype=torch.float64).set_(memory, 0, (1, 5, 6), (30, 6, 1))
    new.copy_(prompt(1))
    watched(*sample(), new)
    watched.took(prologue=1, step=1, check=1)


def test_a_buffer_of_another_graph_is_the_same_tensor_with_new_content(watched: Watched) -> None:
    """As results of CUDA graphs are. It changes on every call, so that it is not tried for ever."""
    static, encode = torch.zeros(1, 5, 6, dtype=torch.float64), nn.Linear(6, 6).double()
    settled(watched, static)

    def replay(seed: int) -> None:
        with torch.no_grad():
            static.data.copy_(encode(prompt(seed)))

    for seed in range(PATIENCE):
        replay(seed)
        watched(*sample(), static)
    watched.took(prologue=PATIENCE, step=2 * PATIENCE, check=PATIENCE)
    watched.count()
    for seed in (100, 101):
        replay(seed)
        watched(*sample(), static)
    watched.took(prologue=1, step=2)  # of the positions, which need no check


def test_an_input_that_is_always_another_one_varies_from_then_on(watched: Watched) -> None:
    """The positions stay; only what depends on the prompt goes back into the step. Nothing is captured anew."""
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with fastpar.generation():
        for seed in range(PATIENCE + 2):
            watched(*sample(), prompt(seed))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles
    watched.took(prologue=PATIENCE + 1, step=PATIENCE + 2, check=PATIENCE)  # the last two: positions only
    assert [spec.shape for spec in watched.made[0].state] == [(9, 1)]
    assert watched.made[0].programs.keys() == {"prologue", "step"}


def test_new_resolutions_and_prompts(watched: Watched) -> None:
    for rows, tokens in ((9, 5), (11, 5), (11, 7), (9, 5)):
        p = prompt(rows, tokens)
        for _ in range(2):
            watched(*sample(rows), p)


def test_results_are_the_callers_own(made: list[Artefact]) -> None:
    """A model that returns what is hoisted: writing into it does not reach what is kept."""

    class Returns(Denoiser):
        def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            text = self.caption(prompt)
            return super().forward(x, t, prompt), text, F.silu(text)[:, 1:]

    torch.manual_seed(0)
    watched = Watched(Returns().double().eval().requires_grad_(False), made)
    p = prompt(0)
    for _ in range(4):
        for result in watched(*sample(), p):
            result.zero_()


def test_a_step_that_draws_is_not_tried(made: list[Artefact]) -> None:
    """It would draw twice: the generator must be where eager leaves it."""

    class Draws(Denoiser):
        def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x), t, prompt) + torch.rand_like(x)

    torch.manual_seed(0)
    watched = Watched(Draws().double().eval().requires_grad_(False), made)
    p = prompt(0)
    for change in (False, False, True, False):
        if change:
            p.data.mul_(2)
        watched(*sample(), p)
    watched.took(prologue=1, step=3, check=3)


@pytest.mark.slow
def test_inductor_compiles_both_programs(made: list[Artefact]) -> None:
    watched = Watched(denoiser(), made, lowering="inductor")
    p = prompt(0)
    watched(*sample(), p)
    assert set(made[0].programs) == {"prologue", "step", "check"}
    watched(*sample(), p)
    watched.took(step=1, check=1)
    p.data.mul_(-1)
    watched(*sample(), p)
    watched.took(prologue=1, step=2, check=1)


# -- processes ------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_on_two_processes() -> None:
    """A broadcast into the same tensor, LoRA, prompts that always change, calls that are dealt, weights in parts,
    and in parts of which one changes."""
    plans = ["ulysses=2", "ulysses=2+columns", "tp=2+shards", "cfg=2", "ulysses=2+one-sided", "tp=2+shards+one-sided"]
    printed = torchrun(*plans, script="tests.scripts.generations", ranks=2)
    assert printed.count("off by") == 2 * len(plans)
