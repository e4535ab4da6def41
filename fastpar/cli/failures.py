"""Errors that a user can cause end a verb with their message and exit status 2, not with a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from fastpar.core.errors import FastparError
from fastpar.core.quiet import OPERATORS, quiet

FAILED = 1
"""Exit status where the verb ran and the answer is no: verification failed."""
MISTAKEN = 2
"""Exit status of an error in what was asked; the same as of an unknown option."""


def reported(verb: Callable[..., None]) -> Callable[..., None]:
    """``verb`` with errors of class FastparError printed, unless it was called with ``debug=True``."""

    @functools.wraps(verb)  # typer reads the options from the signature
    def run(*args: Any, **kwargs: Any) -> None:
        debug = kwargs.get("debug", False)
        try:
            with quiet(*([] if debug else [OPERATORS])):
                verb(*args, **kwargs)
        except FastparError as error:
            if debug:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(MISTAKEN) from error

    return run
