"""The symmetric transport where kernels run: on a GPU, or in Triton's interpreter (``-m tests.symmetric_cases``).

The handle of torch's symmetric memory is a fake: the heaps of all ranks are ordinary tensors of this process, and one
thread plays the ranks in turn, so nothing may be waited for that did not come before.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

SPEC_LABELS = ("all_to_all over ring", "all_gather over ring")


class Handle:
    """What ``rendezvous`` returns, of tensors of this process."""

    def __init__(self, owns: list[torch.Tensor]) -> None:
        self.owns = owns

    def get_buffer(self, rank: int, sizes: Any, dtype: torch.dtype, storage_offset: int = 0) -> torch.Tensor:
        start, numel = storage_offset * dtype.itemsize, sizes[0] * dtype.itemsize
        assert 0 <= start and start + numel <= self.owns[rank].numel()
        return self.owns[rank].narrow(0, start, numel).view(dtype)


def heaps(ranks: int, size: int = 512, timeout: float = 5e-5, device: str = "cpu") -> list[Any]:
    """All ranks' heaps, after the begin of their first call."""
    from fastpar.backends.onesided.symmetric import Symmetric
    from fastpar.ops.onesided import HeapSpec

    owns: list[torch.Tensor] = []

    def allocate(bytes_: int) -> tuple[torch.Tensor, Any]:
        while len(owns) < ranks:
            owns.append(torch.zeros(bytes_, dtype=torch.uint8, device=device))
        return owns[0], Handle(owns)

    spec = HeapSpec("t", SPEC_LABELS, size)
    found = [Symmetric(spec, r, ranks, timeout, torch.device(device), allocate) for r in range(ranks)]
    for heap in found:
        heap.begin()
    return found


def messages(device: str) -> None:
    """Pieces land where they should, over several calls, credits and all; several sources and dtypes."""
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        ranks = heaps(3, device=device)
        for call in range(1, 4):
            xs = [(torch.arange(12, device=device) + 12 * r + call).to(dtype) for r in range(3)]
            item = dtype.itemsize
            for r, heap in enumerate(ranks):
                awaits = [n for w in range(3) if w != r for n in (w, 0, 1)]  # the read of the call before
                heap.put(xs[r], 0, [n for p in range(3) for n in (p, 4 * p, 4, 4 * r * item)], awaits)
            for r, heap in enumerate(ranks):
                peers = [p for p in range(3) if p != r]
                out = heap.receive(xs[r], 0, peers, peers, 0, 12, torch.clone)
                assert torch.equal(out, torch.cat([x[4 * r : 4 * r + 4] for x in xs]))
            for heap in ranks:
                assert int(heap.epoch) == call
                heap.end()
                heap.begin()


def replayed(device: str) -> None:
    """What a replay of a captured call would do: the same launches, with a number that the device advances."""
    a, b = heaps(2, device=device)
    x = torch.arange(4.0, device=device)
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        a.put(x, 0, [1, 0, 4, 0], [1, 0, 1])
        out = b.receive(x, 0, [0], [0], 0, 4, torch.clone)
        assert torch.equal(out, x)
        for heap in (a, b):
            heap.epoch.add_(1)  # and nothing on the host


def missing(device: str) -> None:
    """A flag that does not come ends the wait, poisons its piece and is told in the next call; nobody waits again."""
    from fastpar.core.errors import FastparError

    a, b = heaps(2, device=device)
    x = torch.arange(4.0, device=device)
    a.put(x, 0, [1, 0, 4, 0], [])
    b.receive(x, 0, [0], [], 0, 4, torch.clone)
    b.begin()  # a does not
    out = b.receive(x, 0, [0], [], 0, 4, torch.clone)
    assert bool(out.isnan().all())
    b.timeout = 1e9
    b.receive(x, 1, [0], [], 128, 4, torch.clone)  # at once
    b.end()
    try:
        b.begin()
    except FastparError as error:
        assert "for the message of rank 0 in channel 0 (all_to_all over ring)" in str(error), error
    else:
        raise AssertionError("nothing was said of the message that is missing")


def unpacked(device: str) -> None:
    """Out of the heap into tensors of their own, as ``fastpar::unpack``."""
    from fastpar.ops.collectives import unpack_boxes

    (heap,) = heaps(1, device=device)
    buffer = torch.randn(20, device=device)
    boxes = [0, 2, 0, 0, 2, 3, 0, 2, 2, 0, 2, 3, 1, 1, 0, 8]
    shapes = [2, 4, 3, 1, 8]
    for _ in range(2):
        found = heap.unpack(buffer, shapes, boxes, "")
        assert all(torch.equal(a, b) for a, b in zip(found, unpack_boxes(buffer, shapes, boxes), strict=True))
    assert len(heap.tables) == 1


CASES = {case.__name__: case for case in (messages, replayed, missing, unpacked)}

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import warnings

    warnings.filterwarnings("ignore", category=RuntimeWarning)
    for name in sys.argv[1:]:
        CASES[name]("cpu")
        print(f"{name}: as it should be")
