"""What runs a program: ``simulate`` (N virtual ranks in one process), ``eager``, ``inductor``; ``kernels``."""
