"""The GPU suite without a GPU: parts that fail, die or hang, figures by hand, and every part at its tiny size."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpar
from benchmarks import __main__ as benchmarks
from benchmarks.gpu import hoist, kernels, links, models, peers, ranks, step, suite, tests, timing
from benchmarks.gpu.part import SIZES, Part, Unavailable

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def world() -> Any:
    with fastpar.emulate.start("h100-8", ranks=8) as started:
        yield started


# -- the suite ----------------------------------------------------------------------------------


def suite_of(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status and rows (by name) of a suite with one part that goes as ``how`` says."""
    monkeypatch.setattr(suite, "PARTS", {"part": suite.Entry("tests.scripts.gpu_part", 30, "a part")})
    monkeypatch.setattr(suite, "GRACE", 5.0)
    out = tmp_path / "gpu.json"
    status = suite.main(["--match", how, "--size", "tiny", "--out", str(out), *more])
    found = json.loads(out.read_text())
    assert "torch" in found["environment"]["versions"] and found["results"]["size"] == "tiny"
    return status, {row["name"]: row for row in found["results"]["parts"]["part"]["rows"]}


def test_what_fails_is_listed_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = suite_of("raises", monkeypatch, tmp_path)
    assert status == 1 and rows["fine"] == {"name": "fine", "ms": 1.5}
    assert rows["broken"]["error"] == "ValueError: does not work\nat all" and "broken" in rows["broken"]["details"]
    assert "were over" in rows["late"]["skipped"]
    assert "1 failed:\n  part, broken: ValueError: does not work\n" in capsys.readouterr().out


def test_what_is_missing_is_not_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, rows = suite_of("misses", monkeypatch, tmp_path)
    assert status == 0 and rows["misses"] == {"name": "misses", "skipped": "a library is not installed"}


@pytest.mark.parametrize(
    ("how", "why"),
    [("dies", "ended with status 7"), pytest.param("hangs", "stopped after", marks=pytest.mark.slow)],
)
def test_a_part_that_dies_or_hangs_keeps_its_rows(
    how: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, rows = suite_of(how, monkeypatch, tmp_path, *(["--budget", "10"] if how == "hangs" else []))
    assert status == 1 and rows["fine"]["ms"] == 1.5 and why in rows[how]["error"] and "late" not in rows


def test_the_command_is_one_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(suite, "main", lambda argv: asked.append(argv) or 3)
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", "--only", "kernels"])
    assert benchmarks.main() == 3 and asked == [["--only", "kernels"]]


def test_parts_are_there_and_fit_in_ten_minutes() -> None:
    import importlib

    assert sum(entry.budget + suite.GRACE for entry in suite.PARTS.values()) <= 600
    for name, entry in suite.PARTS.items():
        assert entry.module == f"benchmarks.gpu.{name.split('-')[0]}" and entry.model in models.MODELS
        assert callable(importlib.import_module(entry.module).body)


def test_wheels_are_put_on_the_path(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lib-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lib/__init__.py", "version = 1")
    (path,) = suite.unpacked(tmp_path, tmp_path / "out")
    assert (Path(path) / "lib" / "__init__.py").read_text() == "version = 1"
    assert suite.unpacked(None, tmp_path) == []
    zipfile.ZipFile(tmp_path / "a-1.0-cp311-cp311-linux_x86_64.whl", "w").close()
    with pytest.raises(SystemExit, match="not pure Python"):
        suite.unpacked(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="no .whl files"):
        suite.unpacked(tmp_path / "out", tmp_path)


def test_without_a_gpu_only_tiny_sizes_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody gets 12B parameters on the host by accident."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "gpu.json"
    assert suite.main(["--only", "kernels", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["results"]["parts"]["kernels"]["rows"]
    assert "size 'full' needs a CUDA device" in row["skipped"]


# -- figures ------------------------------------------------------------------------------------


def test_ratios_are_of_calls_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower hits both; the ratio does not move."""
    order: list[str] = []
    times = iter([1.0, 0.5, 2.0, 1.0, 8.0, 4.0])
    monkeypatch.setattr(timing, "seconds", lambda run, device: (run(), next(times))[1])
    runs: dict[str, Callable[[], Any]] = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = timing.paired(runs, torch.device("cpu"), rounds=3, warm=1)
    assert order == ["a", "b"] + ["a", "b"] * 3
    assert found["a"]["ms"] == 2000 and found["b"]["ms"] == 1000 and found["b"]["least"] == 500
    assert found["a"]["speedup"] == 1 and found["b"]["speedup"] == 2


def test_launches_leave_out_what_emulates_links() -> None:
    kernels = [("gemm", True), ("mark_kernel", True), ("spin_kernel", True), ("Memcpy DtoD", True)]
    host = [("cudaLaunchKernel", False), ("cuLaunchKernelEx", False), ("cuLaunchKernel", False),
            ("cudaMemcpyAsync", False), ("aten::mm", False)]  # fmt: skip
    assert timing.counted([*kernels, *host]) == {"launches": 2, "kernels": 1, "copies": 1, "emulated": 2}
    graph = [*kernels, ("cudaGraphLaunch", False)]
    assert timing.counted(graph) == {"launches": 1, "kernels": 1, "copies": 1, "emulated": 2}


def test_what_needs_a_gpu_says_so() -> None:
    device = torch.device("cpu")
    for measure in (timing.launches, timing.memory):
        with pytest.raises(Unavailable, match="needs a CUDA device"):
            measure(lambda: None, device)
    assert timing.extras(lambda: None, device) == {}


def test_models_share_their_parameters() -> None:
    made = models.make("pixart", "tiny", torch.device("cpu"))
    other = made.shared()
    assert other is not made.model
    assert [p.data_ptr() for p in other.parameters()] == [p.data_ptr() for p in made.model.parameters()]
    with torch.no_grad():
        assert torch.equal(other(**made.inputs)[0], made.model(**made.inputs)[0])


def test_models_are_made_on_the_device_in_bf16() -> None:
    """The published size, of which not one byte is made on the host."""
    made = models.make("flux", "full", torch.device("meta"))
    parameters = list(made.model.parameters())
    assert 11.8e9 < sum(p.numel() for p in parameters) < 12.1e9
    assert {(p.device.type, p.dtype) for p in parameters} == {("meta", torch.bfloat16)}
    assert made.inputs["hidden_states"].shape == (1, 4096, 64) and made.inputs["hidden_states"].is_meta
    assert made.inputs["encoder_hidden_states"].dtype == torch.bfloat16
    larger = models.make("flux-2048", "short", torch.device("meta")).inputs  # 16 x 16 pixels a token
    assert larger["hidden_states"].shape == (1, (2048 // 16) ** 2, 64) and larger["img_ids"].shape == (16384, 3)
    with pytest.raises(ValueError, match="no model 'flex'; there are flux, flux-2048"):
        models.make("flex", "tiny", torch.device("cpu"))


def test_a_part_runs_the_model_of_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ranks, "make", lambda name, *_: asked.append(name))
    monkeypatch.setattr("sys.argv", ["ranks", "--size", "tiny", "--model", suite.PARTS["ranks-2048"].model])
    ranks.run(ranks.body)
    assert asked == ["flux-2048"]


def test_without_diffusers_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    part = Part("tiny", 60)
    step.body(part)
    (row,) = part.rows
    assert row["name"] == "flux" and "diffusers cannot be imported" in row["skipped"] and "--wheels" in row["skipped"]


# -- parts at their tiny size -------------------------------------------------------------------


def test_kernels() -> None:
    part = Part("tiny", 60)
    kernels.body(part)
    assert {row["name"].split(",")[0] for row in part.rows} == set(kernels.KERNELS)
    for row in part.rows:
        assert row["us"] > 0 and row["off"] <= 2**-7 and "there is no GPU" in row["runs"], row


def test_a_kernel_that_is_wrong_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for exact, off in ((True, 1e-6), (False, 0.1)):
        case = kernels.Case(lambda off=off: torch.ones(3) + off, lambda: torch.ones(3), 12, exact)  # type: ignore[misc]
        monkeypatch.setitem(kernels.KERNELS, "wrong", lambda tokens, device, case=case: case)
        part = Part("tiny", 60, match=("wrong",))
        kernels.body(part)
        assert [row["name"] for row in part.rows] == ["wrong, tiny"] and "AssertionError" in part.rows[0]["error"]


def test_links(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part("tiny", 60, match=("overhead", "two groups", "captured", "all_to_all"))
    links.body(part)
    rows = {row["name"]: row for row in part.rows}
    assert rows["overhead"]["us"] > 0 and "CUDA" in rows["captured"]["skipped"]
    timed = [row for name, row in rows.items() if name.startswith("all_to_all")]
    assert len(timed) == 2 and all(row["ratio"] >= 1 for row in timed)
    assert rows["two groups"]["same group"] >= 2 * 1e3 * (1e-4 + 7 / 8 * (1 << 20) / 1e8)


def test_pytest_s_results_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ('<testsuites><testsuite><testcase classname="tests.a" name="one"/>'
              '<testcase classname="tests.a" name="two"><failure message="assert 1 == 2"/></testcase>'
              '<testcase classname="tests.a" name="three"><skipped/></testcase></testsuite></testsuites>')  # fmt: skip
    path = tmp_path / "junit.xml"
    path.write_text(report)
    assert tests.results(path) == {"passed": 1, "failed": 1, "skipped": 1,
                                   "messages": {"tests.a::two": "assert 1 == 2"}}  # fmt: skip
    part = Part("tiny", 60)
    tests.body(part)
    assert "the marker gpu needs a CUDA device" in part.rows[0]["skipped"]


@pytest.mark.slow
def test_peers_run_unmodified(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own context parallelism exchanges what its documentation says: four times per attention."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    made = models.make("flux", "tiny", torch.device("cpu"))
    with torch.no_grad():
        call = ranks.called(made, "diffusers ulysses", "h100-8")
        world.reset()
        assert type(call()) is torch.Tensor  # arrived: diffusers returns it while its last collective is under way
    assert world.tallies["all_to_all"].count == 4 * 2
    with pytest.raises(Unavailable, match="yunchang cannot be imported"):
        monkeypatch.setitem(__import__("sys").modules, "yunchang", None)
        peers.PEERS["yunchang ulysses"](made.shared(), 8)


def test_what_a_peer_s_hooks_do_to_its_code_leaves_other_entries_alone(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo gives up the code of a forward whose graph breaks: for every model that is compiled from it."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    made = models.make("flux", "tiny", torch.device("cpu"))
    with torch.no_grad():
        first = torch.compile(made.shared(), backend="eager", dynamic=False)
        other = peers.compiled(peers.diffusers_ulysses, backend="eager")(made.shared(), 8)
        for model in (first, other):
            model(**made.inputs)
        before = timing.conversions()
        first(**made.inputs)
        assert timing.conversions() == before
        other(**made.inputs)
        found = timing.paired({"first": lambda: first(**made.inputs)}, torch.device("cpu"), rounds=1)
        assert "recompiled" not in found["first"]


def test_what_compiles_while_it_is_timed_says_so() -> None:
    sizes = iter(range(3, 9))
    call = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    found = timing.paired({"one": lambda: call(torch.zeros(next(sizes)))}, torch.device("cpu"), rounds=2, warm=1)
    assert found["one"]["recompiled"] == 2


@pytest.mark.slow
def test_steps_ranks_and_hoist() -> None:
    part = Part("tiny", 600, match=("eager",))
    step.body(part)
    assert [row["name"] for row in part.rows] == ["eager"] and part.rows[0]["speedup"] > 0
    part = Part("tiny", 600, match=("fastpar ulysses=8, eager", "fastpar ring=8", "+ hoist", "displaced"))
    ranks.body(part)
    rows = {row["name"]: row for row in part.rows}
    assert len(rows) == 4 * len(ranks.TOPOLOGIES)
    for row in rows.values():
        assert "error" not in row and row["ms"] > 0, row
    busy = [rows[f"{topology}: fastpar ring=8"]["link_ms"] for topology in ranks.TOPOLOGIES]
    assert busy[0] == min(busy) and len(set(busy)) == 3
    part = Part("tiny", 600, match=("h100-8: fastpar ulysses=8, eager",), model="flux-2048")
    ranks.body(part)
    assert [row["exchanges"] > 0 for row in part.rows] == [True]
    part = Part("tiny", 600, match=("pixart",))
    hoist.body(part)
    assert len(part.rows) == 2 and all(row["with_ms"] > 0 for row in part.rows)


def test_names_are_those_of_the_tables() -> None:
    assert sorted(ranks.ORDER) == sorted([*ranks.OURS, *peers.PEERS]) and ranks.ORDER[0] in ranks.OURS
    assert set(SIZES) == set(kernels.TOKENS) == set(links.SIZES)
    assert hoist.without("ulysses=8").count("hoist") == 0
    assert next(iter(step.VARIANTS)) == "eager"
