"""What a serving framework does: two replicas of two ranks in one world; then plans over several mesh axes.

Run by torchrun on four processes; prints one line per plan and rank, exits non-zero on any difference.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.test_cfg import Block, inputs

TOLERANCE = 1e-12


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, given = Block().double().eval().requires_grad_(False), inputs(2)
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "sp"))
    runs = [
        {"plan": "ulysses=2", "mesh": replicas["sp"]},
        {"plan": "ulysses=2,ring=2"},
        {"plan": "cfg=2,ring=2"},
        *({"plan": plan, "lowering": "inductor"} for plan in sys.argv[1:]),
    ]
    worst = 0.0
    with torch.no_grad():
        whole = model(*given)
        for options in runs:
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="fastpar", options=options)
            for _ in range(2):
                off = float((compiled(*given) - whole).abs().max())
                worst = max(worst, off)
            print(f"rank {dist.get_rank()}: {options['plan']} off by {off:.1e}\n", end="", flush=True)
    dist.destroy_process_group()
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
