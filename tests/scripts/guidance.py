"""Guidance in separate calls under ``cfg=2``: the pipeline's own loop, unchanged, on 2 or 4 real processes.

Run by torchrun with plans as arguments. Prints per rank and plan how far the last sample is from one process's,
and how many of the calls it ran; exits non-zero where that is not half of them.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from fastpar.run.stream import Dealt
from tests.test_cfg import Block, inputs

STEPS = 4


class Broken(Block):
    """The same with a graph break in the middle: what the first graph gives is used by the model itself."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        x = super().forward(x, t, prompt)
        torch._dynamo.graph_break()
        return super().forward(x, t, prompt)


def sample(model: torch.nn.Module) -> torch.Tensor:
    """Two calls per step, the prompts of different lengths; the result of a call is used in place."""
    x, t, prompt = inputs(1)
    for _ in range(STEPS):
        without = model(x, t, prompt[:, :3])
        given = model(x, t, prompt)
        without *= -1.5
        x = x - 0.1 * (without + 2.5 * given)
    return x


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ran = [0]
    run = Dealt.__call__

    def counted(self: Dealt, args: list[object]) -> object:
        program, self.run = self.run, lambda a: (ran.__setitem__(0, ran[0] + 1), program(a))[1]
        try:
            return run(self, args)
        finally:
            self.run = program

    Dealt.__call__ = counted  # type: ignore[method-assign,assignment]
    good = True
    with torch.no_grad():
        for plan in sys.argv[1:]:
            for kind, graphs in ((Block, 1), (Broken, 2)):
                torch.manual_seed(0)
                model = kind().double().eval().requires_grad_(False)
                whole = sample(model)
                torch._dynamo.reset()
                ran[0] = 0
                compiled = torch.compile(model, backend="fastpar", options={"plan": plan})
                off = float((sample(compiled) - whole).abs().max() / whole.abs().max())
                good &= off < 1e-12 and ran[0] == graphs * STEPS
                line = f"rank {dist.get_rank()}: {plan} {kind.__name__} off by {off:.1e}, ran {ran[0]} graphs\n"
                print(line, end="", flush=True)
    dist.destroy_process_group()
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
