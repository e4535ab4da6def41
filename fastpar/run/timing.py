"""How long calls take, and how many launches they are, on the device that they run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastpar.core.errors import OptionError

SPINS = ("mark_kernel", "spin_kernel")
"""Kernels that emulate links (``fastpar.backends.emulate``)."""
HOST = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One call, from before it on the host until the device has nothing left to do."""
    idle(device)
    begin = time.perf_counter()
    run()
    idle(device)
    return time.perf_counter() - begin


def idle(device: torch.device) -> None:
    """Wait until ``device`` has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Of one call: ``launches`` by the host (a graph is one), ``kernels`` on the device, ``copies``; those that
    emulate links (``emulated``) are in none of these. Raises OptionError on a device that has none."""
    if device.type != "cuda":
        raise OptionError("counting launches needs a CUDA device")
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return counted((e.name, e.device_type == torch.autograd.DeviceType.CUDA) for e in found.events())


def counted(events: Iterable[tuple[str, bool]]) -> dict[str, int]:
    """``launches`` of a profile's events: (name, whether it ran on the device)."""
    events = list(events)
    there = [name for name, on in events if on]
    spins = sum(name.startswith(SPINS) for name in there)
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in there)
    host = sum(name.startswith(HOST) for name, on in events if not on)
    return {
        "launches": max(host - spins, 0) if not any(n.startswith("cudaGraphLaunch") for n, _ in events) else host,
        "kernels": len(there) - spins - copies,
        "copies": copies,
        "emulated": spins,
    }
