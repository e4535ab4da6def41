"""What ``run`` and ``bench`` ask of processes: which world, on which devices, and the model on each of them.

Under torchrun the world is there. Otherwise as many processes are started on this machine as the plan has ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch._dynamo.exc import TorchRuntimeError

from fastpar.cli.capture import not_its_inputs
from fastpar.cli.models import Loaded, load
from fastpar.core.errors import OptionError, PlanError
from fastpar.core.options import Options
from fastpar.core.plan import Plan
from fastpar.core.text import unknown
from fastpar.graph.capture import fake_mode_of
from fastpar.graph.pipeline import Pipeline
from fastpar.plan.topology import load as topology
from fastpar.registry import PASSES
from fastpar.run.build import resolve
from fastpar.run.launch import launch, own_error

DEVICES = ("cpu", "cuda")

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Wanted:
    """MODEL and its inputs as they stand on the command line; every process loads them for itself."""

    model: str
    inputs: str | None = None
    pairs: tuple[str, ...] = ()
    dtype: str | None = None
    seed: int = 0
    component: str | None = None

    def load(self, device: torch.device) -> Loaded:
        """The model on ``device``; its inputs stay where they are. Raises OptionError."""
        found = load(self.model, self.inputs, self.pairs, self.dtype, self.seed, component=self.component)
        if fake_mode_of(found.model, found.inputs) is not None:
            raise OptionError("the model is called, and this one is on fake tensors; explain can plan it")
        if isinstance(found.model, torch.nn.Module):
            torch.nn.Module.to(found.model, device)
        return found


@dataclass(frozen=True)
class World:
    """``ranks`` processes on ``device``; ``there``: they were started by torchrun, this being one of them.
    ``threads`` is how many each of them computes with on the CPU, None where that is not ours to say."""

    ranks: int
    device: str
    there: bool
    threads: int | None = None

    @property
    def backend(self) -> str:
        return "gloo" if self.device == "cpu" else "nccl"

    @property
    def shared(self) -> str:
        """What to say of timings where processes share one machine's cores, else nothing."""
        if self.device != "cpu" or self.ranks == 1:
            return ""
        return "ranks share this machine's cores: the seconds do not show how a plan scales"

    def begin(self) -> None:
        """To be called by every process of it."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


def is_first() -> bool:
    """Whether this process is to speak for its world: it is alone, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def world_for(plans: Sequence[str], ranks: int | None, device: str | None, options: dict[str, Any]) -> World:
    """The world that all ``plans`` run in. Raises OptionError and PlanError for what is known before anything starts.

    ``options`` are those of the backend that go with each plan.
    """
    there = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    size = int(os.environ["WORLD_SIZE"]) if there else ranks
    if there and ranks not in (None, size):
        raise OptionError(f"--ranks {ranks}, but torchrun has started {size} processes; leave --ranks out")
    size = ranks_of(plans, size, options)
    device = _device(device, size, there)
    if options.get("cudagraphs") and device != "cuda":
        raise OptionError("--cudagraphs needs a GPU, and the model runs on the CPU")
    threads = None if there or device != "cpu" else max(1, (os.cpu_count() or 1) // size)
    return World(size, device, there, threads)


def ranks_of(plans: Sequence[str], ranks: int | None, options: dict[str, Any]) -> int:
    """How many ranks all of ``plans`` are for. Raises OptionError and PlanError, also for the backend's ``options``."""
    size = ranks
    if size is None:
        degrees = {Plan.parse(text).degree for text in plans if not Plan.parse(text).auto}
        if len(degrees) > 1:
            given, numbers = ", ".join(map(repr, plans)), ", ".join(map(str, sorted(degrees)))
            raise PlanError(f"plans {given} are for {numbers} ranks; those of one run are all for the same number")
        size = min(degrees, default=None)
    for text in plans:
        size = size if size is not None else resolve(text, None).degree  # raises: auto needs a number
        resolve(text, size)
        found = Options.from_user({**options, "plan": text})
        if found.passes is not None:
            Pipeline.parse(found.passes, PASSES)
        if found.topology is not None:
            topology(found.topology).check(size)
    assert size is not None
    return size


def _device(asked: str | None, ranks: int, there: bool) -> str:
    if asked is not None and asked not in DEVICES:
        raise OptionError(f"--device: {unknown('device', asked, DEVICES)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    chosen = asked or ("cuda" if count else "cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if there else ranks
    if chosen == "cuda" and count < here:
        have = f"there {'is' if count == 1 else 'are'} {count or 'none'}"
        raise OptionError(f"{here} processes need a GPU each, and {have} here; --device cpu runs them on the CPU")
    return chosen


def on_world(world: World, work: Callable[[J], R | None], job: J, debug: bool = False) -> R | None:
    """What ``work(job)`` gives on rank 0, None on other processes of torchrun's. Raises FastparError."""
    if not world.there:
        return launch(work, job, world.ranks, debug)
    try:
        return work(job)
    except Exception as error:
        own = own_error(error)
        if own is None or debug:
            raise
        raise type(own)(f"rank {os.environ['RANK']}: {own}") from error


def first_call(loaded: Loaded, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``call``, which is the model or was compiled from it. What the model's own code raises on inputs that are not its
    own is one message (CaptureError)."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        plainly = call is loaded.model or isinstance(error, TorchRuntimeError | TypeError)
        if own_error(error) is not None or not plainly:
            raise
        raise not_its_inputs(loaded, error) from error


class Heard(logging.Handler):
    """What fastpar logs on this rank while it is entered, each message once; ``telling`` are those that one should not
    miss: warnings, and what ``auto`` has chosen."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        self.telling: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if said not in self.messages:
            self.messages.append(said)
            if record.levelno >= logging.WARNING or said.startswith("plan auto"):
                self.telling.append(said)

    def __enter__(self) -> Heard:
        log = logging.getLogger("fastpar")
        self.before = (log.level, log.propagate)
        log.setLevel(logging.INFO)
        log.propagate = False  # it is shown with the results, once
        log.addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        log = logging.getLogger("fastpar")
        log.setLevel(self.before[0])
        log.propagate = self.before[1]
        log.removeHandler(self)
