"""Rank 0 of 8 on emulated links: fastpar's plans, its passes switched on one by one, and peers, in one run.

Every entry is measured in turns with the first one (our Ulysses without Inductor), as soon as it is compiled. On the
other topologies programs that do not depend on links are measured as they are; what fastpar chooses by the links is
compiled anew. A second pass does the less telling half, so that a budget that ends has seen all topologies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastpar
from benchmarks.gpu.models import Made, make
from benchmarks.gpu.part import Part, run
from benchmarks.gpu.peers import PEERS, arrived
from benchmarks.gpu.timing import extras, paired
from fastpar import emulate
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text

RANKS = 8
TOPOLOGIES = {"h100-8": "NVLink", "l40-8": "PCIe 4", "h100-2x4": "two machines"}
FIRST = next(iter(TOPOLOGIES))

ENDS = {
    "as written": "lower",
    "+ split-weights": "lower,split-weights",
    "+ hoist": "lower,split-weights,hoist",
    "+ pack": "lower,split-weights,hoist,pack",
}
"""Pipelines' ends with passes switched on in turn; the next step, with ``overlap``, is what a plan expands to."""


@dataclass(frozen=True)
class Ours:
    """One of fastpar's plans, how it is lowered, and its pipeline if it is not the plan's own."""

    plan: str
    end: str | None = None
    lowering: str | None = None
    cudagraphs: bool = False

    def build(self, model: Any, topology: str) -> Callable[..., Any]:
        options: dict[str, Any] = {"plan": self.plan, "topology": topology}
        if self.end is not None:
            text = pipeline_text(Plan.parse(self.plan))
            options["passes"] = text[: text.index("lower")] + self.end
        if self.lowering is not None:
            options["lowering"] = self.lowering
        if self.cudagraphs:
            options["cudagraphs"] = True
        return torch.compile(model, backend="fastpar", options=options)


OURS: dict[str, Ours] = {
    "fastpar ulysses=8, eager": Ours("ulysses=8", lowering="eager"),
    "fastpar ulysses=8": Ours("ulysses=8"),
    "fastpar ulysses=8, cudagraphs": Ours("ulysses=8", cudagraphs=True),
    "fastpar ulysses=8,fp8(qvo)": Ours("ulysses=8,fp8(qvo)"),
    "fastpar ring=8": Ours("ring=8"),
    "fastpar torus=2,ulysses=4": Ours("torus=2,ulysses=4"),
    "fastpar auto": Ours("auto"),
    **{f"fastpar ulysses=8, {step}": Ours("ulysses=8", end) for step, end in ENDS.items()},
    "fastpar ulysses=4,ring=2": Ours("ulysses=4,ring=2"),
    "fastpar tp=8": Ours("tp=8"),
    "fastpar gather=8": Ours("gather=8"),
    "fastpar gather=8,displaced": Ours("gather=8,displaced(warmup=1)"),
}
"""Name -> plan; the first is what all others are compared with."""
ORDER = (
    *list(OURS)[:3],
    *list(PEERS)[:4],
    *list(OURS)[3:7],
    *list(PEERS)[4:6],
    *list(OURS)[7:],
    *list(PEERS)[6:],
)
"""The most telling first: the budget ends somewhere."""
TELLING = 7


def called(made: Made, name: str, topology: str) -> Callable[[], Any]:
    """A call of an entry, compiled and run once."""
    model = made.shared()
    split = OURS[name].build(model, topology) if name in OURS else PEERS[name](model, RANKS)
    steps = fastpar.generation(streams=1)  # calls are steps of one sampling run, though they have the same inputs

    def call() -> torch.Tensor:
        with steps:
            return arrived(split(**made.inputs)[0])

    out = call()
    whole = made.inputs["hidden_states"].shape
    if tuple(out.shape) != tuple(whole):
        raise ValueError(f"gives {tuple(out.shape)} instead of {tuple(whole)}: not the whole output")
    return call


def body(part: Part) -> None:
    torch._dynamo.config.recompile_limit = 64
    made = part.given(part.model, lambda: make(part.model, part.size, part.device))
    if made is None:
        return
    with emulate.start(FIRST, rank=0, ranks=RANKS) as emulation, torch.no_grad():
        reference = part.given(ORDER[0], lambda: called(made, ORDER[0], FIRST))
        if reference is None:
            return
        runs: dict[str, Callable[[], Any]] = {ORDER[0]: reference}

        def one(name: str, topology: str) -> dict[str, Any]:
            if name not in runs or (name != ORDER[0] and name in OURS and topology != FIRST):
                runs[name] = called(made, name, topology)
            call = runs[name]
            found = paired({ORDER[0]: reference, name: call}, part.device, rounds=5)[name]
            emulation.reset()
            call()
            return {**found, **exchanged(emulation), **extras(call, part.device)}

        for names in (ORDER[:TELLING], ORDER[TELLING:]):
            failed = set[str]()
            for topology in TOPOLOGIES:
                emulation.move(topology)
                for name in names:
                    if name not in failed:  # what does not run on one topology runs on none
                        done = part.attempt(f"{topology}: {name}", partial(one, name, topology))
                        failed |= {name} if not done and part.left > 0 else set()


def exchanged(emulation: Any) -> dict[str, Any]:
    """Exchanges of the last call, and how long its links were busy."""
    tallies = emulation.tallies.values()
    return {"exchanges": sum(t.count for t in tallies), "mb": sum(t.bytes for t in tallies) / 1e6,
            "link_ms": 1e3 * sum(t.seconds for t in tallies)}  # fmt: skip


if __name__ == "__main__":
    run(body)
