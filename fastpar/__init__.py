"""fastpar: one device's diffusion model as the program of one rank of N, proved equal.

``torch.compile(model, backend="fastpar")`` needs no import of this package. What it offers
beside that (all in one process, N virtual ranks): ``verify``, ``explain``, ``simulate``,
``capture`` and the classes ``Plan`` and ``Report``; ``shard_weights``, for ranks that hold parts of weights;
``parallelize``, for diffusers' pipelines, ``generation``, for sampling loops of one's own, and ``balance``, for devices
that are not equally fast; and ``emulate``, one device as rank r of N on emulated links.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpar.core.version import VERSION as __version__

if TYPE_CHECKING:
    from fastpar import emulate
    from fastpar.core.plan import Plan
    from fastpar.diffusers import parallelize
    from fastpar.graph.capture import Captured, capture
    from fastpar.plan.balance import balance
    from fastpar.run.report import Report
    from fastpar.run.stream import generation
    from fastpar.run.verify import explain, simulate, verify
    from fastpar.run.weights import shard_weights

__all__ = ["__version__", "Captured", "Plan", "Report", "balance", "capture", "emulate", "explain", "generation",
           "parallelize", "shard_weights", "simulate", "verify"]  # fmt: skip

_HOMES = {
    "Captured": "fastpar.graph.capture",
    "Plan": "fastpar.core.plan",
    "Report": "fastpar.run.report",
    "balance": "fastpar.plan.balance",
    "capture": "fastpar.graph.capture",
    "explain": "fastpar.run.verify",
    "generation": "fastpar.run.stream",
    "parallelize": "fastpar.diffusers",
    "shard_weights": "fastpar.run.weights",
    "simulate": "fastpar.run.verify",
    "verify": "fastpar.run.verify",
}


def __getattr__(name: str) -> Any:
    # lazily: the command line and the entry point should not pay for what they do not use
    if name in _HOMES or name == "emulate":
        import importlib

        home = importlib.import_module(_HOMES.get(name, "fastpar.emulate"))
        return getattr(home, name) if name in _HOMES else home
    raise AttributeError(f"module 'fastpar' has no attribute {name!r}; it offers {', '.join(__all__)}")
