"""Times, launches and memory of calls. Times are a ratio's: what is compared is called in turns, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.part import Unavailable
from fastpar.run import timing
from fastpar.run.timing import counted, seconds

__all__ = ["Run", "counted", "extras", "launches", "memory", "on_device", "paired", "seconds"]

Run = Callable[[], Any]


def paired(runs: Mapping[str, Run], device: torch.device, rounds: int = 7, warm: int = 2) -> dict[str, dict[str, Any]]:
    """By name the median of milliseconds, its spread, and the median of ratios to the first one in the same round.

    ``recompiled`` is how often Dynamo was asked for new code meanwhile, where it was: such a time is not a step's.
    """
    for run in runs.values():
        for _ in range(warm):
            run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    compiled = dict.fromkeys(runs, 0)
    for _ in range(rounds):
        for name, run in runs.items():
            before = conversions()
            took[name].append(seconds(run, device))
            compiled[name] += conversions() - before
    base = next(iter(took.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(mine),
            "least": 1e3 * min(mine),
            "most": 1e3 * max(mine),
            "speedup": statistics.median(b / m for b, m in zip(base, mine, strict=True)),
            **({"recompiled": compiled[name]} if compiled[name] else {}),
        }
        for name, mine in took.items()
    }


def conversions() -> int:
    """How many frames Dynamo was asked to compile in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["frames"]["total"])


def on_device(run: Run, device: torch.device, calls: int = 20, rounds: int = 5) -> float:
    """Seconds of one of many calls in a row, without the host: the median of rounds between two events."""
    if device.type != "cuda":
        run()
        return statistics.median(seconds(run, device) for _ in range(rounds))
    run()
    graph = torch.cuda.CUDAGraph()  # launched from the host, small kernels would measure the host
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    took = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(took[1:])


def launches(run: Run, device: torch.device) -> dict[str, int]:
    """``fastpar.run.timing.launches``, where they can be counted."""
    if device.type != "cuda":
        raise Unavailable("counting launches needs a CUDA device")
    return timing.launches(run, device)


def memory(run: Run, device: torch.device) -> dict[str, float]:
    """Of one call: the most that was allocated at once, in GB, and how much of it was there before."""
    if device.type != "cuda":
        raise Unavailable("measuring memory needs a CUDA device")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9, "before_gb": before / 1e9}


def extras(run: Run, device: torch.device) -> dict[str, Any]:
    """Launches and memory where they can be had; an error of the profiler, which costs no entry its times, as text."""
    if device.type != "cuda":
        return {}
    found: dict[str, Any] = {"peak_gb": memory(run, device)["peak_gb"]}
    try:
        return {**found, **launches(run, device)}
    except RuntimeError as error:
        return {**found, "launches": f"not counted: {error}"[:200]}
