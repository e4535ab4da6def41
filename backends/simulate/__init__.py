"""N virtual ranks in one process: in lock step, or in random interleavings."""

from fastpar.backends.simulate.interleave import run_calls, run_interleaved
from fastpar.backends.simulate.lockstep import PerRank, carried, passed_on, run_global, run_local, with_carried

__all__ = [
    "PerRank", "carried", "passed_on", "run_calls", "run_global", "run_interleaved", "run_local", "with_carried",
]  # fmt: skip
