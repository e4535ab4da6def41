"""``fastpar``: the verbs, and nothing else. What a verb needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from fastpar.cli.bench import bench
from fastpar.cli.demo import demo
from fastpar.cli.doctor import doctor
from fastpar.cli.explain import explain
from fastpar.cli.opt import opt
from fastpar.cli.report import report
from fastpar.cli.run import run
from fastpar.cli.verify import verify
from fastpar.core.version import VERSION

# Typer's own tracebacks are long and show values of locals; a bug is reported with Python's.
app = typer.Typer(name="fastpar", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def fastpar(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One device's diffusion model as the program of one rank of N, proved equal."""


for verb in (demo, verify, explain, opt, run, bench, report, doctor):
    app.command()(verb)
