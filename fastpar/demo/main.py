"""``fastpar demo``: one sampler on N processes of this machine, plan by plan, against one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpar.core.errors import FastparError
from fastpar.core.plan import Plan
from fastpar.demo.model import load_digits
from fastpar.demo.picture import write_grid
from fastpar.demo.plans import available_plans
from fastpar.demo.sampler import guided_inputs, initial_noise
from fastpar.demo.worker import Job, work
from fastpar.run.launch import launch

TOLERANCE = 1e-4
"""Largest difference, in float32 and after all steps, that counts as the same image. Pixels span -1..1."""
NEAR = 1.0
"""The same for a plan that is lossy on purpose: a pixel may be off, a digit not gone."""

SEED = 0

HEADINGS = (
    "ranks",
    "col-\nlec-\ntives",
    "kB",
    "FLOPs\nshare",
    "largest\ndiff.",
    "ranks\nagree",
    "compile\ns",
    "sample\ns",
)


@dataclass(frozen=True)
class PlanResult:
    """One line of the table. ``lossy``: the plan does not compute the model's own function, and says so by name.

    ``collectives`` and ``bytes_per_rank`` (the payload that the busiest rank sends) are per denoising step,
    ``flops_share`` is the largest rank's FLOPs over those of one process.
    """

    plan: str
    ranks: int
    collectives: int
    bytes_per_rank: float
    flops_share: float
    max_abs_err: float
    ranks_agree: bool
    compile_seconds: float
    seconds: float
    lossy: bool = False

    @property
    def ok(self) -> bool:
        """Whether the images are those of one process, on every rank. A NaN is not."""
        return self.max_abs_err <= (NEAR if self.lossy else TOLERANCE) and self.ranks_agree


@dataclass(frozen=True)
class DemoResult:
    """Everything that was shown. ``alone_seconds`` is the sampling time of the eager model."""

    plans: tuple[PlanResult, ...]
    alone_seconds: float
    out: Path

    @property
    def ok(self) -> bool:
        """Whether every plan drew what one process draws."""
        return all(plan.ok for plan in self.plans)


def run_demo(
    ranks: int = 4,
    out: str | Path = "demo.png",
    steps: int = 20,
    plans: Sequence[str] | None = None,
    digits: Sequence[int] = tuple(range(10)),
    *,
    console: Console | None = None,
    _backend: str = "fastpar",
    _explain: Callable[..., Any] | None = None,
) -> DemoResult:
    """Sample ``digits`` alone and through every plan on ``ranks`` gloo processes; print a table, write a PNG.

    ``plans`` are plan texts (default: :func:`fastpar.demo.plans.available_plans`), each one's degrees
    multiplying to ``ranks``. The picture ``out`` has a row for one process and one per plan.

    Raises ``FastparError`` for a plan that cannot run and ``LaunchError``, a kind of it, where a process
    fails; ``ValueError`` for ranks, steps or digits out of range. A difference is no exception: see ``ok``.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, not {ranks}")
    console = console or Console()
    texts = tuple(plans) if plans else available_plans(ranks)
    # Before the launch: a plan that cannot run then fails at once, with one message instead of one per rank.
    with console.status("planning"):
        explained = [_explained(text, ranks, digits, _explain) for text in texts]
    alone, *outcomes = launch(work, Job(texts, tuple(digits), steps, SEED, _backend), ranks)
    results = tuple(
        PlanResult(
            plan=text,
            ranks=ranks,
            collectives=sum(c.count for c in facts.collectives),
            bytes_per_rank=facts.bytes_per_rank,
            flops_share=facts.flops_share,
            max_abs_err=outcome.max_abs_err,
            ranks_agree=outcome.ranks_agree,
            compile_seconds=outcome.compile_seconds,
            seconds=outcome.seconds,
            lossy=bool(Plan.parse(text).lossy),
        )
        for text, facts, outcome in zip(texts, explained, outcomes, strict=True)
    )
    titles = ("one process", *texts)
    pictures = (torch.from_numpy(outcome.images) for outcome in (alone, *outcomes))
    write_grid(out, list(zip(titles, pictures, strict=True)))
    result = DemoResult(results, alone.seconds, Path(out))
    _show(result, console)
    return result


def _explained(plan: str, ranks: int, digits: Sequence[int], explain: Callable[..., Any] | None) -> Any:
    if explain is None:
        import fastpar  # late: only here is the compiler itself needed

        explain = fastpar.explain
    inputs = guided_inputs(initial_noise(len(digits), SEED), torch.tensor(999), torch.tensor(digits))
    return explain(load_digits(), inputs, plan=plan, ranks=ranks)


def _show(result: DemoResult, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("plan", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    table.add_row("one process", "1", "", "", "1.000", "", "", "", f"{result.alone_seconds:.1f}")
    for p in result.plans:
        style = None if p.ok else "bold red"
        table.add_row(
            p.plan,
            str(p.ranks),
            str(p.collectives),
            f"{p.bytes_per_rank / 1e3:.0f}",
            f"{p.flops_share:.3f}",
            f"{p.max_abs_err:.1e}",
            "yes" if p.ranks_agree else "NO",
            f"{p.compile_seconds:.1f}",
            f"{p.seconds:.1f}",
            style=style,
        )
    console.print(table)
    console.print(
        "Collectives and kB (what the busiest rank sends) are per denoising step.\n"
        "Ranks share this machine's cores: the seconds do not show how a plan scales."
    )
    lossy = [p.plan for p in result.plans if p.lossy]
    if lossy:
        console.print(f"Lossy, as asked: {', '.join(lossy)}.")
    console.print(f"picture: {result.out}", soft_wrap=True)
    if not result.ok:
        console.print(f"FAILED: a difference above {TOLERANCE:g}, or ranks that disagree", style="bold red")


def demo(
    ranks: Annotated[int, typer.Option(min=1, help="processes to start")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="denoising steps")] = 20,
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("demo.png"),
    plan: Annotated[list[str] | None, typer.Option(help="a plan to show; repeat it for more")] = None,
) -> None:
    """Sample digits on several processes of this machine and compare them with one process."""
    try:
        result = run_demo(ranks, out, steps, plan)
    except FastparError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from error
    if not result.ok:
        raise typer.Exit(1)
