"""A part of the GPU suite that goes wrong in the way that its first entry's name says (``--match``)."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.part import Part, Unavailable, run


def body(part: Part) -> None:
    (how,) = part.match
    part.match = ()

    def fine() -> dict[str, float]:
        return {"ms": 1.5}

    def broken() -> None:
        raise ValueError("does not work\nat all")

    def absent() -> None:
        raise Unavailable("a library is not installed")

    part.attempt("fine", fine)
    part.attempt("broken" if how == "raises" else how, {
        "raises": broken, "misses": absent, "dies": lambda: os._exit(7), "hangs": lambda: time.sleep(600),
        "works": fine,
    }[how])  # fmt: skip
    part.seconds = 0.0
    part.attempt("late", fine)


if __name__ == "__main__":
    run(body)
