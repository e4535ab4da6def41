"""Process groups: which backends there are, and two processes that really meet."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator

from fastpar.cli.health import fact
from fastpar.cli.health.fact import FAILED, OK, WARNING, Fact

_MEET = """
import sys, datetime, torch, torch.distributed as dist
rank, file, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=seconds))
x = torch.full((1000,), rank + 1.0)
dist.all_reduce(x)
assert bool((x == 3).all()), x
dist.barrier()
dist.destroy_process_group()
"""
_ADVICE = (
    "see whether this machine's name resolves (getent hosts $(hostname)); GLOO_SOCKET_IFNAME=lo makes gloo talk over "
    "the loopback interface"
)


def groups() -> Iterator[Fact]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Fact("torch.distributed", FAILED, "this build of torch lacks it", "install another build")
        return
    nccl = dist.is_nccl_available()
    gpus = torch.version.cuda is not None
    yield Fact("gloo", OK if dist.is_gloo_available() else FAILED,
               "there" if dist.is_gloo_available() else "this build of torch lacks it")  # fmt: skip
    yield Fact("nccl", OK if nccl or not gpus else WARNING,
               "there" if nccl else "not there: this build of torch is without CUDA" if not gpus else "not there",
               "" if nccl or not gpus else "several GPUs need it: install a build of torch that has it")  # fmt: skip


def meeting(code: str = _MEET) -> Iterator[Fact]:
    """Two processes of this machine add up a tensor over gloo; what does not end is ended."""
    name, patience, begin = "two processes", fact.PATIENCE, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastpar-") as folder:
        each = [sys.executable, "-c", code]
        commands = [[*each, str(rank), f"{folder}/store", str(patience / 2)] for rank in range(2)]
        found = fact.ended(commands, patience)
    if [status for status, _ in found] == [0, 0]:
        yield Fact(name, OK, f"added up a tensor over gloo, {time.monotonic() - begin:.1f} s with their start")
        return
    bad = [(rank, *one) for rank, one in enumerate(found) if one[0]]
    if not bad:
        yield Fact(name, FAILED, f"did not meet over gloo within {patience:g} s", _ADVICE)
        return
    rank, status, text = bad[0]
    yield Fact(name, FAILED, f"rank {rank} of 2 failed over gloo: {fact.last_line(status, text)}", _ADVICE)
