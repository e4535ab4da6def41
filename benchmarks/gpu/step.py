"""FLUX's step on one device: eager, Inductor's modes and fastpar, each in turns with eager, then all in turns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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


def _tuned(model: Any) -> Callable[..., Any]:
    """Ours with what the mode ``max-autotune`` sets, while it compiles."""
    from torch._inductor import config, list_mode_options

    options = {k: v for k, v in list_mode_options("max-autotune").items() if k != "triton.cudagraphs"}
    compiled, done = _ours(cudagraphs=torch.cuda.is_available(), lowering="inductor")(model), list[bool]()

    def call(**inputs: Any) -> Any:
        with nullcontext() if done else config.patch(options):
            result = compiled(**inputs)
        if not done:
            done.append(True)
        return result

    return call


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "eager": lambda model: model,
    "inductor": torch.compile,
    "fastpar": _ours(),
    "reduce-overhead": _graphs,
    "fastpar, cudagraphs": _ours(cudagraphs=True),
    "fastpar, max-autotune": _tuned,
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

        tuned = [name for name in VARIANTS if "max-autotune" in name]  # may take longer than there is time
        for name in (name for name in VARIANTS if name not in tuned):
            part.attempt(name, partial(one, name))
        if part.left > 0 and len(runs) > 1:
            for name, found in paired(runs, part.device, rounds=5).items():
                part.attempt(f"{name} (all in turns)", partial(dict, found))
        for name in tuned:
            part.attempt(name, partial(one, name))


if __name__ == "__main__":
    run(body)
