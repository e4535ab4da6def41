"""Kernels that hold a CUDA stream until a given time after a mark, by the device's clock.

Two kernels of one warp: one notes when an exchange began, the other spins until it is over. What runs between the two
(copies) counts as part of the exchange. The clock is PTX's ``globaltimer`` in nanoseconds, not cycles, whose length
changes with load. Both may be captured in a CUDA graph: the mark lies on the device and is made anew on every replay.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpar.backends.kernels.launch import jit, triton
from fastpar.core.errors import OptionError

if triton is not None:
    from triton.language.extra.cuda import globaltimer

    tl = triton.language


def mark_kernel(began):
    tl.store(began, globaltimer())


def spin_kernel(began, nanoseconds):
    start = tl.load(began)
    while globaltimer() - start < nanoseconds:
        pass


class Spinner:
    """Launches both kernels on the current stream of ``device``; ``ctas`` thread blocks spin.

    Raises OptionError without Triton. Making one compiles the kernels, so that no capture has to.
    """

    def __init__(self, device: torch.device, ctas: int) -> None:
        if triton is None:
            raise OptionError("links on a GPU are emulated by a Triton kernel, and Triton is not installed")
        self.ctas = ctas
        self._mark: Any = jit(mark_kernel)
        self._spin: Any = triton.jit(spin_kernel, do_not_specialize=["nanoseconds"])
        with torch.cuda.device(device):
            began = torch.zeros(1, dtype=torch.int64, device=device)
            self.mark(began)
            self.spin(began, 1e-6)
            torch.cuda.synchronize(device)

    def mark(self, began: torch.Tensor) -> None:
        """Note the time in ``began``, one int64."""
        self._mark[(1,)](began, num_warps=1)

    def spin(self, began: torch.Tensor, seconds: float) -> None:
        """Hold the stream until so many seconds after the mark."""
        self._spin[(self.ctas,)](began, round(seconds * 1e9), num_warps=1)
