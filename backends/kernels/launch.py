"""How kernels are written, registered and launched, also where there is no Triton.

Triton is optional: without it ``jit`` leaves functions as they are, operators run their torch reference on the CPU,
and a call on a GPU says what to install.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastpar.core.errors import OptionError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What kernels compute on; float64 is for tests, whose references suffice."""


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; with TRITON_INTERPRET=1 at import, a kernel that runs in Python."""
    return function if triton is None else triton.jit(function)


def wrap_triton(kernel: Any) -> Any:
    """A kernel as tracers see it. Its name is torch's, by which ``triton_op`` finds the kernels of an operator."""
    if triton is None:
        raise OptionError("fastpar's kernels need Triton, which is not installed: pip install 'fastpar[kernels]'")
    if type(kernel).__name__ == "InterpretedFunction":
        return kernel
    return torch.library.wrap_triton(kernel)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function that launches kernels as ``fastpar_kernels::name``.

    torch.compile sees through a ``triton_op`` to its kernels; without Triton it is an operator like others.
    """
    register = torch.library.custom_op if triton is None else torch.library.triton_op
    return register(f"fastpar_kernels::{name}", mutates_args=mutates)


def on_gpu(*xs: torch.Tensor) -> bool:
    """Whether kernels can take these tensors: on a GPU, of at most four dimensions."""
    return all(x.device.type == "cuda" and x.dim() <= 4 for x in xs)


def power(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
