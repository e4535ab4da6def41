"""Weights in parts on real processes: ``torchrun --nproc-per-node=N -m tests.scripts.parts PLAN``.

The plan's own program, then with shard_weights: two resolutions, memory, and the whole weights again. Last a model
that never has its weights, for they are read from a file.
"""

from __future__ import annotations

import logging
import sys
import tempfile

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._dynamo.utils import counters

import fastpar
from tests.test_tp import Transformer, inputs


def main() -> None:
    dist.init_process_group("gloo")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(depth=1).double().eval().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = [inputs(), inputs(2, 7)]
    expected = [model(*c) for c in calls]

    def differ(count: int = 1) -> float:
        pairs = zip(calls[:count], expected[:count], strict=True)
        return max(float((fast(*c) - e).abs().max()) for c, e in pairs)

    fast = torch.compile(model, backend="fastpar", options={"plan": sys.argv[1]}, dynamic=False)
    assert differ() < 1e-12
    weights = fastpar.shard_weights(model)
    error = differ(2)
    compiles = counters["stats"]["unique_graphs"]
    assert error < 1e-12 and differ(2) < 1e-12
    cut = {n: w for n, w in weights.weights.items() if not w.layout.is_whole}
    held = sum(w.bytes for w in cut.values()) / sum(w.held.element_size() * before[n].numel() for n, w in cut.items())
    assert len(cut) > 10 and 0.3 < held < 0.7, held
    assert all(w.whole is None for w in weights.weights.values())
    print(f"off by {error:.0e}, recompiled {counters['stats']['unique_graphs'] - compiles}", flush=True)
    weights.restore()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert differ() < 1e-12
    print("restored", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/weights.safetensors"
        save_file(before, file)
        with torch.device("meta"):
            model = Transformer(depth=1).double().eval().requires_grad_(False)
        weights = fastpar.shard_weights(model, file, device="cpu")
        fast = torch.compile(model, backend="fastpar", options={"plan": sys.argv[1]}, dynamic=False)
        assert weights.bytes == 0 and differ() < 1e-12
        assert 0.4 * weights.whole_bytes < weights.bytes < 0.8 * weights.whole_bytes
        print("read", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
