"""What the parts share: their command line, and rows that are written as they come."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SIZES = {
    "full": "as published: FLUX.1-dev's 12B parameters, 4096 + 512 tokens (2048 pixels: 16384)",
    "short": "as wide as published, a quarter as deep",
    "tiny": "small enough for a CPU in a test; its times mean nothing",
}


MODEL = "flux"
"""What the parts measure that take any model; ``models.MODELS`` has the others."""


class Unavailable(Exception):
    """What an entry needs is not here; its message says what."""


@dataclass
class Part:
    """One part while it runs. ``attempt`` runs an entry and writes its row, its error or why it was left out."""

    size: str
    seconds: float
    out: Path | None = None
    match: tuple[str, ...] = ()
    model: str = MODEL
    began: float = field(default_factory=time.time)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.time() - self.began)

    def need_cuda(self, what: str) -> None:
        if not self.cuda:
            raise Unavailable(f"{what} needs a CUDA device, and torch finds none")

    def wanted(self, name: str) -> bool:
        return not self.match or any(text in name for text in self.match)

    def attempt(self, name: str, run: Callable[[], Mapping[str, Any] | None]) -> bool:
        """Whether ``run`` gave a result (written as a row unless it is None). Errors go to the row, none further."""
        if not self.wanted(name):
            return False
        if self.left <= 0:
            return self._row({"name": name, "skipped": f"the part's {self.seconds:.0f} s were over"})
        self._write({"begun": name})
        try:
            found = run()
        except Unavailable as error:
            return self._row({"name": name, "skipped": str(error)})
        except Exception as error:  # whatever a peer or a compiler raises is a result of this entry
            text = f"{type(error).__name__}: {error}"
            details = traceback.format_exc(limit=-4)[-2000:]
            error.__traceback__ = None
            gc.collect()
            return self._row({"name": name, "error": text[:600], "details": details})
        self._row({"name": name, **(found or {})})
        return True

    def given(self, name: str, make: Callable[[], T]) -> T | None:
        """What other entries need; a row is written only where it cannot be had."""
        try:
            return make()
        except Unavailable as error:
            self.skip(name, str(error))
        except Exception as error:
            self._row({"name": name, "error": f"{type(error).__name__}: {error}"[:600]})
        return None

    def skip(self, name: str, why: str) -> None:
        """Say why an entry is not there."""
        self._row({"name": name, "skipped": why})

    def end(self) -> None:
        """Nothing follows: a process that is stopped from now on has lost nothing."""
        self._write({"ended": True})

    def _row(self, row: dict[str, Any]) -> bool:
        self.rows.append(row)
        self._write(row)
        return False

    def _write(self, row: Mapping[str, Any]) -> None:
        if self.out is not None:
            with self.out.open("a") as to:
                to.write(json.dumps(row, default=str) + "\n")


def run(body: Callable[[Part], None]) -> None:
    """A part as a command: ``python -m benchmarks.gpu.links --size tiny``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--model", default=MODEL, help="of benchmarks/gpu/models.py, where a part takes any")
    parser.add_argument("--budget", type=float, default=600.0)
    parser.add_argument("--match", action="append", default=[])
    parser.add_argument("--rows", type=Path, help="a file for the rows, as they come")
    parser.add_argument("--began", type=float, default=time.time(), help="since when the budget counts (epoch)")
    args = parser.parse_args()
    part = Part(args.size, args.budget, args.rows, tuple(args.match), args.model, args.began)
    if part.cuda or part.size == "tiny":
        body(part)
    else:
        part.skip("(part)", f"size {part.size!r} needs a CUDA device, and torch finds none; --size tiny needs none")
    part.end()
    if args.rows is None:
        print(json.dumps(part.rows, indent=1, default=str))
