"""Dynamo is told that an emulated group is a process group, where it knows them by their exact type.

Up to some version Dynamo takes ``ProcessGroup`` and torch's fake group for constants, and nothing that derives from
them, so that compiled code which is given a group would break its graph here and nowhere else. Later ones need no
telling.
"""

from __future__ import annotations

from typing import Any


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
