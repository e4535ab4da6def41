"""N virtual ranks in one process: in lock step, or in random interleavings."""

from fastpar.backends.simulate.interleave import run_calls, run_interleaved
from fastpar.backends.simulate.lockstep import run_global, run_local

__all__ = ["run_calls", "run_global", "run_interleaved", "run_local"]
