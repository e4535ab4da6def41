"""``fastpar demo``: the trained sampler on several processes of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastpar.cli.failures import FAILED, reported
from fastpar.cli.options import Debug


@reported
def demo(
    ranks: Annotated[int, typer.Option(min=1, help="Processes to start.")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("demo.png"),
    plan: Annotated[list[str] | None, typer.Option(help="A plan to show; repeat it for more.")] = None,
    debug: Debug = False,
) -> None:
    """Sample digits on several processes of this machine and compare them with one process."""
    from fastpar.demo.main import run_demo

    if not run_demo(ranks, out, steps, plan).ok:
        raise typer.Exit(FAILED)
