"""Displaced plans on real processes: what every rank gets is what N virtual ranks get from the same steps.

Run by torchrun with plans as arguments (``+shards``: weights in parts; ``+inductor``; ``+new``: the prompt is another
tensor in every call, and what depends on it alone is hoisted until that shows). A sampler calls the model twice per
step, with a prompt and without one. Prints per rank and plan how far the last step is from that of virtual ranks, and
from one device; exits non-zero where the first is wrong, or the second so small that nothing can have been late.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

import fastpar
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text
from fastpar.run.stream import PATIENCE
from tests.test_cfg import Block

STEPS = 5


def model() -> Block:
    torch.manual_seed(0)
    return Block().double().eval().requires_grad_(False)


def steps(prompt: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(1)
    x, drift = torch.randn(1, 11, 12).double(), torch.randn(1, 11, 12).double()
    return [(x + 0.1 * i * drift, torch.full((1,), 1 - i / 10).double(), prompt) for i in range(STEPS)]


def sampled(plan: str, more: list[str], prompts: list[Tensor]) -> list[Tensor]:
    """The last step's result of each stream."""
    torch._dynamo.reset()
    one = model()
    options = {"plan": plan, "lowering": "inductor" if "inductor" in more else "eager"}
    if "new" in more:
        options["passes"] = pipeline_text(Plan.parse(plan)).replace("hoist,", "hoist{always=true},")
    compiled = torch.compile(one, backend="fastpar", options=options)
    shards = fastpar.shard_weights(one) if "shards" in more else None
    calls = [steps(prompt) for prompt in prompts]
    with fastpar.generation(streams=2 if "new" in more else None):
        for number in [*[0] * (2 * PATIENCE if "new" in more else 0), *range(STEPS)]:
            given = [call[number] for call in calls]
            results = [compiled(x, t, p.clone() if "new" in more else p) for x, t, p in given]
    if shards is not None:
        shards.restore()
    return [result.clone() for result in results]


def main() -> int:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, failed = dist.get_rank(), False
    torch.manual_seed(2)
    prompts = [torch.randn(1, 5, 6).double(), torch.randn(1, 5, 6).double()]
    for text in sys.argv[1:]:
        plan, *more = text.split("+")
        with torch.no_grad():
            for prompt, result in zip(prompts, sampled(plan, more, prompts), strict=True):
                calls = steps(prompt)
                virtual = fastpar.simulate(model(), list(calls), plan=plan)[rank]
                off, late = (float((result - x).abs().max()) for x in (virtual, model()(*calls[-1])))
                failed |= not off < 1e-12 or not 1e-6 < late < 1
                print(f"{text} rank {rank}: {off:.1e} from virtual ranks, {late:.1e} from one device", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
