"""Profiles name modules: real traces of torch's profiler, and nothing of it where no profiler runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

import fastpar
from fastpar.backends import eager, inductor, ranges
from fastpar.backends.eager import compile_eager
from fastpar.backends.inductor import compile_inductor
from fastpar.core.plan import TERMS
from fastpar.graph.modules import MODEL, SHOWN, _path, joint
from fastpar.run.build import build
from tests.test_cudagraph import played
from tests.test_replicas import torchrun

torch.set_num_threads(1)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.to_out = torch.nn.LayerNorm(32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.ff = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.ff(x)


class Model(torch.nn.Module):
    """Blocks in a list of this name."""

    def __init__(self, blocks: str = "blocks", count: int = 2) -> None:
        super().__init__()
        self.blocks = blocks
        setattr(self, blocks + "_", torch.nn.ModuleList([Block() for _ in range(count)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in getattr(self, self.blocks + "_"):
            x = block(x)
        return x * 2


def made(name: str = "blocks", count: int = 2) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(0)
    return Model(name, count).eval().requires_grad_(False), torch.randn(1, 16, 32)


@pytest.fixture
def rank() -> Iterator[Any]:
    """This process as the first of four ranks."""
    torch._dynamo.reset()
    with fastpar.emulate.start("h100-8", rank=0, ranks=4) as emulation:
        yield emulation
    torch._dynamo.reset()


def profiled(model: Any, x: torch.Tensor, folder: Path) -> list[dict[str, Any]]:
    """The complete events of the exported trace of one call."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        model(x)
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return [e for e in events if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation")]


def within(events: Sequence[dict[str, Any]], operator: str) -> list[str]:
    """The innermost range around each call of an operator, in order; those that are called by another one left out."""
    spans = [e for e in events if e["cat"] == "user_annotation"]
    found = []
    for e in sorted((e for e in events if e["name"] == operator), key=lambda e: e["ts"]):
        around = [s for s in spans if s["ts"] <= e["ts"] and e["ts"] + e["dur"] <= s["ts"] + s["dur"]]
        found.append(min(around, key=lambda s: s["dur"])["name"] if around else "")
    return found


_PARTS = ("attn.to_qkv", "attn.to_out", "ff.0", "ff.2")
PRODUCTS = [f"blocks_.{i}.{part}" for i in (0, 1) for part in _PARTS]


def check(events: Sequence[dict[str, Any]], lowering: str, ranks: int) -> None:
    """Two ranks gather K and V, which is less than to send Q, K, V and the output; four do not."""
    assert within(events, "aten::addmm") == PRODUCTS
    assert within(events, "fastpar::attention") == ["blocks_.0.attn", "blocks_.1.attn"]
    kind, times = ("all_gather", 1) if ranks == 2 else ("all_to_all", 2)
    starts = {"all_gather": [f"{MODEL}: all_gather over ulysses"], "all_to_all": []}
    starts[kind] = [f"blocks_.{i}.attn: {kind} over ulysses" for i in (0, 1) for _ in range(times)] + starts[kind]
    assert within(events, "_c10d_functional::all_to_all_single") == starts["all_to_all"]
    assert within(events, "_c10d_functional::all_gather_into_tensor") == starts["all_gather"]
    names = [e["name"] for e in sorted(events, key=lambda e: e["ts"]) if e["cat"] == "user_annotation"]
    assert names.count("fastpar: step") == 1
    waits = [one.replace(": ", ": wait for ") for one in (*starts["all_to_all"], *starts["all_gather"])]
    assert sorted(n for n in names if "wait" in n) == sorted(waits)
    if lowering == "eager":
        assert within(events, "aten::gelu") == ["blocks_.0.ff.1", "blocks_.1.ff.1"]
        assert within(events, "aten::mul")[-1] == MODEL
    else:  # what is fused names all that it was fused from
        assert sum(n == "blocks_.0.ff.1" for n in names) == 1
        assert any(n == "blocks_.0 + blocks_.1.attn.norm" for n in names)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_profile_names_modules_and_exchanges(lowering: str, rank: Any, tmp_path: Path) -> None:
    model, x = made()
    split = torch.compile(model, backend="fastpar", options={"plan": "ulysses=4", "lowering": lowering})
    first = split(x)
    check(profiled(split, x, tmp_path), lowering, 4)
    with profile(activities=[ProfilerActivity.CPU]):
        assert torch.equal(split(x), first)
    assert torch.equal(split(x), first)


@pytest.mark.gpu
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_kernels_on_a_gpu_lie_under_ranges(lowering: str, rank: Any, tmp_path: Path) -> None:
    """Every kernel that a product launches is drawn under the range of its module, and a replay under the program's."""
    model, x = made()
    model, x = model.cuda(), x.cuda()
    for captured in (False, True):
        options = {"plan": "ulysses=4", "lowering": lowering, "cudagraphs": captured}
        split = torch.compile(model, backend="fastpar", options=options)
        for _ in range(3):
            split(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            split(x)
            torch.cuda.synchronize()
        seen.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        drawn = {e["name"] for e in events if e.get("cat") in ("user_annotation", "gpu_user_annotation")}
        assert any(e.get("cat") == "kernel" for e in events)
        if captured:
            assert "fastpar: step, replayed" in drawn and not drawn & set(PRODUCTS)
        else:
            assert {*PRODUCTS, "fastpar: step"} <= {e["name"] for e in events if e.get("cat") == "gpu_user_annotation"}
        torch._dynamo.reset()


@needs_compiler
@pytest.mark.slow
@pytest.mark.distributed
def test_on_two_processes() -> None:
    printed = torchrun(script="tests.scripts.ranges", ranks=2)
    assert printed.count("ranges are right") == 2, printed


def localised(model: torch.nn.Module, x: torch.Tensor, plan: str, groups: Any = None) -> Any:
    program = fastpar.capture(model, (x,)).programs[0].program
    return build(program, plan).localise(0, groups)


def arguments(model: torch.nn.Module, x: torch.Tensor, program: Any) -> list[Any]:
    weights = dict(model.named_parameters())
    return [weights[i.name] if i.kind == "parameter" else x for i in program.inputs]


@needs_compiler
@pytest.mark.slow  # compiles twice, past all caches
def test_compiled_code_is_what_it_would_be_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels in the same order: of the wrapper and the kernels nothing but comments differs."""
    model, x = Attention().eval().requires_grad_(False), torch.randn(1, 16, 32)
    found = []
    for plain in (False, True):
        program = localised(model, x, "ulysses=1")
        if plain:
            monkeypatch.setattr(inductor, "numbered", lambda gm: (gm, ranges.Names()))
            monkeypatch.setattr(inductor, "PROVENANCE", 0)
        code: list[str] = []
        monkeypatch.setattr(inductor, "wrapper_of", lambda compiled, to=code: to.append(compiled.source_code))
        with config.patch({"force_disable_caches": True}):
            compile_inductor(program)
        found.append([line for line in code[0].splitlines() if not line.lstrip().startswith("#")])
    assert len(found[0]) > 100 and found[0] == found[1]


@needs_compiler
def test_code_from_the_cache_has_the_names_of_the_model_that_runs(tmp_path: Path) -> None:
    with fresh_cache():
        for name, kind in (("blocks", "miss"), ("layers", "hit")):
            counters.clear()
            model, x = made(name, 1)
            program = localised(model, x, "ulysses=1")
            run, args = compile_inductor(program), arguments(model, x, program)
            assert counters["inductor"][f"fxgraph_cache_{kind}"] == 1
            for _ in range(2):
                events = profiled(lambda x, r=run, a=args: r(list(a)), x, tmp_path)
                assert within(events, "aten::addmm") == [f"{name}_.0.{part}" for part in _PARTS]


@needs_compiler
def test_without_a_profiler_the_code_is_inductor_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attention().eval().requires_grad_(False), torch.randn(1, 16, 32)
    program = localised(model, x, "ulysses=1")
    kept: list[Any] = []
    real = ranges.wrapper_of
    monkeypatch.setattr(inductor, "wrapper_of", lambda compiled: kept.append(real(compiled)) or kept[-1])
    run = compile_inductor(program)
    (function,) = kept
    plain = function.__code__
    function.__globals__.pop(ranges._ENTER, None)  # of another test, whose code this may be
    run(arguments(model, x, program))
    assert function.__code__ is plain and ranges._ENTER not in function.__globals__
    with profile(activities=[ProfilerActivity.CPU]):
        run(arguments(model, x, program))
        assert function.__code__ is plain  # also between calls
    assert ranges._ENTER in function.__globals__


def test_eager_makes_its_other_module_under_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    made_for: list[Any] = []
    monkeypatch.setattr(eager, "marked", lambda gm: made_for.append(gm) or ranges.marked(gm))
    model, x = made()
    program = localised(model, x, "ulysses=1")
    run = compile_eager(program)
    run(arguments(model, x, program))
    assert made_for == []
    with profile(activities=[ProfilerActivity.CPU]):
        run(arguments(model, x, program))
        run(arguments(model, x, program))
    assert made_for == [program.gm]
    assert not any(n.target is ranges.enter for n in program.graph.nodes)


def test_a_call_that_fails_leaves_no_range_open() -> None:
    def fails(args: list[Any]) -> Sequence[Any]:
        ranges.enter("inner")
        raise ValueError("no")

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        with pytest.raises(ValueError, match="no"):
            ranges.under_profilers("outer", fails, lambda: fails)([])
        torch.ones(2).sum()
    spans = {e.name: e for e in seen.events()}
    assert spans["aten::sum"].time_range.start >= spans["fastpar: outer"].time_range.end
    assert spans["inner"].time_range.end <= spans["fastpar: outer"].time_range.end
    assert ranges._thread.depth == 0 and ranges._thread.range is None
    ranges.enter("outside of a program")
    assert ranges._thread.range is None


def test_code_without_handles_is_run_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def run(args: list[Any]) -> Sequence[Any]:
        return args

    class Compiled:
        source_code = ""

    assert ranges.wrapper_with_ranges(run, Compiled(), ranges.Names(), run) is run
    assert ranges.wrapper_with_ranges(None, Compiled(), ranges.Names(), run) is run
    assert caplog.text.count("profiles show no modules") == 2


def test_a_replay_is_one_range() -> None:
    run, _ = played(lambda w, x: w * x, "pu", torch.ones(3), torch.ones(3))
    for _ in range(2):
        run([torch.ones(3), torch.ones(3)])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run([torch.ones(3), torch.ones(3)])
    assert [e.name for e in seen.events() if e.name.startswith("fastpar")] == ["fastpar: step, replayed"]


PLANS = ("gather=2", "ulysses=2", "ring=2", "torus=2", "tp=2", "naive=2", "cfg=2", "ulysses=2,fp8(qvog)",
         "gather=2,speeds(1:0.6)", "gather=2,displaced", "gather=2,displaced,steps(1:2)")  # fmt: skip
NODES = re.compile(r"blocks_\.[01](\.(attn(\.(norm|to_qkv|to_out))?|ff(\.[012])?))?|")


def test_every_term_is_among_the_plans() -> None:
    assert set(TERMS) - {"auto"} <= set(re.findall(r"[a-z]\w+", " ".join(PLANS)))


@pytest.mark.parametrize("plan", PLANS)
def test_nodes_that_passes_insert_belong_to_modules(plan: str) -> None:
    model, x = made()
    x = torch.cat([x, x]) if "cfg" in plan else x
    program = localised(model, x, plan)
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert nodes and all(NODES.fullmatch(n.meta["module"]) for n in nodes)
    assert {f"blocks_.{i}.attn" for i in (0, 1)} <= {n.meta["module"] for n in nodes}
    talks = [n for n in nodes if str(n.target).startswith("_c10d_functional")]
    assert (plan == "naive=2" or talks) and all(" over " in n.meta["exchange"] for n in talks)


def test_paths_of_modules() -> None:
    for text, path in (
        ("L['self'].blocks.3.attn", "blocks.3.attn"),
        ("L['fn']._modules['blocks']._modules['3']", "blocks.3"),
        ("L['self']", ""),
        ("", ""),
    ):
        assert _path(text) == path


def test_a_kernel_of_many_modules_names_some() -> None:
    assert joint(["a", "b", "a"]) == "a + b"
    assert joint([str(i) for i in range(SHOWN + 2)]) == "0 + 1 + 2 + 2 more"
