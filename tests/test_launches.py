"""Kernels of a step, counted in the code that Inductor writes for a GPU that is not there (``benchmarks/gpu_code.py``).

In a process of its own: what torch believes of the machine is turned for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE = "gather=1"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A block of FLUX.1 of each kind, in its own width, by plan."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install 'fastpar[test]' on Linux)")
    out = tmp_path_factory.mktemp("launches") / "out.json"
    plans = (ONE, "ulysses=8", "ring=8", "ulysses=5", "gather=8")
    command = [sys.executable, "-m", "benchmarks.launches", "--layers", "1", "--single", "1", "--out", str(out)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--plans", *plans], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["plan"]: row for row in json.loads(out.read_text())["results"]["plans"]}


@pytest.mark.parametrize("plan", ["ulysses=8", "ring=8", "ulysses=5"])
def test_a_rank_launches_few_kernels_more_than_one_device(rows: dict[str, Any], plan: str) -> None:
    """Whatever the number of ranks: a message is packed and unpacked in a kernel or two, not in one for each peer.

    A message of an uneven plan is in many pieces, which one kernel of ours moves."""
    more = rows[plan]["kernels"] + rows[plan]["our kernels"] - rows[ONE]["kernels"]
    merges = rows[plan]["attentions"] - rows[ONE]["attentions"]
    assert more - merges <= 2 * rows["ulysses=8"]["collectives"] + 4


@pytest.mark.parametrize("plan", ["ulysses=8", "ring=8"])
def test_copies_of_a_rank_are_less_than_half_of_its_share(rows: dict[str, Any], plan: str) -> None:
    """What Inductor's kernels move, against an eighth of one device's."""
    assert rows[plan]["megabytes"] < 1.5 * rows[ONE]["megabytes"] / 8


@pytest.mark.parametrize("plan", ["ulysses=8", "gather=8"])
def test_attentions_read_what_came_where_it_lies(rows: dict[str, Any], plan: str) -> None:
    """Of an attention's four exchanges, one kernel puts each of q, k and v into its message, as one device computes
    them, and one takes the output out. So a rank moves little more than its share."""
    assert rows[plan]["megabytes"] < 1.15 * rows[ONE]["megabytes"] / 8
    assert rows[plan]["kernels"] <= rows[ONE]["kernels"] + 4 * rows[ONE]["attentions"]


def test_a_ring_copies_nothing_between_blocks(rows: dict[str, Any]) -> None:
    """Keys and values that came are views of the message: only merges, and the attentions themselves, are more."""
    row = rows["ring=8"]
    assert row["attentions"] == 8 * rows[ONE]["attentions"]
    assert row["our kernels"] == 7 * rows[ONE]["attentions"], "merges alone"
    assert row["kernels"] <= rows[ONE]["kernels"] + 6 * rows[ONE]["attentions"]


def test_no_message_s_memory_is_taken_while_it_is_under_way(rows: dict[str, Any]) -> None:
    """Attention's output is the message itself: nothing may be written there before the exchange is waited for."""
    assert not any(row["overwritten"] for row in rows.values())


def test_memory_that_is_taken_is_seen() -> None:
    from benchmarks.gpu_code import Code

    lines = [
        "def call(self, args):",
        "buf2 = torch.ops._c10d_functional.all_to_all_single.default(buf1, [2], [2], '0')",
        "buf3 = reinterpret_tensor(buf1, (2,), (1,), 0); del buf1  # reuse",
        "torch.ops._c10d_functional.wait_tensor.default(buf2)",
        "buf4 = buf2; del buf2  # reuse",
    ]
    assert Code("\n".join(lines)).overwritten == [lines[2]]
