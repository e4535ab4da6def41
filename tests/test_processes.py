"""fastpar as users meet it: torch's launcher, gloo processes, and a script that never imports it (scripts/user.py).

One launch runs many tasks, for starting processes takes longer than most of them. What goes wrong is tested in this
process where that is possible.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

SCRIPT = Path(__file__).parent / "scripts" / "user.py"
FLOAT32 = 2e-6  # relative; eager itself is about 2e-7 from float64
DIFFER = ("other_shapes", "other_plans", "other_code", "other_noise", "other_weights", "fails_on_one_rank")

Results = list[dict[str, Any]]


def launch(folder: Path, ranks: int, *tasks: str, check: bool = True, **env: str) -> tuple[Results, str]:
    """Per rank, what every task of the script returned; and what the processes printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]  # any free port
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *tasks],
        cwd=folder,  # not the checkout: fastpar is found because it is installed
        env={**os.environ, "OMP_NUM_THREADS": "1", "FASTPAR_PLAN": f"ulysses={ranks}", **env},
        capture_output=True,
        text=True,
        timeout=560,
    )
    printed = done.stdout + done.stderr
    assert not check or done.returncode == 0, printed
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(ranks) if check], printed


def exact(result: dict[str, Any], distinct: int) -> None:
    """Eager's values, the same bits on all ranks, other ones for other inputs, and never eager."""
    assert "raised" not in result, result
    assert result["error"] < FLOAT32
    assert result["same_bits"]
    assert result["distinct"] == distinct
    assert result["ran_eagerly"] == 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a user does on two processes, and what ranks do that are not of one mind.

    Workers of xdist share one launch: the first one makes it, the others wait for its files.
    """
    tasks = ("prompts", "gather", "speeds", "resolutions", "steps", "without_rows", "windows", "rounded_inputs",
             "verify_and_dump",
             *DIFFER, "after", "absent")  # fmt: skip
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two"
    with FileLock(f"{folder}.lock"):
        if not (folder / "1.json").exists():
            folder.mkdir(exist_ok=True)
            launch(folder, 2, *tasks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# -- two processes --------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("task", ["prompts", "gather", "speeds", "windows", "after"])
def test_two_processes_are_exact(two: Results, task: str) -> None:
    for result in two:
        exact(result[task], distinct=2)
        assert result[task]["compiles"] == [1, 0]
    plans = {"gather": "gather=2", "speeds": "gather=2,speeds(1:3)"}
    plan = plans.get(task, "ulysses=2")  # the latter comes from FASTPAR_PLAN
    assert [m for m in two[0][task]["messages"] if m.startswith(f"compiled {plan} on 2 ranks")]


@pytest.mark.distributed
def test_every_resolution_is_sharded_and_compiled_once(two: Results) -> None:
    """Twenty of them: past Dynamo's recompile limit of 8, after which it would run the model eagerly."""
    for result in two:
        exact(result["resolutions"], distinct=20)
        assert result["resolutions"]["compiles"] == [1, 0] * 20
    assert len([m for m in two[0]["resolutions"]["messages"] if m.startswith("compiled ulysses=2")]) == 20


@pytest.mark.distributed
def test_time_steps_are_no_shapes(two: Results) -> None:
    """The first number, then numbers; 50 tensors are one more kind. Dynamo makes programs of their own for 1 and 0."""
    for result in two:
        exact(result["steps"], distinct=50)
        numbers, tensors = result["steps"]["compiles"][:50], result["steps"]["compiles"][50:]
        assert numbers[:2] == [1, 1] and sum(numbers[2:48]) == 0 and sum(numbers[48:]) <= 2
        assert tensors == [1] + [0] * 49


@pytest.mark.distributed
def test_a_module_without_rows_runs_and_says_so(two: Results) -> None:
    for result in two:
        exact(result["without_rows"], distinct=1)
    assert any(m.startswith("nothing to split") for m in two[0]["without_rows"]["messages"])


@pytest.mark.distributed
def test_inputs_that_were_rounded_differently_are_said_and_taken(two: Results) -> None:
    said = [m for r in two for m in r["rounded_inputs"]["messages"] if "as if rounded differently" in m]
    assert 1 <= len(said) <= 2, "by each rank that saw all"
    for result in two:
        assert result["rounded_inputs"]["compiles"] == [1]


@pytest.mark.distributed
def test_verify_and_dump(two: Results) -> None:
    """A text with layouts and a runnable program per pass; the last one is the rank's own."""
    for result in two:
        exact(result["verify_and_dump"], distinct=2)
        files = result["verify_and_dump"]["files"]
        names = [re.sub(r"^graph\d+/\d\d\.", "", f) for f in files]
        stages = ["captured", "shard", "attention-ulysses", "cancel", "lower", "arrange", "split-weights", "hoist"]
        stages += ["overlap", "pin", "localised"]
        assert [n for n in names if n.endswith(".txt")] == [f"{s}.txt" for s in stages]
        assert [n for n in names if n.endswith(".py")] == [f"{s}.py" for s in stages]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("task", "field", "values"),
    [
        ("other_shapes", "inputs", ("image: float32[2, 2, 14, 22]", "image: float32[2, 2, 16, 22]")),
        ("other_plans", "plan", ("rank 0 has 'ulysses=2'", "rank 1 has 'gather=2'")),
        ("other_code", "graph", ("rank 0 has", "rank 1 has")),
        ("other_noise", "the values of image", ("rank 0 has", "rank 1 has", "seed the generators that draw noise")),
        ("other_weights", "the values of ", ("rank 0 has", "rank 1 has", "load the same checkpoints")),
    ],
)
def test_ranks_that_differ_all_raise(two: Results, task: str, field: str, values: tuple[str, ...]) -> None:
    for result in two:
        message = result[task]["raised"]
        assert message.startswith(f"AgreementError: ranks do not agree on '{field}"), message
        assert all(v in message for v in values), message


@pytest.mark.distributed
def test_the_error_of_one_rank_reaches_the_others(two: Results) -> None:
    assert two[1]["fails_on_one_rank"]["raised"].startswith("PlanError: option 'plan': unknown plan term 'ulises'")
    message = two[0]["fails_on_one_rank"]["raised"]
    assert message.startswith("AgreementError: rank 1 failed while compiling: PlanError"), message


@pytest.mark.distributed
def test_who_waits_for_a_rank_that_never_calls_gives_up(two: Results) -> None:
    message = two[0]["absent"]["raised"]
    assert message.startswith("AgreementError: rank 1 did not come within 2 s: rank 1 did not begin"), message


@pytest.mark.distributed
def test_a_rank_with_a_new_shape_ends_the_launch(tmp_path: Path) -> None:
    """The others run what they have and wait in a collective: when the one that raised ends, so do they."""
    begin = time.monotonic()
    _, printed = launch(tmp_path, 2, "stale", check=False)
    assert time.monotonic() - begin < 100
    assert "rank 1: AgreementError: rank 0 did not come within 3 s: rank 0 did not begin to compile" in printed
    assert "exitcode  : 1" in printed


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_processes(tmp_path: Path, ranks: int) -> None:
    """3 heads: on 4 ranks a share of the attention is rows of all heads."""
    tasks = ("prompts", "gather", "diffusers_model")
    for result in launch(tmp_path, ranks, *tasks)[0]:
        for task in tasks:
            exact(result[task], distinct=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_inductor_on_two_processes(tmp_path: Path) -> None:
    results, _ = launch(tmp_path, 2, "inductor", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    for result in results:
        exact(result["inductor"], distinct=2)
    assert any("(inductor)" in m for m in results[0]["inductor"]["messages"])


# -- one process ----------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """Attention between two projections, 8 wide, 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def raised(device: str = "cpu", gradients: bool = False, **options: Any) -> str:
    """Type and message of what the compiled model raises on its first call."""
    torch._dynamo.reset()
    model = Small().to(device).requires_grad_(gradients)
    compiled = torch.compile(model, backend="fastpar", options=options)
    with torch.set_grad_enabled(gradients), pytest.raises(Exception) as caught:  # noqa: B017
        compiled(torch.randn(2, 5, 8, device=device))
    inner = getattr(caught.value, "inner_exception", None) or caught.value
    assert str(inner) in str(caught.value)  # what a user sees
    return f"{type(inner).__name__}: {inner}"


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of ``(backend, ranks)`` in which this process is rank 0 and plays alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backend, ranks = request.param
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=ranks)
    yield
    dist.destroy_process_group()


def test_an_unknown_option_names_the_valid_ones() -> None:
    message = raised(plann="ulysses=2")
    assert message.startswith("OptionError: unknown option 'plann' (did you mean 'plan'?)")
    assert all(name in message for name in ("plan", "mesh", "topology", "lowering", "cudagraphs", "passes", "dump"))


def test_an_unknown_plan_term_names_the_valid_ones() -> None:
    message = raised(plan="ulisses=2")
    assert message.startswith("PlanError: option 'plan': unknown plan term 'ulisses' (did you mean 'ulysses'?)")
    assert "gather" in message


def test_a_plan_for_several_ranks_needs_a_process_group() -> None:
    message = raised(plan="ulysses=2")
    assert message.startswith("PlanError: the plan is for 2 ranks but torch.distributed is not initialised")
    assert "torchrun --nproc-per-node=2" in message


@pytest.mark.parametrize("world", [("fake", 4)], indirect=True)
def test_degrees_must_multiply_to_the_world(world: None) -> None:
    message = raised(plan="ulysses=3")
    assert message.startswith("PlanError: ") and "3" in message and "4" in message, message


@pytest.mark.parametrize("world", [("gloo", 1)], indirect=True)
def test_a_model_on_a_device_that_the_group_does_not_serve(world: None) -> None:
    message = raised(device="meta")
    assert message.startswith("CaptureError: the model is on meta, but the process group talks only for tensors on")


def test_gradients_are_one_clear_error() -> None:
    message = raised(gradients=True)
    assert message.startswith("CaptureError: fastpar compiles inference only") and "torch.no_grad()" in message


def test_inductor_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    message = raised(lowering="inductor")
    assert message.startswith("OptionError: lowering 'inductor' on the CPU needs a C++ compiler"), message
