"""What each process of ``fastpar run`` does: compile the model for its rank, call it a few times, compare."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import fastpar
from fastpar.cli.models import Loaded
from fastpar.cli.processes import Heard, Wanted, World, first_call
from fastpar.core.plan import Plan
from fastpar.run.calls import Steps, digest
from fastpar.run.held import Held, held, tensors_of
from fastpar.run.launch import joined
from fastpar.run.timing import idle


@dataclass(frozen=True)
class Job:
    """The same on every rank. ``options`` are the backend's."""

    wanted: Wanted
    world: World
    options: dict[str, Any]
    calls: int
    check: bool


@dataclass(frozen=True)
class Ran:
    """What came of it, as rank 0 has it.

    ``seconds`` are those of each call on the rank that took longest, the first of which compiles. ``differ`` names
    the ranks that had other bits than rank 0 in any call. ``peak_bytes`` is the largest rank's: allocated on its GPU,
    or resident with all that Python and torch take.
    """

    plan: str
    ranks: int
    backend: str
    device: str
    lowering: str
    seconds: list[float]
    differ: list[int]
    peak_bytes: int
    lossy: list[str]
    held: Held | None
    messages: list[str]
    shared: str

    @property
    def ok(self) -> bool:
        return not self.differ and (self.held is None or self.held.ok)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ok": self.ok}


def work(job: Job) -> Ran | None:
    """Run ``job`` as one rank of its launcher's world; rank 0 returns what came of it."""
    job.world.begin()
    with joined(job.world.device) as device, Heard() as heard, torch.no_grad():
        first = dist.get_rank() == 0
        loaded = job.wanted.load(device)
        steps = Steps(loaded.inputs, device)
        seconds, digests, kept = _called(loaded, steps, job, device)
        mine = (seconds, digests, _peak(device))
        every: list[Any] = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    if not first:
        return None
    checked = None
    lossy = Plan.parse(job.options["plan"]).lossy
    if job.check:  # when nobody waits any more: it may take longer than a rank would
        checked = held(loaded.model, [(steps.at(step), outputs) for step, outputs in kept.items()], bool(lossy))
    return Ran(
        plan=job.options["plan"],
        ranks=job.world.ranks,
        backend=job.world.backend,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        lowering=job.options.get("lowering") or ("inductor" if device.type == "cuda" else "eager"),
        seconds=[max(times) for times in zip(*(one[0] for one in every), strict=True)],
        differ=[rank for rank, one in enumerate(every) if one[1] != every[0][1]],
        peak_bytes=max(one[2] for one in every),
        lossy=lossy,
        held=checked,
        messages=heard.messages,
        shared=job.world.shared,
    )


def _called(
    loaded: Loaded, steps: Steps, job: Job, device: torch.device
) -> tuple[list[float], list[str], dict[int, list[torch.Tensor]]]:
    """Seconds and digests of all calls, which are one sampling run, and what the first and the last one gave."""
    compiled = torch.compile(loaded.model, backend="fastpar", options=job.options, dynamic=False)
    seconds, digests, kept = list[float](), list[str](), dict[int, list[torch.Tensor]]()
    with fastpar.generation() as run:
        for step in range(job.calls):
            args, kwargs = steps.at(step)
            dist.barrier()
            idle(device)
            begin = time.perf_counter()
            outputs = tensors_of(first_call(loaded, compiled, args, kwargs) if step == 0 else compiled(*args, **kwargs))
            idle(device)
            seconds.append(time.perf_counter() - begin)
            outputs = run.gather(outputs, now=True)  # under ``steps`` each rank has its own rows of now
            if step == 0:
                steps.saw(outputs)
            digests.append(digest(outputs))
            if step in (0, job.calls - 1):
                kept[step] = [x.clone() for x in outputs]  # a replayed graph writes into the same memory
    return seconds, digests, kept


def _peak(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
