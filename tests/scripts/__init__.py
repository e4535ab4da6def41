"""What tests run under torchrun.

Dynamo is imported before any of them makes a process group: a module of torch's that it imports keeps the world's group
of that moment as a default argument, for ever, and gloo's threads then outlive the interpreter (``run/groups.py``).
"""

import torch._dynamo  # noqa: F401
