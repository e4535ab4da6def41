"""What every process of the demo runs: the sampler alone, then through each plan, compared."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import fastpar
from fastpar.demo.model import load_digits
from fastpar.demo.sampler import guided_inputs, initial_noise, sample
from fastpar.run.launch import joined

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What to run, the same on every rank."""

    plans: tuple[str, ...]
    digits: tuple[int, ...]
    steps: int
    seed: int
    backend: str


@dataclass(frozen=True)
class Outcome:
    """One sampled grid, as rank 0 saw it.

    ``images`` is float32 ``[B, 1, H, W]``. ``max_abs_err`` is the largest difference to the one-process
    images over all ranks (NaN where any image holds NaN), ``ranks_agree`` whether all ranks hold the same
    bits. Seconds are rank 0's; ``compile_seconds`` is the first call.
    """

    images: npt.NDArray[np.float32]
    compile_seconds: float
    seconds: float
    max_abs_err: float
    ranks_agree: bool


def work(job: Job) -> list[Outcome] | None:
    """Run ``job`` as one rank of the launcher's world: the one-process outcome, then one per plan.

    Only rank 0 returns it. Any exception ends the process, and with it the launch.
    """
    torch.set_num_threads(1)  # the ranks share one machine's cores
    with joined():
        outcomes = _outcomes(job)
        return outcomes if dist.get_rank() == 0 else None


def _outcomes(job: Job) -> list[Outcome]:
    model = load_digits()
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=dist.get_rank() != 0) as progress:
        # The reference is sampled on every rank, so that a rank on different hardware shows as a difference.
        alone = _run(job, model, "one process", progress, reference=None)
        outcomes = [alone]
        for plan in job.plans:
            # All plans compile the same code, and Dynamo's recompile limit counts per code.
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=job.backend, options={"plan": plan}, dynamic=False)
            assert isinstance(compiled, torch.nn.Module)
            outcomes.append(_run(job, compiled, plan, progress, reference=torch.from_numpy(alone.images)))
    return outcomes


def _run(
    job: Job, model: torch.nn.Module, title: str, progress: Progress, reference: Tensor | None
) -> Outcome:
    """One grid and one progress bar. Without a ``reference`` the model is the eager one."""
    bar = progress.add_task(title if reference is None else f"{title}, compiling", total=job.steps)
    compile_seconds = 0.0 if reference is None else _timed(lambda: _first_call(model, job.digits))[0]
    progress.reset(bar, description=title)
    with fastpar.generation():  # one run: displaced plans carry activations from step to step
        seconds, images = _timed(
            lambda: sample(
                model,
                job.digits,
                job.seed,
                steps=job.steps,
                on_step=lambda i, n: progress.update(bar, completed=i),
            )
        )
    error = 0.0 if reference is None else (images - reference).abs().max().item()
    max_abs_err, ranks_agree = _over_ranks(error, images)
    return Outcome(images.numpy(), compile_seconds, seconds, max_abs_err, ranks_agree)


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


@torch.no_grad()
def _first_call(model: torch.nn.Module, digits: tuple[int, ...]) -> None:
    """Compile: one call with inputs like the sampler's, so that its steps are timed without it."""
    with fastpar.generation():
        model(**guided_inputs(initial_noise(len(digits), seed=0), torch.tensor(999), torch.tensor(digits)))


def _over_ranks(error: float, images: Tensor) -> tuple[float, bool]:
    """The largest error of all ranks, and whether their images are the same bits."""
    mine = (error, hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
    every: list[tuple[float, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    errors = [e for e, _ in every]
    # Python's max drops a NaN that is not first
    worst = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    return worst, len({digest for _, digest in every}) == 1
