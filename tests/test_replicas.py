"""Several replicas in one world, and plans over several mesh axes, on four real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def torchrun(*plans: str, script: str = "tests.scripts.replicas", ranks: int = 4) -> str:
    launch = ["torch.distributed.run", f"--nproc-per-node={ranks}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, "-m", *launch, "-m", script, *plans]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.distributed
def test_replicas_and_several_axes() -> None:
    # occurrences, not lines: four processes share one stdout, and their line ends may come late
    assert torchrun().count("off by") == 3 * 4


@pytest.mark.distributed
@pytest.mark.slow
def test_inductor_on_two_axes() -> None:
    assert "ulysses=2,ring=2" in torchrun("ulysses=2,ring=2")


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "plans"), [(2, ["cfg=2"]), (4, ["cfg=2,ulysses=2"])])
def test_guidance_in_separate_calls(ranks: int, plans: list[str]) -> None:
    """Every rank runs half of the calls, also with prompts of two lengths and with a graph break."""
    printed = torchrun(*plans, script="tests.scripts.guidance", ranks=ranks)
    assert printed.count("off by") == 2 * ranks * len(plans)
