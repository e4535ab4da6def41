"""FLUX's step on one device: eager, Inductor's modes and fastpar, each in turns with eager, then all in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.models import Made, make
from benchmarks.gpu.part import Part, Unavailable, run
from benchmarks.gpu.timing import extras, paired


def _ours(**options: Any) -> Callable[[Any], Any]:
    return lambda model: torch.compile(model, backend="fastpar", options={"plan": "ulysses=1", **options})


def _graphs(model: Any) -> Any:
    if not torch.cuda.is_available():
        raise Unavailable("CUDA graphs need a CUDA device")
    return torch.compile(model, mode="reduce-overhead")


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "inductor": torch.compile,
    "fastpar": _ours(),
    "reduce-overhead": _graphs,
    "fastpar, cudagraphs": _ours(cudagraphs=True),
    "max-autotune": lambda model: torch.compile(model, mode="max-autotune"),
}
"""Name -> what makes a model of a model; the first is what others are compared with."""


def ready(made: Made, build: Callable[[Any], Any]) -> Callable[[], Any]:
    """A call of one variant, compiled. Raises what compiling raises."""
    model = build(made.shared())

    def call() -> Any:
        return model(**made.inputs)

    call()
    return call


def body(part: Part) -> None:
    torch._dynamo.config.recompile_limit = 64  # variants share the code of one forward
    made = part.given(part.model, lambda: make(part.model, part.size, part.device))
    if made is None:
        return
    with torch.no_grad():
        eager = part.given("eager", lambda: ready(made, VARIANTS["eager"]))
        if eager is None:
            return
        runs: dict[str, Callable[[], Any]] = {"eager": eager}

        def one(name: str) -> dict[str, Any]:
            call = eager if name == "eager" else ready(made, VARIANTS[name])
            found = paired({"eager": eager, name: call}, part.device, rounds=5)[name]
            runs[name] = call
            return {**found, **extras(call, part.device)}

        *most, last = VARIANTS
        for name in most:
            part.attempt(name, partial(one, name))
        if part.left > 0 and len(runs) > 1:
            for name, found in paired(runs, part.device, rounds=5).items():
                part.attempt(f"{name} (all in turns)", partial(dict, found))
        part.attempt(last, partial(one, last))  # may take longer to tune than there is time


if __name__ == "__main__":
    run(body)
