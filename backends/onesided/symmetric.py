"""``symmetric``: heaps in torch's symmetric memory, for tensors on GPUs of one machine.

Puts are copies between the GPUs' memories, made by copy engines on a stream of their own, so that they take no
multiprocessor from the compute that hides them; a flag is such a copy too, of the call's number, behind the data in the
same stream. Waiting is a kernel (``signals``) of one warp. The call's number is a tensor on the device that every call
advances, so all of it can be captured in a CUDA graph and replayed. Allocation and rendezvous take place when the heap
is made, which must not be during a capture; nor may a program's first call be, which makes small tables.

Written against torch 2.11 to 2.13: ``empty``, ``rendezvous``, ``get_buffer``. Torch's own ``put_signal`` and
``wait_signal`` are not used: their pads go from 0 to 1 and back, so each would have to be waited for once, by one.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastpar.backends.kernels.copies import unpack_operator
from fastpar.backends.kernels.launch import triton
from fastpar.backends.kernels.table import make_table
from fastpar.backends.kernels.table import ranks as ranks_of
from fastpar.backends.onesided.heap import Heap, flags_size
from fastpar.backends.onesided.signals import await_kernel
from fastpar.core.errors import FastparError
from fastpar.ops.collectives import dtypes_named
from fastpar.ops.onesided import HeapSpec

LOOKS = 1_000_000
"""Per second, where there is no clock."""
_BLOCK = 1024

Allocate = Callable[[int], tuple[torch.Tensor, Any]]
"""Bytes -> (own memory, uint8 and zero; torch's handle to that of all)."""


def place(device: torch.device) -> str:
    """What two processes have in common whose GPUs can write to each other's memory."""
    if triton is None:
        return "no Triton, whose kernel waits for flags"
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return json.dumps([socket.gethostname(), boot.read().strip(), device.type])


def allocator(device: torch.device, group: str) -> Allocate:
    """Torch's symmetric memory among the ranks of the process group of this name. What it gives raises RuntimeError
    where there is none (no peer access between the devices, two ranks on one device)."""

    def allocate(size: int) -> tuple[torch.Tensor, Any]:
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)  # flags are zero before anybody can raise one
        return own, symmetric_memory.rendezvous(own, group)

    return allocate


class Symmetric(Heap):
    """Raises FastparError in the call after one in which a flag did not come within ``timeout``; that one's results are
    NaN where they depend on the piece that is missing."""

    def __init__(
        self, spec: HeapSpec, rank: int, ranks: int, timeout: float, device: torch.device, allocate: Allocate
    ) -> None:
        super().__init__(spec, rank, ranks, timeout)
        self.device = device
        front, count = flags_size(spec, ranks), 2 * spec.channels * ranks
        self.own, self.handle = allocate(front + max(spec.size, 1))
        peers = range(ranks)
        self.flags = [self.handle.get_buffer(p, (count,), torch.int64, 0) for p in peers]
        self.memory = [self.handle.get_buffer(p, (max(spec.size, 1),), torch.uint8, front) for p in peers]
        self.epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self.failed = torch.zeros(1, dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        self.told = torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu)  # a copy of ``failed``, on the host
        self.side = torch.cuda.Stream(device) if on_gpu else None
        self.left: dict[int, Any] = {}  # channel -> event: what it put has left
        self.tables: dict[Any, torch.Tensor] = {}

    def begin(self) -> None:
        if not (self.side is not None and torch.cuda.is_current_stream_capturing()):
            self.check()
        super().begin()
        self.epoch.add_(1)

    def end(self) -> None:
        """The call is launched: its failure, if there is one, comes to the host."""
        self.told.copy_(self.failed, non_blocking=True)

    def check(self) -> None:
        """Raise FastparError where an earlier call missed a message, as far as the host knows by now."""
        flag = int(self.told[0])
        if flag:
            raise FastparError(
                f"rank {self.rank} waited {self.timeout:g} s (FASTPAR_TIMEOUT) in an earlier call for "
                f"{self.tell(flag - 1)}; the results of that call are not valid"
            )

    @contextmanager
    def sending(self, channel: int) -> Iterator[None]:
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            yield
            event = self.left.setdefault(channel, torch.cuda.Event())
            event.record(self.side)

    def settle(self, channel: int) -> None:
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_event(self.left[channel])

    def write(self, peer: int, offset: int, piece: torch.Tensor) -> None:
        self.memory[peer].narrow(0, offset, piece.numel()).copy_(piece)

    def raise_flags(self, flags: Sequence[tuple[int, int]]) -> None:
        for peer, flag in flags:
            self.flags[peer].narrow(0, flag, 1).copy_(self.epoch)

    def await_flags(self, flags: Sequence[int], lag: int, pieces: Sequence[tuple[int, int]] = ()) -> None:
        which = self._table(flags)
        where = self._table([n for piece in pieces for n in piece] or [0])
        clock = self.side is not None
        limit = int(self.timeout * (1e9 if clock else LOOKS))
        await_kernel[(1,)](
            self.flags[self.rank], self.epoch, which, where, self.memory[self.rank], self.failed, lag, limit,
            COUNT=len(flags), PIECES=bool(pieces), CLOCK=clock, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip

    def slot(self, offset: int, size: int) -> torch.Tensor:
        return self.memory[self.rank].narrow(0, offset, size)

    def unpack(
        self, buffer: torch.Tensor, shapes: Sequence[int], boxes: Sequence[int], dtypes: str
    ) -> list[torch.Tensor]:
        key = (tuple(boxes), buffer.element_size(), dtypes)
        if key not in self.tables:
            sizes = [d.itemsize for d in dtypes_named(dtypes)] or [buffer.element_size()] * len(ranks_of(shapes))
            self.tables[key] = make_table(boxes, sizes, self.device)
        out: list[torch.Tensor] = unpack_operator(buffer, list(shapes), list(boxes), dtypes, self.tables[key])
        return out

    def _table(self, numbers: Sequence[int]) -> torch.Tensor:
        key = tuple(numbers)
        if key not in self.tables:
            self.tables[key] = torch.tensor(key, dtype=torch.int64, device=self.device)
        return self.tables[key]

    def close(self) -> None:
        if self.side is not None and self.memory:
            torch.cuda.synchronize(self.device)  # its allocator does not know what is still to run
        self.flags, self.memory, self.handle = [], [], None
        self.own = torch.empty(0)

