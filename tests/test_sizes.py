"""Graphs in which tensors decide sizes: one program per set of sizes, and a split where reading them would not do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpar
from fastpar.core.errors import CaptureError
from fastpar.graph import sizes
from fastpar.graph.capture import compile_fx
from fastpar.graph.program import Program
from fastpar.graph.sizes import Sized
from fastpar.graph.unbroken import unbroken

PLANS = ("ulysses=3", "gather=2", "ring=2", "ulysses=2,ring=2", "torus=2,ring=2", "tp=2", "cfg=2")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(model: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[Program]]:
    """``model`` compiled to run its graphs as they are, and the programs that were made of it."""
    programs: list[Program] = []

    @unbroken
    def backend(gm: Any, example: Any) -> Any:
        def finish(program: Program) -> Any:
            programs.append(program)
            return lambda args: program.gm(*args)

        return compile_fx(gm, example, finish)

    return torch.compile(model, backend=backend, **options), programs


class Unpadded(nn.Module):
    """Joint attention as Mochi's: of each prompt only the tokens that count take part, one after the other."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.qkv_text = (nn.Linear(width, 3 * width, dtype=torch.float64) for _ in range(2))
        self.out = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

        image, prompt, results = heads(self.qkv(x)), heads(self.qkv_text(text)), []
        for i in range(x.shape[0]):
            counts = torch.nonzero(mask[i].flatten(), as_tuple=False).flatten()
            q, k, v = torch.cat([image[:, i : i + 1], prompt[:, i : i + 1, :, counts]], dim=3)
            mixed = F.scaled_dot_product_attention(q, k, v)
            results.append(F.pad(mixed, (0, 0, 0, x.shape[1] + text.shape[1] - mixed.shape[2])))
        mixed = torch.cat(results).transpose(1, 2).flatten(2)
        return x + self.out(mixed[:, : x.shape[1]]) + self.out(mixed[:, x.shape[1] :]).sum(1, keepdim=True)


def prompts(*lengths: int, tokens: int = 5) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def given(*lengths: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 10, 8).double(), torch.randn(2, 5, 8).double(), prompts(*lengths)


def test_attention_over_the_tokens_that_count_is_one_program_and_split():
    captured = fastpar.capture(Unpadded(), given(3, 2))
    assert len(captured.programs) == 1
    for plan in PLANS:
        report = fastpar.verify(captured, plan=plan)
        assert report.ok and report.max_rel_err < 1e-12, plan
    report = fastpar.explain(captured, plan="ulysses=2")
    assert report.flops_share < 1.05 * report.attainable_share < 0.65
    attentions = [c for c in report.collectives if c.why == "attention"]
    assert sum(c.count for c in attentions) == 3  # there for each of the two prompts, and back for both


def test_one_program_for_each_set_of_sizes_whatever_rows_they_are():
    model = Unpadded()
    run, programs = compiled(model)
    for lengths, made in ((3, 2), 1), ((3, 2), 1), ((2, 3), 2), ((0, 5), 3), ((3, 2), 3):
        inputs = given(*lengths)
        assert torch.allclose(run(*inputs), model(*inputs), atol=1e-12)
        assert len(programs) == made
    x, text, _ = given(3, 2)
    for mask in prompts(3, 2).flip(-1), prompts(3, 2)[:, torch.tensor([0, 2, 4, 1, 3])]:
        assert torch.allclose(run(x, text, mask), model(x, text, mask), atol=1e-12)
    assert len(programs) == 3
    longer = torch.randn(2, 13, 8).double()  # Dynamo then has symbols for what it knows as well
    assert torch.allclose(run(longer, text, prompts(3, 2)), model(longer, text, prompts(3, 2)), atol=1e-12)


def test_programs_that_were_not_used_for_long_are_let_go(monkeypatch: pytest.MonkeyPatch):
    """Prompts come in more lengths than there is memory for."""
    monkeypatch.setattr(sizes, "_PROGRAMS", 2)
    made: list[weakref.ref[Program]] = []

    @unbroken
    def backend(gm: Any, example: Any) -> Any:
        def finish(program: Program) -> Any:
            made.append(weakref.ref(program))
            return lambda args: program.gm(*args)

        return compile_fx(gm, example, finish)

    model = Unpadded()
    run = torch.compile(model, backend=backend)
    for length, count in (1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (1, 4):
        inputs = given(length, 2)
        assert torch.allclose(run(*inputs), model(*inputs), atol=1e-12)
        assert len(made) == count
    gc.collect()
    assert [program() is not None for program in made] == [True, False, False, True]


def test_ranks_run_whole_graphs_under_every_lowering():
    model, inputs = Unpadded(), given(4, 1)
    for plan in PLANS:
        for out in fastpar.simulate(model, inputs, plan=plan):
            assert torch.allclose(out, model(*inputs), atol=1e-12)
    options = {"plan": "ulysses=1", "lowering": "inductor"}
    whole = torch.compile(model, backend="fastpar", options=options, fullgraph=True)
    for lengths in (4, 1), (2, 2):
        inputs = given(*lengths)
        assert torch.allclose(whole(*inputs), model(*inputs), atol=1e-12)


def reordered(text: Tensor, mask: Tensor) -> Tensor:
    """Tokens that count first, as HunyuanVideo 1.5 has them; rows that a mask picks are written as well."""
    text = torch.stack([torch.cat([t[m], torch.zeros_like(t[~m])]) for t, m in zip(text, mask, strict=True)])
    text[mask] = text[mask] * 2 + 1
    return text @ text.transpose(1, 2)


def test_rows_that_a_mask_picks():
    captured = fastpar.capture(reordered, (torch.randn(2, 5, 4).double(), prompts(3, 1).flip(-1)))
    assert len(captured.programs) == 1
    for plan in "gather=2", "gather=3", "cfg=2":
        assert fastpar.verify(captured, plan=plan).ok


def test_a_number_is_a_constant_only_where_it_decides_a_size():
    def fn(x: Tensor, step: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        return x[:, :longest] * step.item() + torch.zeros(longest)

    run, programs = compiled(fn)
    x = torch.randn(2, 8)
    for step in 5, 3, 900, 1, 0:
        out = run(x, torch.tensor(step), torch.tensor([4, 6]))
        assert torch.equal(out, x[:, :6] * step)
    assert len(programs) == 1
    assert run(x, torch.tensor(7), torch.tensor([2, 1])).shape == (2, 2)
    assert len(programs) == 2


def test_a_number_among_the_arguments_stays_one():
    def fn(x: Tensor, mask: Tensor, step: int, scale: float) -> Tensor:
        return x[mask] * step + scale

    run, programs = compiled(fn, dynamic=True)
    x, mask = torch.randn(5, 3), prompts(3)[0]
    for step, scale in (7, 0.5), (3, 0.25), (900, 1.5):
        assert torch.allclose(run(x, mask, step, scale), fn(x, mask, step, scale))
    assert len(programs) == 1


def test_a_number_that_a_mask_is_made_of():
    def fn(x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.zeros(2, 8, dtype=torch.bool)
        for i in range(2):
            mask[i, : lengths[i]] = True
        return F.scaled_dot_product_attention(x, x, x, mask[:, None, None])

    x = torch.randn(2, 2, 8, 4).double()
    captured = fastpar.capture(fn, (x, torch.tensor([3, 7])))
    assert len(captured.programs) == 1
    assert fastpar.verify(captured, plan="ulysses=2").ok


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(4, 1).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        chosen = (self.gate(x)[:, 0] > 0).nonzero()[:, 0]
        return x.index_add(0, chosen, self.expert(x[chosen]))


def drawn(x: Tensor) -> Tensor:
    return x[torch.rand(6) > 2] + x.sum()


def overwritten(x: Tensor) -> Tensor:
    mask = x[:, 0] > 0
    mask[0] = True
    return x[mask] * 2


def scaled(x: Tensor) -> Tensor:
    return x * x.max().item()


def listed(x: Tensor) -> Tensor:
    """Dynamo itself has an error here, with its options for sizes on."""
    ids = torch.arange(6)[: int((x[:, 0] < 9).sum())].tolist()
    return x[ids[::-1]]


@pytest.mark.parametrize("make", [Router, lambda: drawn, lambda: overwritten, lambda: scaled, lambda: listed])
def test_reads_that_cannot_come_first_split_the_graph(make: Callable[[], Callable[..., Any]]):
    fn = make()
    x = torch.randn(6, 4).double()
    run, programs = compiled(fn)
    assert torch.allclose(run(x), fn(x), atol=1e-12)
    assert torch.allclose(run(-x), fn(-x), atol=1e-12)
    captured = fastpar.capture(fn, (x,))
    assert len(captured.programs) > 1 and len(programs) > 1
    assert torch.allclose(captured.outputs, fn(x), atol=1e-12)


def test_other_backends_and_options_are_left_alone():
    def fn(mask: Tensor) -> Tensor:
        return mask.nonzero() + 1

    graphs = []

    def other(gm: Any, example: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled(fn)[0](prompts(3, 2))
    assert not torch._dynamo.config.capture_dynamic_output_shape_ops
    assert not torch._dynamo.config.capture_scalar_outputs
    mask = prompts(1, 4)
    assert torch.equal(torch.compile(fn, backend=other)(mask), fn(mask))
    assert not any(n.meta.get("unbacked_bindings") for gm in graphs for n in gm.graph.nodes)


def test_fake_tensors_have_no_values_to_read():
    with torch._subclasses.FakeTensorMode(), pytest.raises(CaptureError, match="fake tensors have none"):
        fastpar.capture(reordered, (torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)))


def test_a_model_on_fake_tensors_is_planned_with_real_masks():
    x, text, mask = given(3, 2)
    plain = fastpar.explain(Unpadded(), (x, text, mask), plan="ulysses=3")
    with torch._subclasses.FakeTensorMode() as mode:
        model = Unpadded()
    for other in mode.from_tensor(x), x:  # what is real beside the weights stands for itself
        report = fastpar.explain(model, (other, mode.from_tensor(text), mask), plan="ulysses=3")
        assert report.graphs == 1
        assert report.bytes_per_rank == plain.bytes_per_rank and report.flops_share == plain.flops_share
    with pytest.raises(CaptureError, match="give masks and integers as real tensors"):
        fastpar.capture(model, (x, text, mode.from_tensor(mask)))


def test_masks_that_come_again_are_read_once(monkeypatch: pytest.MonkeyPatch):
    model, reads = Unpadded(), []
    run, programs = compiled(model)
    x, text, mask = given(3, 2)
    run(x, text, mask)
    plain = Sized.read
    monkeypatch.setattr(Sized, "read", lambda self, args: reads.append(1) or plain(self, args))
    other = prompts(5, 4)
    for step in range(3):
        for prompt in mask, other:
            assert torch.allclose(run(x + step, text, prompt), model(x + step, text, prompt), atol=1e-12)
    assert len(reads) == 1  # the other one
    mask[0, 3] = True
    assert torch.allclose(run(x, text, mask), model(x, text, mask), atol=1e-12)
    assert len(reads) == 2 and len(programs) == 3
    with torch.inference_mode():
        for _ in range(2):
            fleeting = prompts(2, 2)
            assert torch.allclose(run(x, text, fleeting), model(x, text, fleeting), atol=1e-12)
            fleeting[0] = fleeting[1] = True  # nothing tells that it was written to
            assert torch.allclose(run(x, text, fleeting), model(x, text, fleeting), atol=1e-12)


def test_rows_that_are_changed_where_a_mask_says_are_not_read():
    def fn(x: Tensor, drop: Tensor, rows: Tensor) -> Tensor:
        x = x * 2
        x[drop] *= 0.0
        x[rows] = 1 - x[rows] / 4
        return x @ x.transpose(1, 2)

    x, rows = torch.randn(3, 6, 4).double(), torch.rand(3, 6) > 0.5
    run, programs = compiled(fn)
    for drop in ([True, False, True], [False, False, False]):
        mask = torch.tensor(drop)
        assert torch.allclose(run(x, mask, rows), fn(x, mask, rows), atol=1e-12)
    assert len(programs) == 1
    captured = fastpar.capture(fn, (x, torch.tensor([True, False, True]), rows))
    for plan in "gather=2", "cfg=2", "gather=4":
        report = fastpar.verify(captured, plan=plan)
        assert report.ok and not report.fallbacks

    def since(x: Tensor, drop: Tensor) -> Tensor:
        x = x * 2
        rows = x[drop] + 1
        x.add_(5)
        x[drop] = rows
        return x

    captured = fastpar.capture(since, (x, torch.tensor([True, False, True])))
    assert torch.allclose(captured.outputs, since(x, torch.tensor([True, False, True])))


def test_numbers_of_numpy_among_attributes_are_numbers():
    class Level(nn.Module):
        def __init__(self, i: int) -> None:
            super().__init__()
            self.down, self.width = i < np.log2(4), np.int64(3)

        def forward(self, x: Tensor) -> Tensor:
            return x[:, : self.width] * 2 if self.down else x + 1

    model, x = nn.Sequential(Level(0), Level(3)), torch.randn(2, 8)
    captured = fastpar.capture(model, (x,))
    assert len(captured.programs) == 1
    assert torch.equal(captured.outputs, x[:, :3] * 2 + 1)
