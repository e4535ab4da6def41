"""``fastpar bench``: what takes turns with what, what is kept of it, and every mistake. No time is held to anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from fastpar.cli import bench as verb
from fastpar.cli import rounds
from fastpar.cli.main import app
from fastpar.cli.processes import Wanted, World
from fastpar.cli.rounds import SAMPLES, WARM, Benched, Job, Timed
from fastpar.core.errors import OptionError
from fastpar.core.record import command, write

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parent.parent
TWO = ("--plan", "ulysses=2", "--device", "cpu")
DISPLACED = "gather=2,displaced(warmup=2)"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, f"{result.exit_code}: {result.output}"
    return result.output


# -- what is measured ---------------------------------------------------------------------------


@pytest.mark.distributed
def test_plans_and_eager_in_one_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    said = run("small:denoiser", *TWO, "--plan", DISPLACED, "--against", "eager", "--rounds", "3", "--calls", "2",
               "--json", str(out))  # fmt: skip
    parts = ("of eager", f"{DISPLACED}, lossy", "2 processes, gloo on cpu, lowering eager", "3 rounds of 2 calls each",
             "ranks share this machine's cores: the seconds do not show how a plan scales")  # fmt: skip
    for part in parts:
        assert part in said, part
    found = json.loads(out.read_text())
    kept = json.loads((ROOT / "benchmarks" / "results" / "passes.json").read_text())
    assert found.keys() == kept.keys() and found["environment"].keys() == kept["environment"].keys()
    results = found["results"]
    assert [e["name"] for e in results["entries"]] == ["eager", "ulysses=2", DISPLACED]
    assert [e["ranks"] for e in results["entries"]] == [1, 2, 2]
    for entry in results["entries"]:
        assert len(entry["seconds"]) == 3 and min(entry["seconds"]) > 0 and entry["first"] > 0
    assert results["entries"][0]["ratio"] == 1 and results["model"] == "small:denoiser"
    assert [e["lossy"] for e in results["entries"]] == [False, False, True]
    assert any("compiled ulysses=2 on 2 ranks" in message for message in results["messages"])


def test_entries_take_turns_and_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process as rank 0 on emulated links stands for all; its clock is not looked at."""
    turns: list[Any] = []
    warm: dict[int, int] = {}
    measure, at = rounds._Entry.measure, rounds.Steps.at

    def measured(self: Any, calls: int) -> None:
        warm.setdefault(id(self), self.calls)
        turns.append(id(self))
        measure(self, calls)

    samples: list[int] = []

    def asked(self: Any, step: int) -> Any:
        samples.append(step)
        return at(self, step)

    monkeypatch.setattr(rounds._Entry, "measure", measured)
    monkeypatch.setattr(rounds.Steps, "at", asked)
    job = Job(Wanted("small:denoiser"), World(2, "cpu", False), ("eager",), ("ulysses=2", DISPLACED), {}, 3, 2, "l40-8")
    found = rounds.emulated(job)
    assert not dist.is_initialized()
    assert found is not None and [e.name for e in found.entries] == ["eager", "ulysses=2", DISPLACED]
    assert [len(e.seconds) for e in found.entries] == [3, 3, 3] and "emulated links of l40-8" in found.backend
    assert len(set(turns)) == 3 and turns == turns[:3] * 3, "A B C A B C A B C"
    calls = [warm[i] for i in turns[:3]]
    assert min(calls) >= max(WARM, SAMPLES) and calls[2] >= WARM + 2, "the steps that wait are over"
    assert set(samples) == set(range(SAMPLES)), "no sample is made for the first time while the clock runs"
    assert found.notes == [], "and no other process shares these cores"


@pytest.mark.distributed
@pytest.mark.slow
def test_inductor_beside_a_plan_through_inductor() -> None:
    said = run("small:denoiser", *TWO, "--against", "eager,inductor", "--lowering", "inductor", "--rounds", "2")
    assert "inductor  " in said and "lowering inductor" in said


def test_numbers() -> None:
    a, b = Timed("a", 1, 9.0, [4.0, 1.0, 2.0, 3.0, 5.0]), Timed("b", 2, 9.0, [2.0, 2.0, 2.0, 3.0, 2.5])
    assert a.median == 3.0 and a.quartiles == (2.0, 4.0) and a.over(a) == 1.0
    assert b.over(a) == 1.0, "the median of 0.5, 2, 1, 1, 0.5, and not the ratio of medians"
    assert Timed("c", 1, 1.0, [2.0]).quartiles == (2.0, 2.0)
    rows = Benched([a, b], "m", 2, "gloo", "cpu", "eager", 1, 1, [], []).to_dict()["entries"]
    assert rows[1]["ratio"] == 1.0 and rows[1]["seconds"] == b.seconds and rows[0]["quartiles"] == [2.0, 4.0]


def test_launches_are_shown_where_they_were_counted(capsys: pytest.CaptureFixture[str]) -> None:
    from fastpar.cli.tables import show_bench

    entries = [Timed("eager", 1, 1.0, [1e-3], launches={"launches": 321}), Timed("ring=2", 2, 1.0, [5e-4])]
    show_bench(Benched(entries, "m", 2, "nccl", "H100", "inductor", 1, None, [], []))
    said = capsys.readouterr().out
    assert "launches" in said and "321" in said and "0.500" in said


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--plan"),
        (("--plan", "ulises=2"), "did you mean 'ulysses'"),
        (("--plan", "auto"), "needs the number of ranks"),
        ((*TWO, "--plan", "ring=3"), "are for 2, 3 ranks"),
        ((*TWO, "--plan", "ulysses=2"), "--plan ulysses=2 is given twice"),
        ((*TWO, "--ranks", "3"), "the mesh has 3"),
        ((*TWO, "--rounds", "0"), "--rounds"),
        ((*TWO, "--against", "egaer"), "did you mean 'eager'"),
        ((*TWO, "--against", "eager,max-autotune"), "--against max-autotune needs a GPU; here there is eager"),
        ((*TWO, "--cudagraphs"), "--cudagraphs needs a GPU"),
        ((*TWO, "--emulate", "h100-8"), "--emulate needs a GPU"),
        (("--plan", "ulysses=2", "--lowering", "inducto"), "did you mean 'inductor'"),
    ],
)
def test_a_mistake_starts_nothing(args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpar.cli.processes.launch", lambda *_: pytest.fail("processes were started"))
    found = run("small:denoiser", *args, status=2)
    assert said in found and "Traceback" not in found


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verb._against(None, "cuda") == ("eager", "inductor", "reduce-overhead", "max-autotune")
    assert verb._against(" inductor,eager,inductor", "cuda") == ("inductor", "eager")
    assert verb._against("", "cuda") == ()
    monkeypatch.setattr(verb.shutil, "which", lambda _: None)
    assert verb._against(None, "cpu") == ("eager",)
    with pytest.raises(OptionError, match="inductor needs a C\\+\\+ compiler; here there is eager"):
        verb._against("inductor", "cpu")


def test_emulated_links_take_one_gpu_however_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = {"topology": "h100-8"}
    assert verb._world(["ulysses=8"], None, None, options, "h100-8") == World(8, "cuda", False)
    with pytest.raises(OptionError, match="has 8 devices, the plan needs 16"):
        verb._world(["ulysses=16"], None, None, options, "h100-8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(OptionError, match="without torchrun"):
        verb._world(["ulysses=8"], None, None, options, "h100-8")


# -- what stands beside figures -----------------------------------------------------------------


def test_the_command_is_kept_without_where_it_wrote_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/fastpar", "bench", "a b", "--json", "x", "--plan", "p", "--json=y"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert command(("--json",)) == "fastpar bench 'a b' --plan p"
    assert command() == "fastpar bench 'a b' --json x --plan p --json=y"
    write(tmp_path / "new" / "results.json", [1.5])
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert found["results"] == [1.5] and found["environment"]["command"] == command()
