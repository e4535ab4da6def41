"""Plans with ``steps`` on real processes: what every rank samples is what N virtual ranks sample.

Run by torchrun with plans as arguments (``+inductor``; ``+dealt``: guidance, with the calls of a step dealt to the
halves of ``cfg=2``; ``+stops``: the sampler stops in the middle of a cycle). Prints per rank and plan how far the
result is from that of virtual ranks and from one device, and how many calls ran the model; exits non-zero where the
first is wrong, or the second so small that nothing can have been late.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastpar
from tests.sampling import alone, stepped, time, virtually
from tests.test_displaced import Patches

TIMES = [1.0, 0.9, 0.8, 0.66, 0.5, 0.41, 0.3, 0.2, 0.1, 0.0]


def model() -> Patches:
    torch.manual_seed(0)
    return Patches().double().eval().requires_grad_(False)


def sampled(plan: str, more: list[str], x: Tensor, times: list[float]) -> Tensor:
    torch._dynamo.reset()
    options = {"plan": plan, "lowering": "inductor" if "inductor" in more else "eager"}
    compiled: Any = torch.compile(model(), backend="fastpar", options=options)
    with fastpar.generation() as run:
        for now, following in zip(times, times[1:], strict=False):
            velocity = compiled(x, time(now, len(x)))
            if "dealt" in more:  # another branch, which is the other half's
                velocity = 0.5 * velocity + 0.5 * compiled(x, time(now, len(x)))
            x = run.gather(stepped(x, velocity, now, following), now=following == times[-1])
    return x


def main() -> int:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, failed = dist.get_rank(), False
    torch.manual_seed(1)
    x = torch.randn(1, 2, 12, 6).double()
    for text in sys.argv[1:]:
        plan, *more = text.split("+")
        times = TIMES[:-1] if "stops" in more else TIMES
        with torch.no_grad():
            result = sampled(plan, more, x, times)
            virtual = virtually(model(), plan.replace("cfg=2,", ""), x, times)[0]
            off, late = (float((result - other).abs().max()) for other in (virtual, alone(model(), x, times)))
        failed |= not off < 1e-12 or not 1e-6 < late < 1
        print(f"{text} rank {rank}: {off:.1e} from virtual ranks, {late:.1e} from one device", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
