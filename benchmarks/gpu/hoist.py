"""PixArt and Wan with and without the pass ``hoist``, on one rank and as rank 0 of 8 on emulated NVLink.

Steps of one generation: the prompt is the same tensor in each of them, latents and time are not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import fastpar
from benchmarks.gpu.models import Made, make
from benchmarks.gpu.part import Part, run
from benchmarks.gpu.timing import extras, paired
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text

MODELS = ("pixart", "wan")
PLANS = {"ulysses=1": 1, "ulysses=8": 8}


def without(plan: str) -> str:
    """The plan's own pipeline, but for ``hoist``."""
    return ",".join(p for p in pipeline_text(Plan.parse(plan)).split(",") if not p.startswith("hoist"))


def called(made: Made, **options: Any) -> Callable[[], Any]:
    model = torch.compile(made.shared(), backend="fastpar", options=options)
    latents = [torch.randn_like(made.inputs["hidden_states"]) for _ in range(2)]
    times = [made.inputs["timestep"] - i for i in range(2)]
    step = [0]

    def call() -> Any:
        step[0] += 1
        i = step[0] % 2
        return model(**{**made.inputs, "hidden_states": latents[i], "timestep": times[i]})

    call()
    return call


def compared(part: Part, made: Made, plan: str) -> dict[str, Any]:
    """Milliseconds of a step from the second one on, and how many times faster with the pass."""
    ranks = PLANS[plan]
    with fastpar.emulate.start("h100-8", ranks=ranks) if ranks > 1 else nullcontext(), torch.no_grad():
        with fastpar.generation():
            runs = {
                "without": called(made, plan=plan, passes=without(plan)),
                "with": called(made, plan=plan),
            }
            found = paired(runs, part.device)
            return {"without_ms": found["without"]["ms"], "with_ms": found["with"]["ms"],
                    "speedup": found["with"]["speedup"], **extras(runs["with"], part.device)}  # fmt: skip


def body(part: Part) -> None:
    torch._dynamo.config.recompile_limit = 64
    for name in MODELS:
        made = part.given(name, lambda name=name: make(name, part.size, part.device))
        if made is None:
            continue
        for plan in PLANS:
            part.attempt(f"{name}, {plan}", lambda plan=plan, made=made: compared(part, made, plan))


if __name__ == "__main__":
    run(body)
