"""Is what ``emulate`` does what the link model says? Times of collectives, overlap, two groups, its own overhead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.part import Part, run
from benchmarks.gpu.timing import paired, seconds
from fastpar import emulate
from fastpar.plan.topology import Device, Level, Topology

# Slow enough to measure on a CPU; on a GPU the links of a real machine.
SLOW = Topology("slow", "eight devices on slow links", Device("none", 1e12, 1e11, 1e10), (Level("link", 8, 1e8, 1e-4),))
FREE = Topology("free", "links that take no time", Device("none", 1e12, 1e11, 1e10), (Level("link", 8, 1e18, 1e-12),))
SIZES = {"full": (1 << 20, 8 << 20, 64 << 20, 256 << 20), "short": (1 << 20, 64 << 20), "tiny": (1 << 18, 1 << 20)}


@contextmanager
def links(part: Part) -> Iterator[Any]:
    with emulate.start("h100-8" if part.cuda else SLOW, rank=0, ranks=8) as emulation:
        yield emulation


def collectives(x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    out, wide = torch.empty_like(x), torch.empty(8 * x.numel(), device=x.device)
    return {
        "all_to_all": lambda: dist.all_to_all_single(out, x),
        "all_gather": lambda: dist.all_gather([*wide.chunk(8)], x),
        "all_reduce": lambda: dist.all_reduce(x),
    }


def timed(part: Part, size: int, name: str) -> dict[str, Any]:
    """Milliseconds measured, those of the model, and by how much the former are longer."""
    with links(part) as emulation:
        call = collectives(torch.randn(size // 4, device=part.device))[name]
        call()
        emulation.reset()
        call()
        wanted = emulation.tallies[name].seconds
        took = statistics.median(seconds(call, part.device) for _ in range(7))
        return {"ms": 1e3 * took, "model_ms": 1e3 * wanted, "over_us": 1e6 * (took - wanted), "ratio": took / wanted}


def overlapped(part: Part) -> dict[str, Any]:
    """Computing, exchanging, and both: ``hidden`` is 1 where both take as long as the longer one, 0 where the sum."""
    with links(part):
        side = 8192 if part.cuda else 256
        a = torch.randn(side, side, device=part.device, dtype=torch.bfloat16 if part.cuda else torch.float32)
        x = torch.randn((128 << 20) // 4 if part.cuda else (1 << 20) // 4, device=part.device)
        out = torch.empty_like(x)

        def exchange() -> None:
            dist.all_to_all_single(out, x)

        def compute(times: int) -> None:
            for _ in range(times):
                torch.mm(a, a)

        one = statistics.median(seconds(exchange, part.device) for _ in range(5))
        compute(1)
        times = max(1, round(one / statistics.median(seconds(lambda: compute(1), part.device) for _ in range(5))))

        def both() -> None:
            work = dist.all_to_all_single(out, x, async_op=True)
            compute(times)
            work.wait()

        runs = {"exchange": exchange, "compute": lambda: compute(times), "both": both}
        found = {name: f["ms"] for name, f in paired(runs, part.device).items()}
        less, more = sorted((found["exchange"], found["compute"]))
        return {**found, "hidden": (less + more - found["both"]) / less}


def two_groups(part: Part) -> dict[str, Any]:
    """Two exchanges of one group, and of two groups at once: twice as long, and as long as one."""
    with links(part):
        other = dist.new_group(list(range(8)))
        x = torch.randn((64 << 20) // 4 if part.cuda else (1 << 20) // 4, device=part.device)
        outs = [torch.empty_like(x) for _ in range(2)]

        def exchange(*groups: Any) -> None:
            works = [dist.all_to_all_single(o, x, group=g, async_op=True) for o, g in zip(outs, groups, strict=False)]
            for work in works:
                work.wait()

        runs = {
            "one": lambda: exchange(None),
            "same group": lambda: exchange(None, None),
            "two groups": lambda: exchange(None, other),
        }
        return {name: found["ms"] for name, found in paired(runs, part.device).items()}


def overhead(part: Part) -> dict[str, Any]:
    """Microseconds of the host and of both together per exchange of nothing on links that take no time."""
    with emulate.start(FREE, rank=0, ranks=8):
        x, out = (torch.randn(64, device=part.device) for _ in range(2))
        calls = 200

        def many() -> None:
            for _ in range(calls):
                dist.all_to_all_single(out, x)

        many()
        whole = statistics.median(seconds(many, part.device) for _ in range(5)) / calls
        begin = time.perf_counter()
        many()
        host = (time.perf_counter() - begin) / calls
        return {"us": 1e6 * whole, "host_us": 1e6 * host}


def captured(part: Part) -> dict[str, Any]:
    """An exchange replayed in a CUDA graph against the same one launched."""
    part.need_cuda("capturing")
    with links(part):
        x = torch.randn((64 << 20) // 4, device=part.device)
        out = torch.empty_like(x)

        def exchange() -> None:
            dist.all_to_all_single(out, x)

        exchange()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            exchange()
        found = paired({"launched": exchange, "replayed": graph.replay}, part.device)
        return {name: f["ms"] for name, f in found.items()}


def body(part: Part) -> None:
    part.attempt("overhead", lambda: overhead(part))
    part.attempt("overlap", lambda: overlapped(part))
    part.attempt("two groups", lambda: two_groups(part))
    part.attempt("captured", lambda: captured(part))
    for size in SIZES[part.size]:
        for name in ("all_to_all", "all_gather", "all_reduce"):
            shown = f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
            part.attempt(f"{name} {shown}", lambda size=size, name=name: timed(part, size, name))


if __name__ == "__main__":
    run(body)
