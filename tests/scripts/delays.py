"""Plans on real processes that are late at random: ``torchrun --nproc-per-node=N -m tests.scripts.delays PLAN...``.

Every rank sleeps by its own dice before each exchange, each wait and each block of attention. Per plan and rank
one line; exits non-zero where a value is off, or its bits are not those of the other ranks and of a run on time.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fastpar.graph.program import Program
from fastpar.registry import LOWERINGS
from tests.test_ring import Joint

TOLERANCE = 1e-12
SECONDS = 0.02  # at most, of each delay
LATE = ("_c10d_functional", "fastpar.put", "fastpar.receive", "attention_lse")


def delayed(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
    """The eager lowering, late."""
    dice = random.Random(dist.get_rank())

    class Late(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if any(name in str(n.target) for name in LATE):
                time.sleep(dice.random() * SECONDS)
            return super().run_node(n)

    return lambda args: tuple(Late(program.gm).run(*args))


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    on_time, bad = LOWERINGS["eager"], 0
    torch.manual_seed(0)
    model = Joint(4).double().eval().requires_grad_(False)
    given = (torch.randn(2, 1, 12).double(), torch.randn(2, 11, 12).double())  # a text that is too short to split
    whole = torch.cat(model(*given), 1)
    for plan in sys.argv[1:]:
        digests, off = [], 0.0
        for lowering in (on_time, lambda: delayed):
            LOWERINGS["eager"] = lowering
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="fastpar", options={"plan": plan})
            for _ in range(2):
                out = torch.cat(compiled(*given), 1)
                off = max(off, float((out - whole).abs().max()))
                digests.append(hashlib.sha256(out.contiguous().numpy().tobytes()).hexdigest())
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, digests)
        same = {digest for of_rank in every for digest in of_rank} == {digests[0]}
        bad += not (same and off <= TOLERANCE)
        said = f"rank {dist.get_rank()}: {plan} off by {off:.1e}, bits {'equal' if same else 'DIFFER'}\n"
        print(said, end="", flush=True)
    dist.destroy_process_group()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
