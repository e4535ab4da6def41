"""GPUs: which there are, whether they reach each other, and what follows from that.

To be called in a process of its own (``fact.elsewhere``): a driver can hang, and asking initialises CUDA.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from fastpar.cli.health.fact import FAILED, OK, WARNING, Fact, said

_NONE = "no GPU"


def gpus() -> list[Fact]:
    return [*_devices(), *_one_sided(), *_graphs()]


def _devices() -> Iterator[Fact]:
    import torch

    from fastpar.plan.topology import detect

    count = _count(torch)
    if not count:
        yield _absent(torch)
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        yield Fact(f"GPU {i}", OK, f"{p.name}, {p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor}")
    if count > 1:
        apart = [f"{a} and {b}" for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
        yield Fact("peer access", WARNING if apart else OK,
                   f"none between {', '.join(apart)}" if apart else "between every two GPUs",
                   "exchanges between these go through the host" if apart else "")  # fmt: skip
    topology, why = detect(max(count, 1))
    foreign = count and "no preset" in why
    yield Fact("topology", WARNING if foreign else OK, why,
               f"predictions are {topology.name}'s; docs/planning.md says how to describe this machine"
               if foreign else "")  # fmt: skip


def _count(torch: Any) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old; it is said below
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _absent(torch: Any) -> Fact:
    """Why there is no GPU: where torch was built for some, that may be a mistake."""
    if torch.version.cuda is None and torch.version.hip is None:
        return Fact("GPUs", OK, "none: this torch is built for the CPU, where plans run over gloo")
    try:
        torch.cuda.init()
        why = "none is visible"
    except Exception as error:  # of the driver
        why = said(error)
    return Fact("GPUs", WARNING, f"torch is built for CUDA {torch.version.cuda} but finds none: {why}",
                "see nvidia-smi and CUDA_VISIBLE_DEVICES; on the CPU everything runs without")  # fmt: skip


def _one_sided() -> Iterator[Fact]:
    """Whether a rank could put into its peers' memory (``transport="one-sided"``)."""
    import torch

    from fastpar.backends.onesided import shared, symmetric

    here = shared.place()
    good = here.startswith("[")
    yield Fact("one-sided, CPU", OK if good else WARNING,
               "processes of this machine can share memory" if good else f"stays two-sided: {here}")  # fmt: skip
    count = _count(torch)
    if not count:
        yield Fact("one-sided, GPU", OK, f"{_NONE}: not used")
        return
    place = symmetric.place(torch.device("cuda", 0))
    if not place.startswith("["):
        yield Fact("one-sided, GPU", WARNING, f"stays two-sided: {place}", "pip install triton")
    elif count == 1:
        yield Fact("one-sided, GPU", OK, "one GPU: there is nobody to exchange with")
    elif not all(torch.cuda.can_device_access_peer(0, i) for i in range(1, count)):
        yield Fact("one-sided, GPU", WARNING, "stays two-sided: not all GPUs have peer access")
    else:
        yield Fact("one-sided, GPU", OK, _symmetric(torch))


def _symmetric(torch: Any) -> str:
    import torch.distributed._symmetric_memory as memory

    memory.empty(1024, dtype=torch.uint8, device="cuda:0")
    return "symmetric memory is given; ranks find out together whether all of them have it"


def _graphs() -> Iterator[Fact]:
    import torch

    if not _count(torch):
        yield Fact("CUDA graphs", OK, f"{_NONE}: not used")
        return
    try:
        x, graph = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 1
        graph.replay()
        good = float(y.sum()) == 16
    except RuntimeError as error:
        yield Fact("CUDA graphs", FAILED, said(error), "leave cudagraphs off; the GPU or its driver has a problem")
        return
    text = "captured and replayed" if good else "a replay gave wrong numbers"
    yield Fact("CUDA graphs", OK if good else FAILED, text)
