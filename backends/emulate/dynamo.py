"""Dynamo is told what an emulated group is: a process group, and no code of the model.

Up to some version Dynamo takes ``ProcessGroup`` and torch's fake group for constants, and nothing that derives from
them, so that compiled code which is given a group would break its graph here and nowhere else. Later ones need no
telling. And a group's methods are C++ elsewhere: where these run between two graphs, Dynamo would compile them as well.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch


def unseen(kind: type) -> type:
    """A class whose methods run as they are wherever they are called."""
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("__"):
            setattr(kind, name, torch.compiler.disable(method))
    return kind


def tell(kind: type, distributed: Any = None) -> bool:
    """Make Dynamo take objects of ``kind`` as process groups; returns whether it had to be told.

    ``distributed`` is Dynamo's module of that name.
    """
    if distributed is None:
        from torch._dynamo import variables

        distributed = variables.distributed
    variable = getattr(distributed, "ProcessGroupVariable", None)
    known = getattr(variable, "is_process_group", None)
    if variable is None or known is None or getattr(known, "kind", None) is kind:
        return False

    def is_process_group(value: object) -> bool:
        return isinstance(value, kind) or known(value)

    is_process_group.kind = kind  # type: ignore[attr-defined]
    variable.is_process_group = staticmethod(is_process_group)
    return True
