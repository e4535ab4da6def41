"""``eager``: the localised fx module as it is. Needs no compiler; the default on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fastpar.backends.ranges import marked, under_profilers
from fastpar.graph.forward import forwarded
from fastpar.graph.program import Program


def compile_eager(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
    """A function from the flat inputs to the flat outputs of this rank's program."""
    gm = forwarded(program.gm)
    return under_profilers(program.name, _runner(gm), lambda: _runner(marked(gm)))


def _runner(module: fx.GraphModule) -> Callable[[list[Any]], Sequence[Any]]:
    def run(args: list[Any]) -> Sequence[Any]:
        return tuple(module(*args))

    return run
