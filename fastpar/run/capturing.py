"""Between a lowering and the artefact: programs that can be captured as CUDA graphs are, the others say why not."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastpar.backends.cudagraph import Captured, release
from fastpar.backends.cudagraph.cuda import Cuda, Watch
from fastpar.backends.cudagraph.obstacles import obstacle, scalars_on
from fastpar.backends.pinned import STARTS
from fastpar.graph.program import Program
from fastpar.run.artefact import Runner

log = logging.getLogger("fastpar")

PATIENCE = 10
"""A replayed step has so many times ``FASTPAR_TIMEOUT`` to end, from the end of the one before."""

Compile = Callable[[Program], Runner]


def capturing(compile: Compile, device: torch.device, timeout: float, make: Any = None) -> Compile:
    """A lowering whose programs are captured on their second call and replayed from then on.

    ``make(device)`` gives what captures (``captured.Device``), by default the GPU itself.
    """

    def compile_captured(program: Program) -> Runner:
        own = program.copy()
        moved = scalars_on(own, device)
        why = obstacle(own)
        if why is not None:
            log.warning("%r is not captured as a CUDA graph: %s", program.name, why)
            return compile(program)
        talks = any(node.target in STARTS for node in own.graph.nodes)
        if talks:
            release_before_destroy()
        given = make(device) if make is not None else Cuda(device, _watch(PATIENCE * timeout))
        return Captured(own, compile(own), given, device, moved, talks)

    return compile_captured


@functools.cache
def _watch(limit: float) -> Watch:
    return Watch(limit, _late)


def _late(what: str, seconds: float) -> None:
    """End this process: the thread that waits for the device cannot be told, and would wait for ever."""
    print(
        f"fastpar: {what!r}, replayed as a CUDA graph, did not end within {seconds:g} s: another rank did not call the "
        "model as often, or is gone. This process ends, so that its launcher can end the others; if steps really "
        "take that long, raise FASTPAR_TIMEOUT",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def release_before_destroy() -> None:
    """Let captured graphs go before ``torch.distributed.destroy_process_group`` does its work.

    It would wait for ever for communicators that a graph still holds. Torch has no hook at that place, so the
    function itself is wrapped, once; and graphs go when the interpreter ends, before any communicator does.
    """
    inner = dist.destroy_process_group
    if getattr(inner, "releases_graphs", False):
        return

    @functools.wraps(inner)
    def destroy_process_group(*args: Any, **kwargs: Any) -> Any:
        release(talking=True)
        return inner(*args, **kwargs)

    destroy_process_group.releases_graphs = True  # type: ignore[attr-defined]
    dist.destroy_process_group = destroy_process_group
    dist.distributed_c10d.destroy_process_group = destroy_process_group
    atexit.register(release, True)
