"""``fastpar run``: real processes, started here and by torchrun; what they find, and every way in which they fail."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from typer.testing import CliRunner

from fastpar.cli.calling import Ran
from fastpar.cli.main import app
from fastpar.cli.processes import Wanted, World, first_call, world_for
from fastpar.core.errors import CaptureError, OptionError, PlanError
from fastpar.graph.capture import call_arguments
from fastpar.run.calls import Steps, digest
from fastpar.run.held import Held, held, tensors_of
from tests.scripts import small

SCRIPTS = Path(__file__).parent / "scripts"
DIGITS = Path(__file__).parent.parent / "fastpar" / "demo" / "digits.json"
DIGITS_INPUTS = ("--input", "hidden_states=float[1,1,16,16]", "--input", "timestep=500",
                 "--input", "class_labels=int[1]:3")  # fmt: skip
TWO = ("--plan", "ulysses=2", "--calls", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of ``small`` are found, and no launcher is in the environment."""
    monkeypatch.chdir(SCRIPTS)
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*args: str, status: int = 0) -> str:
    """What the command prints, on both streams; it must exit with ``status``."""
    result = CliRunner().invoke(app, ["run", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, f"{result.exit_code}: {result.output}"
    return result.output


# -- processes ----------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(("more", "note"), [("", "bring what is used in the next step"),
                                            (",steps(1:2)", "exchanges between calls")])  # fmt: skip
def test_a_displaced_plan_runs_its_steps_and_says_that_it_is_lossy(tmp_path: Path, more: str, note: str) -> None:
    out = tmp_path / "run.json"
    said = run(str(DIGITS), *DIGITS_INPUTS, "--plan", f"gather=2,displaced(warmup=1){more}", "--calls", "4",
               "--device", "cpu", "--json", str(out))  # fmt: skip
    parts = ("ok\n", "2 processes, gloo on cpu, lowering eager", "in the median of 3", "on all ranks, in every call",
             "lossy, as asked", "do not show how a plan scales", note)  # fmt: skip
    for part in parts:
        assert part in said, part
    found = json.loads(out.read_text())
    assert found["ok"] and len(found["seconds"]) == 4 and found["differ"] == [] and found["peak_bytes"] > 1e7
    # the last call used what the step before had: it is lossy indeed, so the sample has moved, and by little
    assert 1e-6 < found["held"]["error"] < 0.1 and found["held"]["exact"] > found["held"]["allowed"]


@pytest.mark.distributed
def test_under_torchrun_its_processes_are_used(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", "--local-addr=localhost", "-m", "fastpar.cli", "run", "small:denoiser",
               *TWO, "--dtype", "f64", "--transport", "one-sided", "--json", "-"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=SCRIPTS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one report, of rank 0, and nothing else
    assert found["ranks"] == 2 and found["ok"]
    assert found["held"]["dtype"] == "float64" and found["held"]["error"] < 1e-12
    assert any("one-sided" in message for message in found["messages"])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("wrong", 1, "FAILED\n"),
        ("other_noise", 2, " of 2 failed: ranks do not agree on 'the values of x'"),
        ("dies", 2, "error: rank 1 of 2 ended with status 7, without a word\n"),
    ],
)
def test_what_goes_wrong_on_processes_is_one_message(model: str, status: int, said: str) -> None:
    found = run(f"small:{model}", *TWO, status=status)
    assert said in found and "Traceback" not in found
    assert status == 1 or (found.startswith("error: rank") and len(found.splitlines()) == 1)
    if model == "wrong":
        assert "NO: rank 1 and rank 0 differ" in found and "1.0e-03 relative to eager" in found


def test_inputs_that_are_not_the_models_own_are_one_message() -> None:
    """As ``captured`` says it; nothing is started for it here."""
    loaded = Wanted("small:denoiser", pairs=("x=float[2,7,5]",)).load(torch.device("cpu"))
    args = call_arguments(loaded.inputs)
    for call in (loaded.model, torch.compile(loaded.model, backend="eager")):
        with pytest.raises(CaptureError, match="does not run on these inputs: .*Given: x, prompt; it takes: x, prompt"):
            first_call(loaded, call, *args)
    with pytest.raises(CaptureError, match="missing 1 required .*it takes: x, prompt"):
        first_call(loaded, torch.compile(loaded.model, backend="eager"), (), {"x": torch.randn(2, 7, 6)})

    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="a bug of ours"):
        first_call(loaded, bug, *args)


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise SignalException("Process 1 got signal: 2", sigval=signal.SIGINT)

    monkeypatch.setattr("fastpar.run.launch.elastic_launch", lambda *_: interrupted)
    result = CliRunner().invoke(app, ["run", "small:denoiser", *TWO])
    assert result.exit_code == 130 and "Traceback" not in result.output


@pytest.mark.distributed
def test_a_bug_comes_with_one_traceback() -> None:
    found = run("small:has_a_bug", *TWO, status=2)
    assert found.startswith("error: rank") and " of 2 failed:\nTraceback" in found  # of the ranks that came so far
    assert found.count("ZeroDivisionError: a bug") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_inductor_and_auto() -> None:
    said = run("small:denoiser", "--ranks", "2", "--lowering", "inductor", "--device", "cpu", "--no-check")
    assert "lowering inductor" in said and "planned for" in said and "not checked" in said


@pytest.mark.parametrize("differ", [[], [1]])
@pytest.mark.parametrize("error", [0.0, 1e-3, None])
def test_either_makes_a_run_fail(differ: list[int], error: float | None) -> None:
    found = None if error is None else Held(error < 1e-6, error, error, 0.0, 1e-6, "float32")
    ran = Ran("ring=2", 2, "gloo", "cpu", "eager", [1.0], differ, 1, [], found, [], "")
    assert ran.ok == ran.to_dict()["ok"] == (not differ and not error)


# -- before anything starts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "needs the number of ranks"),
        (("--plan", "ulises=2"), "did you mean 'ulysses'"),
        (("--plan", "ulysses=2", "--ranks", "3"), "the mesh has 3"),
        (("--plan", "gather=2,steps(1:2)"), "'steps' needs 'displaced'"),
        ((*TWO, "--lowering", "inducto"), "did you mean 'inductor'"),
        ((*TWO, "--transport", "three-sided"), "two-sided, one-sided"),
        ((*TWO, "--topology", "l41-8"), "did you mean 'l40-8'"),
        (("--plan", "ulysses=16", "--topology", "l40-8"), "has 8 devices, the plan needs 16"),
        ((*TWO, "--passes", "shart"), "did you mean 'shard'"),
        ((*TWO, "--cudagraphs"), "--cudagraphs needs a GPU"),
        (("--plan", "ulysses=2", "--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_a_mistake_starts_nothing(args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpar.cli.processes.launch", lambda *_: pytest.fail("processes were started"))
    found = run("small:denoiser", *args, status=2)
    assert found.startswith("error: ") and said in found, found


def test_gpus_are_counted_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="2 processes need a GPU each, and there is 1 here; --device cpu"):
        world_for(["ulysses=2"], None, None, {})
    assert world_for(["ulysses=1"], None, None, {"cudagraphs": True}) == World(1, "cuda", False, None)
    assert world_for(["ulysses=2"], None, "cpu", {}).device == "cpu"


def test_the_world_of_torchrun_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_for(["auto"], None, "cpu", {}) == World(4, "cpu", True, None)
    with pytest.raises(OptionError, match="--ranks 2, but torchrun has started 4"):
        world_for(["auto"], 2, "cpu", {})
    with pytest.raises(PlanError, match="the mesh has 4"):
        world_for(["ulysses=2"], None, "cpu", {})
    assert run("small:denoiser", "--plan", "ulysses=2", status=2) == "", "rank 0 has said it"


def test_plans_of_one_run_are_for_as_many_ranks() -> None:
    assert world_for(["ulysses=2", "auto"], None, "cpu", {}).ranks == 2
    with pytest.raises(PlanError, match="are for 2, 3 ranks"):
        world_for(["ulysses=2", "ring=3"], None, "cpu", {})


# -- steps and the check ------------------------------------------------------------------------


def test_the_sample_moves_and_nothing_else() -> None:
    image, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 400, 9)
    steps = Steps({"prompt": prompt, "image": image, "time": torch.tensor([5])}, torch.device("cpu"))
    steps.saw([torch.randn(1, 8, 8, 8)])  # what is not shaped like the sample but for its channels
    (_, first), (_, third), (_, again) = steps.at(0), steps.at(3), steps.at(3)
    assert first["image"] is image and third["prompt"] is prompt and third["time"] is first["time"]
    assert again["image"] is third["image"] is not steps.at(2)[1]["image"]
    apart = (third["image"] - image).square().mean().sqrt() / image.square().mean().sqrt()
    assert 0.02 < apart < 0.04
    steps = Steps((torch.randint(0, 9, (4,)),), torch.device("cpu"))
    steps.saw([torch.randn(4, 4)])
    assert steps.at(2)[0][0] is steps.at(0)[0][0]


def test_bits_of_all_outputs_count() -> None:
    x, y = torch.randn(3, 4).bfloat16(), torch.tensor([True, False])
    assert digest([x, y]) == digest([x.clone().t().contiguous().t(), y.clone()])
    assert digest([x, y]) != digest([x, ~y]) != digest([x]) != digest([x.view(torch.int16)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_right_holds_and_what_is_not_does_not(dtype: torch.dtype) -> None:
    model, inputs = small.denoiser()
    model, inputs = model.to(dtype), {name: x.to(dtype) for name, x in inputs.items()}
    model.requires_grad_(False)
    outputs = tensors_of(model(**inputs))
    found = held(model, [(((), inputs), outputs)])
    assert found.ok and found.error == 0 and found.allowed >= found.exact == found.eager
    worse = [x + 20 * torch.finfo(dtype).eps * x.abs().max() + (1e-8 if dtype == torch.float64 else 0) for x in outputs]
    assert not held(model, [(((), inputs), outputs), (((), inputs), worse)]).ok
    assert held(model, [(((), inputs), worse)], lossy=True).ok
    assert not held(model, [(((), inputs), [x * torch.nan for x in outputs])], lossy=True).ok
    assert not held(model, [(((), inputs), [*outputs, *outputs])]).ok


def test_no_memory_for_the_check_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, inputs = small.denoiser()
    monkeypatch.setattr("fastpar.run.held.in_float64", lambda _: full)
    with pytest.raises(OptionError, match="--no-check"):
        held(model, [((tuple(inputs.values()), {}), [])])
