"""Compile a small model as rank 0 of 2 and say what Inductor found of it on disk. Arguments: plan.

Values are not looked at (torch's fake process group moves nothing); the cache folder comes from the environment.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.test_cfg import Block, inputs


def main() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    torch.manual_seed(0)
    options = {"plan": sys.argv[1], "lowering": "inductor"}
    model = torch.compile(Block().double().eval(), backend="fastpar", options=options)
    with torch.no_grad():
        model(*inputs(1))
    print(json.dumps({k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")}))


if __name__ == "__main__":
    main()
