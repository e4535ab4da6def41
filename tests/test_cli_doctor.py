"""``fastpar doctor``: every kind of fact on machines that are well, poor or broken; no traceback and no hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from fastpar.cli import doctor
from fastpar.cli.health import fact, gpus, processes, software
from fastpar.cli.health.fact import FAILED, OK, WARNING, Fact, elsewhere, looked
from fastpar.cli.main import app
from tests.scripts import checks


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("FASTPAR_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def one(check: Callable[[], Iterable[Fact]], name: str) -> Fact:
    (found,) = [f for f in check() if f.name == name]
    return found


# -- the verb -----------------------------------------------------------------------------------


def test_this_machine_is_well(tmp_path: Path) -> None:
    out = tmp_path / "new" / "facts.json"
    result = CliRunner().invoke(app, ["doctor", "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["facts"]}
    assert found["ok"] and len(rows) == len(found["facts"]) >= 15
    assert rows["torch"]["found"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "fastpar.backend:fastpar" in rows["backend"]["found"]
    assert rows["two processes"]["status"] == OK and "added up a tensor" in rows["two processes"]["found"]
    assert {"topology", "one-sided, CPU", "one-sided, GPU", "CUDA graphs", "cache", "launcher"} <= set(rows)
    for name in rows:
        assert name in result.output
    assert "0 failed" not in result.output and f"{sum(r['status'] == OK for r in rows.values())} ok" in result.output


def test_a_failure_is_status_1_and_a_warning_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [Fact("a", OK, "fine"), Fact("b", WARNING, "poor", "buy another")]
    monkeypatch.setattr(doctor, "facts", lambda: facts)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "buy another" in result.output and "1 ok; 1 warning" in result.output
    facts.append(Fact("c", FAILED, "[/gone]"))
    result = CliRunner().invoke(app, ["doctor", "--json", "-"])
    assert result.exit_code == 1 and json.loads(result.output)["facts"][2]["found"] == "[/gone]"
    assert "[/gone]" in CliRunner().invoke(app, ["doctor"]).output, "no markup"


def test_one_process_of_a_machine_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(doctor, "facts", lambda: pytest.fail("looked"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and result.output == ""


def test_a_torch_that_does_not_import_is_a_fact(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    done = subprocess.run([sys.executable, "-m", "fastpar.cli", "doctor", "--json", "-"], text=True, timeout=120,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["facts"]}
    assert "does not import: OSError: libcudart" in rows["torch"]["found"] and "launcher" in rows


# -- checks cannot fail nor hang ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [("crash", "ended with status 3"), ("hang", "did not answer within 2 s"), ("raises", "is gone")],
)
def test_what_crashes_or_hangs_elsewhere_is_a_fact(how: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    (found,) = elsewhere("GPUs", f"tests.scripts.checks:{how}", patience=2.0 if how == "hang" else 60.0)
    assert found.status == FAILED and said in found.found


def test_what_is_found_elsewhere_comes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    assert elsewhere("GPUs", "tests.scripts.checks:fine") == [Fact("fine", OK, "é")]


def test_what_a_check_raises_is_a_fact() -> None:
    assert looked("x", checks.raises) == [Fact("x", WARNING, "could not be looked at: RuntimeError: the driver")]


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    (found,) = processes.meeting("import sys, time\nif sys.argv[1] == '1': sys.exit('no route')\ntime.sleep(1000)")
    assert found.status == FAILED and "rank 1 of 2 failed over gloo: no route" in found.found
    assert "GLOO_SOCKET_IFNAME" in found.advice
    monkeypatch.setattr(fact, "PATIENCE", 0.5)
    (found,) = processes.meeting("import time; time.sleep(1000)")
    assert found.status == FAILED and "did not meet over gloo within 0.5 s" in found.found
    assert len(started) == 4 and all(process.poll() is not None for process in started), "none is left behind"


# -- software -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status"),
    [("2.10.1", FAILED), ("2.11.0", OK), ("2.15.2+cu130", OK), ("2.16.0.dev20260101", WARNING), ("3.0", WARNING)],
)
def test_versions_of_torch(given: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "version", lambda _: given)
    found = one(software.torch, "torch")
    assert found.status == status and given in found.found and (status == OK or "torch>=2.11,<2.16" in found.advice)


def test_packages_that_are_old_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "diffusers":
            return "0.37.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(software, "version", version)
    found = {f.name: f for f in software.packages()}
    assert found["triton"].status == (OK if torch.version.cuda is None else WARNING)
    assert found["diffusers"].status == WARNING and "diffusers>=0.38" in found["diffusers"].advice
    assert found["safetensors"].status == WARNING and found["safetensors"].advice == "pip install 'safetensors'"
    assert one(software.torch, "torch").status == FAILED
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert {f.name: f for f in software.packages()}["triton"].status == WARNING


def test_a_backend_that_is_not_found_or_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "entry_points", lambda group: [])
    found = one(software.entry_point, "backend")
    assert found.status == FAILED and "torch_dynamo_backends" in found.found and "pip install -e ." in found.advice
    broken = SimpleNamespace(name="fastpar", value="x:y", load=lambda: __import__("no_such_module"))
    monkeypatch.setattr(software, "entry_points", lambda group: [broken])
    assert "does not load: ModuleNotFoundError" in one(software.entry_point, "backend").found


def test_no_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(software.shutil, "which", lambda _: None)
    assert one(software.compiler, "C++ compiler").status == WARNING
    monkeypatch.setattr(software.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(software.sysconfig, "get_paths", lambda: {"include": "/no/such/folder"})
    assert "Python's headers" in one(software.compiler, "C++ compiler").found


@pytest.mark.parametrize(
    ("name", "value", "status", "said"),
    [
        ("FASTPAR_TIMEOUTS", "3", FAILED, "did you mean 'FASTPAR_TIMEOUT'"),
        ("FASTPAR_PLAN", "ulises=2", FAILED, "did you mean 'ulysses'"),
        ("FASTPAR_TIMEOUT", "-1", FAILED, "number of seconds above 0"),
        ("FASTPAR_VERIFY", "1", WARNING, "runs the whole graph"),
        ("FASTPAR_VERIFY", "0", OK, "0"),
        ("FASTPAR_PLAN", "ring=2", OK, "ring=2"),
        ("FASTPAR_DUMP", "", OK, "not read"),
    ],
)
def test_variables(name: str, value: str, status: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    found = one(software.variables, name)
    assert found.status == status and said in found.found


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new"))
    found = one(software.cache, "cache")
    assert found.status == OK and str(tmp_path) in found.found and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert one(software.cache, "cache").status == WARNING


def test_what_torchrun_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torchrun has not started" in one(software.launched, "launcher").found
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = one(software.launched, "launcher")
    assert found.status == WARNING and "RANK=1, WORLD_SIZE=4" in found.found and "MASTER_ADDR" in found.found
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert one(software.launched, "launcher").status == OK


def test_a_build_without_gloo_or_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert one(processes.groups, "gloo").status == FAILED
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert one(processes.groups, "nccl").status == WARNING
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert one(processes.groups, "torch.distributed").status == FAILED


# -- GPUs that are not there --------------------------------------------------------------------


class FakeCuda:
    """Two GPUs of a kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, peers: bool) -> None:
        properties = SimpleNamespace(name=name, total_memory=80e9, major=9, minor=0)
        for attribute, value in {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_name": lambda *_: name,
            "get_device_properties": lambda _: properties,
            "can_device_access_peer": lambda a, b: peers,
        }.items():
            monkeypatch.setattr(torch.cuda, attribute, value)
        monkeypatch.setattr(gpus, "_graphs", lambda: [Fact("CUDA graphs", OK, "captured and replayed")])
        monkeypatch.setattr(gpus, "_symmetric", lambda _: "symmetric memory is given")


@pytest.mark.parametrize(("name", "topology"), [("NVIDIA H100 80GB HBM3", OK), ("NVIDIA T4", WARNING)])
@pytest.mark.parametrize("peers", [True, False])
def test_gpus(name: str, topology: str, peers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, name, peers)
    found: dict[str, Any] = {f.name: f for f in gpus.gpus()}
    assert name in found["GPU 1"].found and "80 GB" in found["GPU 1"].found
    assert found["peer access"].status == (OK if peers else WARNING)
    assert found["topology"].status == topology and ("docs/planning.md" in found["topology"].advice) == (topology != OK)
    one_sided = found["one-sided, GPU"]
    if "no Triton" not in one_sided.found:
        assert (one_sided.status, "two-sided" in one_sided.found) == ((OK, False) if peers else (WARNING, True))


def test_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    found = one(gpus.gpus, "GPUs")
    assert found.status == WARNING and "Found no NVIDIA driver" in found.found and "nvidia-smi" in found.advice


@pytest.mark.gpu
def test_real_gpus() -> None:
    found = {f.name: f for f in gpus.gpus()}
    assert found["GPU 0"].status == OK and found["CUDA graphs"].found == "captured and replayed"
