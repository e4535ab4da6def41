"""What each process of ``fastpar bench`` does: every plan, and one device without any, in turns, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastpar import emulate
from fastpar.cli.models import Loaded
from fastpar.cli.processes import Heard, Wanted, World, first_call
from fastpar.core.plan import Plan
from fastpar.graph.capture import raise_recompile_limits
from fastpar.run.calls import Steps
from fastpar.run.held import tensors_of
from fastpar.run.launch import joined
from fastpar.run.stream import generation
from fastpar.run.timing import idle, launches

WARM = 3
"""Calls that do not count: one compiles, one captures, and one more finds all of it there."""
PATIENCE = timedelta(minutes=30)
"""The others wait while one device tries out kernels (max-autotune)."""
SAMPLES = 4
"""Samples that the calls are given, one after the other."""
MODES = {"inductor": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}
"""What one device is timed with, beside ``eager``: torch.compile's own modes."""


@dataclass(frozen=True)
class Job:
    """The same on every rank. ``options`` are the backend's; ``emulated`` a topology whose links one process is rank 0
    on."""

    wanted: Wanted
    world: World
    against: tuple[str, ...]
    plans: tuple[str, ...]
    options: dict[str, Any]
    rounds: int
    calls: int
    emulated: str | None = None


@dataclass(frozen=True)
class Timed:
    """One entry: seconds of a call in each round, those of the first call, and of the rank that took longest."""

    name: str
    ranks: int
    first: float
    seconds: list[float]
    lossy: bool = False
    launches: dict[str, int] | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The median's half of all rounds lies between these."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def over(self, other: Timed) -> float:
        """The median of ratios to ``other`` in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


@dataclass(frozen=True)
class Benched:
    """What came of it, as rank 0 has it; ratios are to the first entry. ``notes`` are those of ``messages`` that one
    should not miss."""

    entries: list[Timed]
    model: str
    ranks: int
    backend: str
    device: str
    lowering: str
    calls: int
    threads: int | None
    notes: list[str]
    messages: list[str]

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {**asdict(e), "median": e.median, "quartiles": list(e.quartiles), "ratio": e.over(self.entries[0])}
            for e in self.entries
        ]
        return {**asdict(self), "entries": rows}


def work(job: Job) -> Benched | None:
    """Time ``job`` as one rank of its launcher's world; rank 0 returns what came of it."""
    job.world.begin()
    with joined(job.world.device, PATIENCE) as device:
        return _timed(job, device)


def emulated(job: Job) -> Benched | None:
    """Time ``job`` as rank 0 on emulated links."""
    assert job.emulated is not None
    device = torch.device(job.world.device)
    with emulate.start(job.emulated, rank=0, ranks=job.world.ranks):
        return _timed(job, device)


def _timed(job: Job, device: torch.device) -> Benched | None:
    raise_recompile_limits()  # all entries are compiled from the same code
    first = dist.get_rank() == 0
    with Heard() as heard, torch.no_grad():
        loaded = job.wanted.load(device)
        steps = Steps(loaded.inputs, device)
        entries = [_alone(name, loaded, steps, device) if first else None for name in job.against]
        entries += [_split(text, job.options, loaded, steps, device) for text in job.plans]
        for entry in entries:
            _meet(job)
            if entry is not None:
                entry.warm()
        for _ in range(job.rounds):
            for entry in entries:
                _meet(job)
                if entry is not None:
                    entry.measure(job.calls)
        counts = [entry.launches() if entry is not None else None for entry in entries]
        mine = [(e.first, e.seconds) if e is not None else (0.0, [0.0] * job.rounds) for e in entries]
        every: list[Any] = [mine] * dist.get_world_size()
        if job.emulated is None:
            dist.all_gather_object(every, mine)
    if not first:
        return None
    found = []
    for i, name in enumerate((*job.against, *job.plans)):
        alone = i < len(job.against)
        seconds = [max(times) for times in zip(*(one[i][1] for one in every), strict=True)]
        lossy = not alone and bool(Plan.parse(name).lossy)
        ranks = 1 if alone else job.world.ranks
        found.append(Timed(name, ranks, max(one[i][0] for one in every), seconds, lossy, counts[i]))
    return Benched(
        entries=found,
        model=job.wanted.model,
        ranks=job.world.ranks,
        backend=job.world.backend if job.emulated is None else f"rank 0 on emulated links of {job.emulated}",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        lowering=job.options.get("lowering") or ("inductor" if device.type == "cuda" else "eager"),
        calls=job.calls,
        threads=job.world.threads,
        notes=[*([job.world.shared] if job.world.shared and job.emulated is None else []), *heard.telling],
        messages=heard.messages,
    )


def _meet(job: Job) -> None:
    """Nobody begins while another still computes: the cores may be the same."""
    if job.emulated is None:
        dist.barrier()


class _Entry:
    """What is called, as one sampling run of its own, so that entries can take turns."""

    def __init__(
        self, call: Callable[..., Any], loaded: Loaded, steps: Steps, device: torch.device, warm: int = WARM
    ) -> None:
        self.call, self.loaded, self.steps, self.device, self.warming = call, loaded, steps, device, warm
        self.run = generation()
        self.calls, self.first = 0, 0.0
        self.seconds: list[float] = []

    def once(self) -> Sequence[torch.Tensor]:
        args, kwargs = self.steps.at(self.calls % SAMPLES)
        self.calls += 1
        if self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        first = self.calls == 1
        given = first_call(self.loaded, self.call, args, kwargs) if first else self.call(*args, **kwargs)
        return self.run.gather(tensors_of(given))  # under ``steps``, as a sampler does it

    def warm(self) -> None:
        """Compile, and all else that is not done again."""
        with self.run:
            idle(self.device)
            begin = time.perf_counter()
            outputs = self.once()
            idle(self.device)
            self.first = time.perf_counter() - begin
            self.steps.saw(outputs)
            for _ in range(max(self.warming, SAMPLES) - 1):  # no sample is made while somebody looks at the clock
                outputs = self.once()
            self.run.gather(outputs, now=True)

    def measure(self, calls: int) -> None:
        with self.run:
            idle(self.device)
            begin = time.perf_counter()
            for _ in range(calls):
                outputs = self.once()
            self.run.gather(outputs, now=True)
            idle(self.device)
            self.seconds.append((time.perf_counter() - begin) / calls)

    def launches(self) -> dict[str, int] | None:
        """Of one call, where they can be counted; an error of the profiler costs nobody their times."""
        if self.device.type != "cuda":
            return None
        try:
            with self.run:
                found = launches(self.once, self.device)
                self.run.gather(self.once(), now=True)
                return found
        except RuntimeError:
            return None


def _alone(name: str, loaded: Loaded, steps: Steps, device: torch.device) -> _Entry:
    """One device, without us."""
    call = loaded.model if name == "eager" else torch.compile(loaded.model, mode=MODES[name], dynamic=False)
    return _Entry(call, loaded, steps, device)


def _split(text: str, options: dict[str, Any], loaded: Loaded, steps: Steps, device: torch.device) -> _Entry:
    """A plan, on all ranks."""
    displaced = Plan.parse(text).displaced
    call = torch.compile(loaded.model, backend="fastpar", options={**options, "plan": text}, dynamic=False)
    return _Entry(call, loaded, steps, device, WARM + (displaced.warmup if displaced is not None else 0))
