"""N virtual ranks in one process, in lock step."""

from fastpar.backends.simulate.lockstep import run_global, run_local

__all__ = ["run_global", "run_local"]
