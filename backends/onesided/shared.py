"""``shared``: heaps in memory that processes of one machine share, for tensors on the CPU.

Every rank makes an anonymous file in memory (Linux' ``memfd_create``) and maps those of the others, which it opens
through ``/proc/PID/fd``. It has no name, so nothing is left anywhere, however a process ends; the memory goes when the
last one has let go of it. A put is a copy, done when it returns; a wait looks again and again, and sleeps in between.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastpar.backends.onesided.heap import Heap, flags_size
from fastpar.core.errors import FastparError
from fastpar.ops.onesided import HeapSpec

_SPINS = 200  # looks without a sleep
_NAP = 5e-5  # seconds

Gather = Callable[[str, str], list[str]]
"""``gather(what, mine)``: every rank's text, by rank; raises where one does not come in time."""


def place() -> str:
    """What two processes have in common that can share memory: machine, user and process numbers."""
    if not hasattr(os, "memfd_create"):
        return f"{sys.platform}: no anonymous shared memory"
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return json.dumps([socket.gethostname(), boot.read().strip(), os.readlink("/proc/self/ns/pid"), os.getuid()])


class Shared(Heap):
    """Raises FastparError where a peer's memory cannot be opened, or a flag does not come within ``timeout``."""

    def __init__(self, spec: HeapSpec, rank: int, ranks: int, timeout: float, gather: Gather) -> None:
        super().__init__(spec, rank, ranks, timeout)
        self.front = flags_size(spec, ranks)
        size = self.front + max(spec.size, 1)
        own = os.memfd_create(f"fastpar {spec.name}")
        self.pids: list[int] = []
        maps: list[mmap.mmap] = []
        try:
            os.ftruncate(own, size)  # zeros
            everyone = [json.loads(text) for text in gather("heap", json.dumps([os.getpid(), own, size]))]
            self.pids = [pid for pid, _, _ in everyone]
            if any(other != size for _, _, other in everyone):
                raise FastparError(f"heap {spec.name}: ranks want heaps of {[n for _, _, n in everyone]} bytes")
            for pid, descriptor, _ in everyone:
                maps.append(_map(pid, descriptor, size))
            gather("mapped", "")  # the descriptors stay open until all have mapped what is behind them
        finally:
            os.close(own)
        self.flags = [np.frombuffer(m, np.int64, 2 * spec.channels * ranks) for m in maps]
        self.memory = [torch.frombuffer(m, dtype=torch.uint8, offset=self.front) for m in maps]
        self.fence = threading.Lock()

    def write(self, peer: int, offset: int, piece: torch.Tensor) -> None:
        self.memory[peer].narrow(0, offset, piece.numel()).copy_(piece)

    def raise_flags(self, flags: Sequence[tuple[int, int]]) -> None:
        self._order()
        for peer, flag in flags:
            self.flags[peer][flag] = self.calls

    def await_flags(self, flags: Sequence[int], lag: int, pieces: Sequence[tuple[int, int]] = ()) -> None:
        mine, wanted = self.flags[self.rank], self.calls - lag
        until = time.monotonic() + self.timeout
        for flag in flags:
            spins = 0
            while mine[flag] < wanted:
                spins += 1
                if spins < _SPINS:
                    os.sched_yield()
                    continue
                time.sleep(_NAP)
                if time.monotonic() > until:
                    raise FastparError(self._late([f for f in flags if mine[f] < wanted]))
            if pieces and mine[flag] > wanted:
                raise FastparError(f"rank {self.rank}: {self.tell(flag)} was overwritten by that of a later call")
        self._order()

    def _late(self, flags: Sequence[int]) -> str:
        who = sorted({flag % self.ranks for flag in flags})
        gone = [rank for rank in who if not os.path.exists(f"/proc/{self.pids[rank]}")]
        ended = f"; the processes of ranks {gone} have ended" if gone else ""
        return (
            f"rank {self.rank} waited {self.timeout:g} s (FASTPAR_TIMEOUT) in call {self.calls} for ranks {who}, first "
            f"for {self.tell(flags[0])}{ended}"
        )

    def _order(self) -> None:
        """Nothing moves across: what was written is there before a flag is, and is read after one was seen.

        x86 keeps the order of writes, and of reads, by itself; elsewhere taking and giving back a lock, twice, does.
        """
        for _ in range(2):
            with self.fence:
                pass

    def slot(self, offset: int, size: int) -> torch.Tensor:
        return self.memory[self.rank].narrow(0, offset, size)

    def close(self) -> None:
        self.flags, self.memory = [], []  # the maps go with the last view of them


def _map(pid: int, descriptor: int, size: int) -> mmap.mmap:
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        opened = os.open(path, os.O_RDWR)
    except OSError as error:
        raise FastparError(f"cannot open the shared memory of process {pid}: {error}") from error
    try:
        return mmap.mmap(opened, size)
    finally:
        os.close(opened)
