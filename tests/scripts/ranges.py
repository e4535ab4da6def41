"""A profile on each of several gloo processes, eager and Inductor: checked by ``tests.test_ranges.check``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from tests.test_ranges import check, made, profiled


def main() -> None:
    dist.init_process_group("gloo")
    for lowering in ("eager", "inductor"):
        model, x = made()
        split = torch.compile(model, backend="fastpar", options={"plan": "ulysses=2", "lowering": lowering})
        assert torch.allclose(split(x), model(x), atol=1e-5)
        with tempfile.TemporaryDirectory() as folder:
            check(profiled(split, x, Path(folder)), lowering, 2)
        torch._dynamo.reset()
    print("ranges are right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
