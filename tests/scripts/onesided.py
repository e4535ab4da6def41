"""Plans one-sided on real processes: ``torchrun --nproc-per-node=N -m tests.scripts.onesided [--dies] PLAN...``.

Each plan runs two-sided, one-sided, and one-sided with random sleeps before puts, receives and blocks of attention; for
four steps, on inputs that differ. Per plan and rank one line; exits non-zero where a value is off, or its bits are not
those of the other ranks and, but for sums under ``tp``, of the two-sided run. With ``--inductor`` one-sided runs are
lowered by Inductor, whose bits are compared between ranks only. With ``--dies`` rank 1 leaves before the third step,
and the others must say so. With ``--cuda`` all ranks share the first GPU, and heaps are torch's symmetric memory (gloo
carries what is two-sided); ``--captured`` also replays the step from a CUDA graph, against the same step launched.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from fastpar.core.errors import FastparError
from fastpar.core.plan import Plan
from fastpar.plan.expand import pipeline_text
from fastpar.registry import LOWERINGS
from tests.scripts.delays import TOLERANCE, delayed
from tests.test_ring import Joint

STEPS = 4


def steps(model: Any, plan: str, transport: str, lowering: str, given: list[Any]) -> list[torch.Tensor]:
    torch._dynamo.reset()
    options = {"plan": plan, "transport": transport, "lowering": lowering}
    compiled = torch.compile(model, backend="fastpar", options=options)
    return [torch.cat(compiled(*inputs), 1) for inputs in given]


def digest(outputs: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(o.cpu().contiguous().numpy().tobytes() for o in outputs)).hexdigest()


def captured(model: Any, plan: str, given: list[Any]) -> int:
    """The step from a CUDA graph, replayed 50 times on changing inputs: 0 if its bits are those of the launched one.

    The graph is of the whole call, its count of calls included, so a replay moves all epochs on.
    """
    # nothing hoisted: whether it is still right is asked of the device on every call, which a capture cannot do
    passes = pipeline_text(Plan.parse(plan)).replace("hoist,", "")
    options = {"plan": plan, "passes": passes, "transport": "one-sided", "lowering": "eager"}
    compiled = torch.compile(model, backend="fastpar", options=options)
    static = [x.clone() for x in given[0]]
    launched = [torch.cat(compiled(*inputs), 1).clone() for inputs in given]
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        compiled(*static)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = torch.cat(compiled(*static), 1)
    good = True
    for step in range(50):
        for x, value in zip(static, given[step % STEPS], strict=True):
            x.copy_(value)
        graph.replay()
        good &= torch.equal(out, launched[step % STEPS])
    print(f"rank {dist.get_rank()}: {plan} replayed, bits {'equal' if good else 'DIFFER'}", flush=True)
    dist.barrier()
    del graph
    dist.destroy_process_group()
    return int(not good)


def dies(model: Any, plan: str, given: list[Any]) -> int:
    """How the others take it that rank 1 is gone: 0 if they say that they waited for it, in time."""
    compiled = torch.compile(model, backend="fastpar", options={"plan": plan, "transport": "one-sided"})
    for inputs in given[:2]:
        compiled(*inputs)
    rank = dist.get_rank()
    if rank == 1:
        print("rank 1: leaves", flush=True)
        os._exit(0)
    begin = time.perf_counter()
    try:
        for inputs in given[2:]:
            compiled(*inputs)
    except FastparError as error:
        print(f"rank {rank}: after {time.perf_counter() - begin:.1f} s: {error}", flush=True)
        os._exit(0)
    print(f"rank {rank}: noticed nothing", flush=True)
    os._exit(1)


def main() -> int:
    torch.set_num_threads(1)
    flags = [a for a in sys.argv[1:] if a.startswith("--")]
    plans = [a for a in sys.argv[1:] if not a.startswith("--")]
    device = "cuda:0" if "--cuda" in flags else "cpu"
    if device != "cpu":
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.set_device(0)
    dist.init_process_group("gloo")
    said: list[str] = []
    logger = logging.getLogger("fastpar")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Kept(said))
    torch.manual_seed(0)
    model = Joint(4).double().eval().requires_grad_(False).to(device)
    # a text that is too short to split
    given = [tuple(torch.randn(2, n, 12).double().to(device) for n in (1, 11)) for _ in range(STEPS)]
    if "--dies" in flags:
        return dies(model, plans[0], given)
    if "--captured" in flags:
        return captured(model, plans[0], given)
    inductor, bad = "--inductor" in flags, 0
    for plan in plans:
        whole = [torch.cat(model(*inputs), 1) for inputs in given]
        runs = [steps(model, plan, "two-sided", "eager", given)]
        runs.append(steps(model, plan, "one-sided", "inductor" if inductor else "eager", given))
        if not inductor:
            on_time = LOWERINGS["eager"]
            LOWERINGS["eager"] = lambda: delayed
            runs.append(steps(model, plan, "one-sided", "eager", given))
            LOWERINGS["eager"] = on_time
        off = max(float((a - b).abs().max()) for run in runs for a, b in zip(run, whole, strict=True))
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, [digest(run) for run in runs])
        other_sums = inductor or "tp" in plan  # gloo has an order of its own for them
        compared = {d for of_rank in every for d in (of_rank[1:] if other_sums else of_rank)}
        same = len(compared) == 1
        bad += not (same and off <= TOLERANCE)
        line = f"rank {dist.get_rank()}: {plan} off by {off:.1e}, bits {'equal' if same else 'DIFFER'}\n"
        print(line, end="", flush=True)
    sided = [line for line in said if "sided" in line]
    if dist.get_rank() == 0:
        print("\n".join(sided), flush=True)
    dist.destroy_process_group()
    return int(bad > 0)


class _Kept(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    sys.exit(main())
