"""Hoisted values on real processes: what changes between the calls of a sampler, and results that stay right.

Run by torchrun with plans as arguments (``+shards``: weights in parts; ``+columns``: ranks share out what they would
repeat; ``+one-sided``). Prints per rank and plan how far the worst result is from eager's and which programs ran; exits
non-zero where a result is wrong, ranks differ, a prologue ran more or less often than it must, or threads of gloo's are
left after ``destroy_process_group``: the models are alive then, and must not keep groups alive.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastpar
import fastpar.backend as backend
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text
from fastpar.run.artefact import Artefact
from tests.test_hoist import Denoiser, prompt, sample

RAN: Counter[str] = Counter()
ALIVE: list[Sampler] = []


def watching(*args: Any) -> Artefact:
    artefact = MAKE(*args)

    def counted(name: str, run: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        return lambda given: (RAN.update([name]), run(given))[1]

    artefact.programs = {name: counted(name, run) for name, run in artefact.programs.items()}
    return artefact


MAKE = backend.artefact_of


class Sampler:
    """The compiled model beside the model; every call is compared, on this rank and between ranks."""

    def __init__(self, plan: str, shards: bool, columns: bool, transport: str) -> None:
        torch.manual_seed(0)
        self.model = Denoiser(refine=True).double().eval().requires_grad_(False)
        other = Denoiser(refine=True).double().eval().requires_grad_(False)
        other.load_state_dict(self.model.state_dict())
        torch._dynamo.reset()
        options = {"plan": plan, "transport": transport}
        if columns:
            text = pipeline_text(Plan.parse(plan))
            for name in ("split-weights", "hoist"):
                text = text.replace(name, f"{name}{{always=true}}")
            options["passes"] = text
        self.compiled = torch.compile(other, backend="fastpar", options=options)
        self.other, self.shards = other, fastpar.shard_weights(other) if shards else None
        self.worst, self.digest = 0.0, hashlib.sha256()

    def __call__(self, x: Tensor, t: Tensor, p: Tensor) -> None:
        expected, found = self.model(x, t, p), self.compiled(x, t, p).clone()
        self.worst = max(self.worst, float((found - expected).abs().max() / expected.abs().max()))
        self.digest.update(found.contiguous().numpy().tobytes())

    def merge(self, sign: int) -> None:
        """A LoRA into weights that the prologue reads, and out again; on both models."""
        delta = torch.outer(torch.arange(24.0), torch.arange(12.0)).double()
        for model in (self.model, self.other):
            model.kv[0].weight.data += sign * delta


    def merge_a_part(self) -> None:
        """Into rows that only the last rank's part of the weight has, and so only its check sees."""
        last, mine = dist.get_world_size() - 1, dist.get_rank()
        if self.shards is None:
            for model in (self.model, self.other):
                model.kv[0].weight.data[-1] += 1.0
            return
        weight = self.shards.weights["kv.0.weight"]
        assert weight.held is not None and not weight.layout.is_whole
        self.model.kv[0].weight.data[weight.layout.dims[0].rows(weight.where[0], last)[-1]] += 1.0
        if mine == last:
            weight.held.data[-1] += 1.0


def took(**expected: int) -> bool:
    """Whether these programs ran on this rank since this was last asked."""
    good = dict(RAN) == {k: v for k, v in expected.items() if v}
    if not good:
        print(f"rank {dist.get_rank()}: ran {dict(RAN)}, expected {expected}", flush=True)
    RAN.clear()
    return good


def run(plan: str) -> bool:
    name, *more = plan.split("+")
    shards, columns = "shards" in more, "columns" in more
    mine = Sampler(name, shards, columns, "one-sided" if "one-sided" in more else "two-sided")
    ALIVE.append(mine)
    x, t = sample()
    ps = [prompt(1, 7), prompt(2, 7)]
    share = 2 if name == "cfg=2" else 1  # separate calls are dealt: a rank runs every other one
    good = True
    with fastpar.generation():  # two calls per step
        for _ in range(3):
            x, t = sample()
            for p in ps:
                mine(x, t, p)
    good &= took(prologue=2 // share, step=6 // share, check=6 // share)
    if share == 1:
        with fastpar.generation():
            p = prompt(3, 7)
            mine(*sample(), p)
            mine(*sample(), p)
            good &= took(prologue=1, step=2, check=2)
            p.data.copy_(prompt(4 if dist.get_rank() == 0 else 5, 7))
            dist.broadcast(p.data, 0)  # into the same tensor, and no version of it changes
            mine(*sample(), p)
            good &= took(prologue=1, step=2, check=1)
            for sign in () if shards else (1, -1):
                mine.merge(sign)
                mine(*sample(), p)
                good &= took(prologue=1, step=2, check=1)
            if shards or columns:
                mine.merge_a_part()
                mine(*sample(), p)
                good &= took(prologue=1, step=2, check=1)  # on all ranks: they agree
            for seed in range(12):  # always another prompt: soon it varies, and the program is split anew
                mine(*sample(), prompt(seed, 7))
            RAN.clear()
    else:
        try:
            with fastpar.generation():
                mine(*sample(), ps[0])
                raise RuntimeError("the user had enough")
        except RuntimeError:
            good &= took(**({"prologue": 1, "step": 1, "check": 1} if dist.get_rank() == 0 else {}))
        with fastpar.generation():  # the first call of a run is the first half's again
            mine(*sample(), ps[0])
            good &= took(**({"prologue": 1, "step": 1, "check": 1} if dist.get_rank() == 0 else {}))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine.digest.hexdigest())
    good &= mine.worst < 1e-12 and len(set(every)) == 1
    print(f"rank {dist.get_rank()}: {plan} off by {mine.worst:.1e}\n", end="", flush=True)
    return good


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    backend.artefact_of = watching
    with torch.no_grad():
        good = all([run(plan) for plan in sys.argv[1:]])
    at_work = workers()
    dist.destroy_process_group()
    if not at_work or workers():
        print(f"rank {os.environ['RANK']}: {at_work} threads of gloo's before, {workers()} after the end", flush=True)
        return 1
    return int(not good)


def workers() -> int:
    """Threads in which gloo runs collectives."""
    names = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo_runloop" in name for name in names)


if __name__ == "__main__":
    sys.exit(main())
