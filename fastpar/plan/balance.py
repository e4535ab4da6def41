"""Strides and shares for devices that are not equally fast: STADI's two allocators (abstract; formulas are ours)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fastpar.core.errors import PlanError
from fastpar.core.plan import Plan


def balance(plan: Plan | str, speeds: Sequence[float], most: int = 2) -> Plan:
    """``plan`` with ``steps`` and ``speeds`` for ranks that are so fast, one number per rank of the token split.

    A rank's stride is the power of two, at most ``most``, that is nearest to how many times slower than the fastest it
    is: powers of two have the smallest common multiples, so ranks are at the same step as often as can be. Then each
    rank's share of the rows is its speed times its stride, as it has so many steps' time for them; all are done with a
    cycle at once. With ``most=1`` only rows are shared out, which is exact where ``plan`` is.

    >>> str(balance("gather=2,displaced", (1, 0.6)))
    'gather=2,displaced(warmup=4,gn=corrected),speeds(1:1.2),steps(1:2)'
    >>> str(balance("gather=3", (1, 1, 0.25), most=1))
    'gather=3,speeds(1:1:0.25)'

    Raises PlanError for speeds or strides that a plan cannot have, and where ``plan`` cannot have the strides that are
    called for (they need ``displaced``).
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise PlanError(f"balance: most is the largest stride, 1 or more, not {most!r}")
    even = replace(plan, speeds=tuple(speeds), steps=())  # looks at them
    strides = tuple(_stride(max(even.speeds) / speed, most) for speed in even.speeds)
    shares = [speed * stride for speed, stride in zip(even.speeds, strides, strict=True)]
    rounded = tuple(float(f"{share / shares[0]:.6g}") for share in shares)
    return replace(
        plan,
        speeds=rounded if len(set(rounded)) > 1 else (),
        steps=strides if len(set(strides)) > 1 else (),
    )


def _stride(slower: float, most: int) -> int:
    """The power of two nearest to ``slower`` in ratio, at most ``most``."""
    return int(2 ** min(round(math.log2(slower)), int(math.log2(most))))
