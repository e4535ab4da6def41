"""Plans that round on real processes: the rounded function of one device, the same bits on all ranks.

Run by torchrun; takes pairs of a plan and a lowering, prints one line per pair and rank, exits non-zero where bits
differ between ranks or values from those of the virtual ranks.
"""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.distributed as dist

import fastpar
from fastpar.run.build import build
from fastpar.run.rounded import rounded
from tests.test_cfg import Block, inputs


def main() -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, given = Block().double().eval().requires_grad_(False), inputs(2)
    recorded = fastpar.capture(model, given).programs[0]
    bad = False
    with torch.no_grad():
        whole = model(*given)
        for text in sys.argv[1:]:
            plan, _, lowering = text.partition(":")
            one = rounded(build(recorded.program, plan).lowered, list(recorded.args)).outputs[0]
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="fastpar", options={"plan": plan, "lowering": lowering or "eager"})
            out = [compiled(*given) for _ in range(2)][-1]
            off, drift = (float((out - x).abs().max() / whole.abs().max()) for x in (one, whole))
            bits: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(bits, hashlib.sha256(out.contiguous().numpy().tobytes()).hexdigest())
            bad |= len(set(bits)) > 1 or not off <= 1e-12 or not 1e-5 < drift < 0.1
            print(f"rank {dist.get_rank()}: {text} off by {off:.1e}, drift {drift:.1e}\n", end="", flush=True)
    dist.destroy_process_group()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
