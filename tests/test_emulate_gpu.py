"""Emulated links on a GPU: what is launched in which order (with fakes), machine code, and, with a GPU, times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastpar
from fastpar.backends.emulate import channel
from fastpar.backends.emulate.spin import mark_kernel, spin_kernel

try:
    import triton
except ImportError:
    triton = None


class Recorder:
    """Stands for torch.cuda's streams and events, and the kernels: notes who did what."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def stream(self, name: str) -> Any:
        def wait(event: Any) -> None:
            self.log.append(f"{name} waits for event")

        class Stream:
            device = torch.device("cpu")
            wait_event = staticmethod(wait)

            def wait_stream(_, other: Any) -> None:
                self.log.append(f"{name} waits for {other}")

            def __repr__(_) -> str:
                return name

        return Stream()

    def note(self, text: str) -> None:
        self.log.append(text)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    to = Recorder()

    class Event:
        def record(self, stream: Any) -> None:
            to.note(f"event in {stream}")

        def synchronize(self) -> None:
            to.note("host waits")

        def query(self) -> bool:
            return False

    current = to.stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **options: to.stream(f"side{options['priority']}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return to


class FakeSpinner:
    def __init__(self, to: Recorder) -> None:
        self.mark = lambda began: to.note("mark")
        self.spin = lambda began, seconds: to.note(f"spin {seconds}")


def test_what_an_exchange_launches(recorded: Recorder) -> None:
    one = channel.StreamChannel(torch.device("cpu"), FakeSpinner(recorded))  # type: ignore[arg-type]
    work = one.occupy(0.25, lambda: recorded.note("copy"), [torch.ones(1)], [torch.ones(1)])
    assert recorded.log == ["side-1 waits for current", "mark", "copy", "spin 0.25", "event in side-1"]
    recorded.log.clear()
    assert not work.is_completed() and work.held
    assert work.wait() and recorded.log == ["current waits for event"]
    assert not work.held  # what was read and written may go
    recorded.log.clear()
    one.occupy(0.0, lambda: recorded.note("copy"), [], [], host=True).wait()  # one rank alone; a barrier
    assert recorded.log == ["side-1 waits for current", "copy", "event in side-1", "current waits for event",
                            "host waits"]  # fmt: skip
    one.close()
    with pytest.raises(RuntimeError, match="has been destroyed"):
        one.occupy(0.1, lambda: None, [], [])


def test_what_nobody_waited_for_is_kept_by_the_allocator(recorded: Recorder) -> None:
    class Held:
        def record_stream(self, stream: Any) -> None:
            recorded.note(f"kept for {stream}")

    one = channel.StreamChannel(torch.device("cpu"), FakeSpinner(recorded))  # type: ignore[arg-type]
    work = one.occupy(0.1, lambda: None, [], [Held()])
    recorded.log.clear()
    del work
    assert recorded.log == ["kept for side-1"]


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["i32", "i64"])
def test_the_spinning_kernel_reads_the_clock_in_its_loop(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that were read once would spin for ever or not at all."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function, types in ((spin_kernel, {"began": "*i64", "nanoseconds": kind}), (mark_kernel, {"began": "*i64"})):
        source = ASTSource(triton.jit(function), types, constexprs={})
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
        assert done.asm["cubin"]
        lines = done.asm["ptx"].splitlines()
        clock = next(i for i, line in enumerate(lines) if "%globaltimer" in line and "mov" in line)
        if function is spin_kernel:
            label = max(i for i in range(clock) if lines[i].startswith("$L__BB"))
            jumps = [i for i, line in enumerate(lines) if f"bra \t{lines[label].split(':')[0]};" in line]
            assert jumps and min(jumps) > clock


# -- with a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def emulated() -> Iterator[Any]:
    with fastpar.emulate.start("rtx4090-8") as started:  # slow links: what else is launched does not show
        yield started


def milliseconds(run: Callable[[], Any], rounds: int = 9) -> float:
    """Of a call on the GPU: the median."""
    took = []
    for _ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("megabytes", [1, 16, 128])
def test_collectives_take_the_link_model_s_time(emulated: Any, megabytes: int) -> None:
    x = torch.randn(megabytes << 18, device="cuda")
    out = torch.empty_like(x)
    for run in (lambda: dist.all_to_all_single(out, x), lambda: dist.all_reduce(x),
                lambda: dist.all_gather_into_tensor(torch.empty(8 * x.numel(), device="cuda"), x)):  # fmt: skip
        run()
        emulated.reset()
        run()
        wanted = 1e3 * next(iter(emulated.tallies.values())).seconds
        assert wanted <= milliseconds(run) < 1.1 * wanted + 0.2


@pytest.mark.gpu
def test_overlap_and_capture(emulated: Any) -> None:
    """Computing beside an exchange takes the longer of the two; a captured exchange takes its time on each replay."""
    x, out = torch.randn(16 << 18, device="cuda"), torch.empty(16 << 18, device="cuda")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def exchange() -> None:
        dist.all_to_all_single(out, x)

    def compute() -> None:
        for _ in range(4):
            torch.mm(a, a)

    def both() -> None:
        work = dist.all_to_all_single(out, x, async_op=True)
        compute()
        work.wait()

    one, other, together = (milliseconds(run) for run in (exchange, compute, both))
    assert max(one, other) * 0.98 <= together < 0.5 * min(one, other) + max(one, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    out.zero_()
    captured = milliseconds(graph.replay)
    assert abs(captured - together) < 0.1 * together + 0.2
    assert torch.equal(out, x)
    slow = [milliseconds(graph.replay, 3) for _ in range(3)]
    assert max(slow) < 1.2 * min(slow) + 0.2  # the mark is made anew
