"""One-sided communication in real memory: heaps between threads and processes, who can, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fastpar
from fastpar.backends.inductor import compile_inductor
from fastpar.backends.onesided.order import SPARE
from fastpar.backends.onesided.shared import Shared, place
from fastpar.backends.simulate import run_local
from fastpar.core.errors import AgreementError, FastparError
from fastpar.graph.program import Program
from fastpar.ops.onesided import HeapSpec, heap_of, is_onesided
from fastpar.run import onesided as running
from fastpar.run.agree import Party
from tests.onesided import Meeting, in_threads, other, over_shared_memory, same, sided
from tests.symmetric_cases import CASES
from tests.test_cfg import Block, inputs
from tests.test_replicas import torchrun
from tests.test_schedule import Two, built

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block().double().eval(), inputs(2))


# -- shared memory --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert not {name for name in os.listdir("/dev/shm") if "fastpar" in name} - before
    assert not [name for name in map(str, running.ops._live) if name.startswith("t")]


@pytest.mark.parametrize("plan", ["ring=3", "ulysses=3", "torus=2,ring=2", "ulysses=2,ring=2", "tp=3"])
def test_real_heaps_keep_the_bits(captured: fastpar.Captured, plan: str) -> None:
    b = built(captured, plan)
    programs = [b.localise(r) for r in range(b.mesh.ranks)]
    args = captured.programs[0].args
    calls = [args, other(args)] * 3
    for spare in (0, SPARE):
        for found, call in zip(over_shared_memory(b, calls, spare=spare), calls, strict=True):
            assert same(found, run_local(programs, call))


def test_inductor_keeps_the_order_and_the_values() -> None:
    torch.manual_seed(0)
    captured = fastpar.capture(Two(16).double().eval(), (torch.randn(1, 12, 16).double(),))
    b = built(captured, "ulysses=2", "h100-8")
    args = captured.programs[0].args
    codes: list[str] = []

    def lowering(program: Program) -> Any:
        compiled, code = run_and_get_code(compile_inductor, program)
        codes.append("\n".join(code).split("def call(", 1)[1])
        return compiled

    found = over_shared_memory(b, [args, other(args)], lowering)
    programs, one_sided, _ = sided(b)
    for outputs, call in zip(found, [args, other(args)], strict=True):
        assert same(outputs[1:], outputs[:1])
        off = (outputs[0][0] - run_local(programs, call)[0][0]).abs().max()
        assert off.item() < 1e-12
    order = [str(n.target).split(".")[1] for n in one_sided[0].graph.nodes if is_onesided(n)]
    assert order.count("put") == order.count("receive") > 2
    for code in codes:
        assert re.findall(r"ops\.fastpar\.(put|receive)\.default\(", code) == order


def alone(timeout: float = 0.3, ranks: int = 2) -> list[Shared]:
    """Heaps of ranks that all live here."""
    meeting, spec = Meeting(ranks), HeapSpec("t", ("all_to_all over ring", "all_gather over ring"), 256)
    heaps: list[Shared] = in_threads(lambda r: Shared(spec, r, ranks, timeout, meeting.of(r)), ranks)
    for heap in heaps:
        heap.begin()
    return heaps


def test_a_rank_that_never_comes_is_named_in_time() -> None:
    heaps = alone(ranks=3)
    x = torch.arange(4.0)
    heaps[2].put(x, 1, [0, 0, 2, 0], [])
    with pytest.raises(FastparError, match=r"rank 0 waited 0.3 s .* call 1 for ranks \[1\], first for the message of "
                       r"rank 1 in channel 1 \(all_gather over ring\)"):  # fmt: skip
        heaps[0].receive(x, 1, [1, 2], [], 0, 4, torch.clone)
    heaps[0].begin()
    with pytest.raises(FastparError, match="ranks \\[2\\], first for rank 2 to say that it has read channel 0"):
        heaps[0].put(x, 1, [1, 0, 4, 0], [2, 0, 1])


def test_messages_belong_to_their_call() -> None:
    a, b = alone()
    x = torch.arange(4.0)
    a.put(x, 0, [1, 0, 4, 0], [])
    assert torch.equal(b.receive(x, 0, [0], [0], 0, 4, torch.clone), x)
    b.begin()
    with pytest.raises(FastparError, match="waited"):  # the flag of the first call is still there
        b.receive(x, 0, [0], [], 0, 4, torch.clone)
    a.begin()
    a.put(2 * x, 0, [1, 0, 4, 0], [1, 0, 1])  # its credit came with the first call
    assert torch.equal(b.receive(x, 0, [0], [], 0, 4, torch.clone), 2 * x)
    a.begin()
    a.put(x, 0, [1, 0, 4, 0], [])
    with pytest.raises(FastparError, match="overwritten by that of a later call"):
        b.receive(x, 0, [0], [], 0, 4, torch.clone)


def test_what_is_received_is_no_view_of_the_heap() -> None:
    from tests.onesided import _names  # a heap of its own name

    name = f"t{next(_names)}"
    a, b = alone()
    running.ops.register(name, b)
    try:
        x = torch.arange(4.0)
        a.put(x, 0, [1, 0, 4, 0], [])
        token = torch.empty(1, dtype=torch.uint8)
        (out,) = torch.ops.fastpar.receive(token, x, name, 0, [0], [], 0, 4, [1, 4], [0, 1, 0, 4])
        total = torch.ops.fastpar.receive_sum(token, x, name, 0, [0], [], 0, 1, 4, "sum")
        a.put(-x, 0, [1, 0, 4, 0], [])
        assert torch.equal(out, x) and torch.equal(total, x)
    finally:
        running.ops.release(name)
    with pytest.raises(FastparError, match=f"no heap '{name}': the program that it belongs to was freed"):
        heap_of(name)


def test_heaps_are_freed_with_their_program(captured: fastpar.Captured) -> None:
    heaps = alone()
    attended = running.Attended(lambda args: args, [heaps[0]])
    assert heap_of("t") is heaps[0]
    with pytest.raises(FastparError, match="there is a heap 't' already"):
        running.Attended(lambda args: args, [heaps[1]])
    assert heap_of("t") is heaps[0]  # which is not the second one's to let go
    del attended
    with pytest.raises(FastparError, match="no heap 't'"):
        heap_of("t")
    assert heaps[0].memory == []


# -- who can --------------------------------------------------------------------------------------


class _Store(dict):  # type: ignore[type-arg]
    """A store within this process."""

    def add(self, key: str, n: int) -> int:
        self[key] = self.get(key, 0) + n
        return int(self[key])

    def set(self, key: str, text: str) -> None:
        self[key] = text.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def asked(monkeypatch: pytest.MonkeyPatch, places: list[str], device: str = "cpu", timeout: float = 5.0) -> list[Any]:
    """What every rank is told whose places are these; ``None`` for a rank that does not come."""
    store, local = _Store(), threading.local()
    monkeypatch.setattr(running, "world", lambda group: (local.rank, len(places)))
    monkeypatch.setattr(running, "party_of", lambda group: Party(store, local.rank, tuple(range(len(places)))))
    monkeypatch.setattr(running, "_place", lambda device: places[local.rank])

    def run(rank: int) -> Any:
        local.rank = rank
        return running.one_sided("group", torch.device(device), timeout) if places[rank] else None

    return in_threads(run, len(places))


def test_all_ranks_say_the_same_of_machines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = place()
    assert all(sided is not None for sided, _ in asked(monkeypatch, [here, here]))
    apart = asked(monkeypatch, [here, here, '["elsewhere"]'])
    assert [sided for sided, _ in apart] == [None] * 3
    assert {reason.split(":")[0] for _, reason in apart} == {"ranks 0 and 2 do not share memory"}
    for _, reason in asked(monkeypatch, [here, "no Triton, whose kernel waits for flags"]):
        assert reason == "no Triton, whose kernel waits for flags"


def test_a_gpu_without_symmetric_memory_says_so_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter(["ok", "RuntimeError: no peer access"])
    monkeypatch.setattr(running, "_probe", lambda device, group: next(probes))
    told = asked(monkeypatch, [place()] * 2, "cuda")
    assert {(sided, re.sub(r"rank \d", "rank N", reason)) for sided, reason in told} == {
        (None, "rank N has no symmetric memory: RuntimeError: no peer access")
    }


def test_a_rank_that_does_not_come_to_the_decision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgreementError, match=r"for ranks \[1\] to come to the one-sided transport \(place\)"):
        asked(monkeypatch, [place(), ""], timeout=0.2)


def test_one_rank_has_nobody_to_share_with() -> None:
    assert running.one_sided(None, torch.device("cpu"), 1.0) == (None, "there is one rank")


# -- processes ------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_late_processes_get_the_bits_of_two_sided_ones() -> None:
    printed = torchrun("ring=2", script="tests.scripts.onesided", ranks=2)
    assert printed.count("bits equal") == 2
    assert "one-sided: " in printed


@pytest.mark.distributed
def test_a_process_that_dies_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPAR_TIMEOUT", "6")
    printed = torchrun("--dies", "ring=2", script="tests.scripts.onesided", ranks=2)
    assert re.search(r"rank 0: after [67]\.\d s: .*for ranks \[1\].*in channel|read channel", printed), printed


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "plans"),
    [(3, ["ring=3", "ulysses=3"]), (4, ["torus=2,ring=2", "ulysses=2,ring=2"]), (3, ["--inductor", "ring=3", "tp=3"])],
)
def test_late_processes_under_more_plans(ranks: int, plans: list[str]) -> None:
    printed = torchrun(*plans, script="tests.scripts.onesided", ranks=ranks)
    assert printed.count("bits equal") == ranks * len([p for p in plans if not p.startswith("--")])


# -- GPUs -----------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton is not installed (pip install 'fastpar[test]' on Linux), or TRITON_INTERPRET is set for all tests",
)


@interpreted
def test_symmetric_heaps_in_the_interpreter() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.symmetric_cases", *CASES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should be") == len(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_symmetric_heaps_on_a_gpu(case: str) -> None:
    CASES[case]("cuda")


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "plans"), [(2, ["ring=2", "ulysses=2", "torus=2"]), (4, ["ulysses=2,ring=2", "torus=2,ring=2"])]
)
def test_processes_on_one_gpu_keep_the_bits(ranks: int, plans: list[str]) -> None:
    printed = torchrun("--cuda", *plans, script="tests.scripts.onesided", ranks=ranks)
    assert printed.count("bits equal") == ranks * len(plans)
    assert "two-sided, though" not in printed


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "plan"), [(2, "ring=2"), (2, "ulysses=2"), (4, "torus=2,ring=2")])
def test_replays_of_a_captured_step_keep_the_bits(ranks: int, plan: str) -> None:
    printed = torchrun("--cuda", "--captured", plan, script="tests.scripts.onesided", ranks=ranks)
    assert printed.count("replayed, bits equal") == ranks
