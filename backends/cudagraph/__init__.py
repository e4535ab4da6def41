"""``cudagraph``: a program with its collectives captured as one CUDA graph, and replayed."""

from fastpar.backends.cudagraph.captured import Captured, release

__all__ = ["Captured", "release"]
