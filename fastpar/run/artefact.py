"""The compiled artefact: named programs, the state between them, and which one a call runs.

A synchronous plan has one program and no state. Displaced plans have three (synchronous,
first displaced, steady) over one state; the shape is here from the start so that every
caller already goes through the selector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Runner = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class StateSpec:
    """A buffer that lives between calls: its name, local shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: Any


def _only(programs: Mapping[str, Runner]) -> str:
    return next(iter(programs))


@dataclass
class Artefact:
    """What one compile leaves behind: callable on the flat inputs of the captured graph."""

    programs: Mapping[str, Runner]
    state: tuple[StateSpec, ...] = ()
    select: Callable[[Mapping[str, Runner]], str] = field(default=_only)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        return self.programs[self.select(self.programs)](args)
