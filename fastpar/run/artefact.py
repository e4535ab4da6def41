"""The compiled artefact: named programs, the state between them, and how a call runs them.

A plan without state has one program, ``step``. Where the pass ``hoist`` found something there are three: ``prologue``
gives the state, ``step`` takes it after its inputs, and ``check`` tells whether it is still the right one
(``fastpar.run.hoisted``). A displaced plan has two artefacts, of which each call runs one (``fastpar.run.displaced``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Runner = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class StateSpec:
    """A tensor that lives between calls: its name, this rank's shape and strides, and dtype."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any


def _step(artefact: Artefact, args: list[Any]) -> Sequence[Any]:
    return artefact.programs["step"](args)


@dataclass
class Artefact:
    """What one compile leaves behind: callable on the flat inputs of the captured graph.

    ``select(artefact, args)`` runs those of the programs that the call needs, and gives the outputs.
    """

    programs: Mapping[str, Runner]
    state: tuple[StateSpec, ...] = ()
    select: Callable[[Artefact, list[Any]], Sequence[Any]] = field(default=_step)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        return self.select(self, args)
