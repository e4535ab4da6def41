"""``fastpar report``: what ``explain`` says, as one page that can be sent around."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from fastpar.cli.failures import FAILED, reported
from fastpar.cli.options import (
    Component,
    Debug,
    Dtype,
    Fake,
    Input,
    InputsFrom,
    Model,
    Passes,
    PlanText,
    Ranks,
    Seed,
    Steps,
    Streams,
    Topology,
    Transport,
)


@reported
def report(
    model: Model,
    plan: PlanText = "auto",
    ranks: Ranks = None,
    topology: Topology = None,
    transport: Transport = "two-sided",
    inputs: InputsFrom = None,
    input: Input = None,
    fake: Fake = False,
    dtype: Dtype = None,
    passes: Passes = None,
    component: Component = None,
    seed: Seed = 0,
    steps: Steps = None,
    streams: Streams = 1,
    verify: Annotated[bool, typer.Option("--verify", help="Also prove it, as the verb verify does.")] = False,
    out: Annotated[Path, typer.Option("--out", help="The page to write (.html).")] = Path("report.html"),
    debug: Debug = False,
) -> None:
    """Write what a plan does to a model as one HTML page, which loads nothing and runs no script.

    With --topology it has predicted times, a picture of the ranks in time, and every plan that was weighed. Exit
    status 1 if --verify finds that the plan does not hold; the page is written and says so.
    """
    from fastpar.cli.capture import captured
    from fastpar.cli.models import load
    from fastpar.cli.timelines import check_file, check_files
    from fastpar.core.errors import OptionError
    from fastpar.core.files import write_whole
    from fastpar.core.record import command
    from fastpar.graph.capture import fake_mode_of
    from fastpar.report.page import page
    from fastpar.run.verify import explain
    from fastpar.run.verify import verify as prove

    check_files(None, None, topology, steps)
    check_file("--out", out, ".html")
    if verify and fake:
        raise OptionError("--verify runs the model, and with --fake it has no weights; leave one of them out")
    loaded = load(model, inputs, input or (), dtype, seed, fake, component)
    if verify and fake_mode_of(loaded.model, loaded.inputs) is not None:
        raise OptionError("--verify runs the model, and this one is on fake tensors")
    graphs = captured(loaded)
    found = explain(graphs, plan=plan, ranks=ranks, passes=passes, topology=topology, timeline=topology is not None,
                    steps=steps, streams=streams, transport=transport)  # fmt: skip
    verdict = None
    if verify:
        verdict = prove(graphs, plan=plan, ranks=ranks, passes=passes, topology=topology, transport=transport)
        found.notes += [note for note in verdict.notes if note not in found.notes]
    text = page(found, model, verdict=verdict, command=command(("--out",)), made=_made())
    try:
        write_whole(out, text.encode("utf-8", "replace"))
    except OSError as error:
        raise OptionError(f"--out: cannot write {str(out)!r}: {error}") from error
    said = "" if verdict is None else ", verified" if verdict.ok else ", FAILED to verify"
    typer.echo(f"{out}: {found.plan} on {found.ranks} ranks{said}")
    if verdict is not None and not verdict.ok:
        raise typer.Exit(FAILED)


def _made() -> str:
    return f"{datetime.now(UTC).date().isoformat()}, torch {version('torch')}"
