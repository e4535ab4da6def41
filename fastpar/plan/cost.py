"""What a plan costs, as expressions: bytes that leave a rank, collectives, memory.

One place for the closed forms: ``formula.py`` holds counted bytes against them, the planner evaluates them for
plans that nobody has built. Symbols: Q, K elements of the query and of the key tensor of one attention
(B S H D and B T H D); n ranks that split its tokens, of which u share out heads, w share the rows of one step of
a ring (where heads do not fill the Ulysses axis) and r form the ring: n = u w r. S elements of a rank's result of a
product whose weight is cut by rows over t ranks. E elements of the outputs, N all ranks. Sources: DeepSpeed-Ulysses
section 3; USP table 1; Ring Attention section 3; DistriFusion section 4; Megatron-LM section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import sympy

Q, K, S, E, n, N, u, w, r, t = sympy.symbols("Q K S E n N u w r t", positive=True)

ELEMENTS: dict[str, Any] = {
    "queries and outputs to heads and back": 2 * Q / n * (u - 1) / u,
    "keys and values to heads": 2 * K / (r * u) * (u * w - 1) / (u * w),
    "keys and values round the ring": 2 * K / (r * u) * (r - 1),
    "keys and values gathered": 2 * K * (n - 1) / n,
    "sums of products": 2 * S * (t - 1) / t,
    "outputs": E * (N - 1) / N,
}
"""Elements that leave a rank: per attention (the first four), per pair of products whose weights are cut, per call."""

COLLECTIVES: dict[str, Any] = {
    "ulysses": sympy.Piecewise((4, u > 1), (2, w > 1), (0, True)),
    "ring": r - 1,
    "gather": sympy.Integer(2),
}
"""Collectives per attention; K and V of a ring's step travel together."""

MEMORY: dict[str, Any] = {
    "ulysses": (2 * Q + 2 * K) / n,
    "ring": 4 * K / (u * w * r),
    "gather": 2 * K,
}
"""Elements of buffers that one attention needs besides its own rows."""


@cache
def number(form: Any) -> Callable[..., float]:
    """The expression as a function of keyword arguments named as its symbols; those that it lacks are ignored."""
    names = sorted(map(str, form.free_symbols))
    compiled = sympy.lambdify(names, form, "math")
    return lambda **values: float(compiled(*(values[name] for name in names)))


def text(*names: str) -> str:
    """The named elements added up, as one reads them."""
    return " + ".join(str(ELEMENTS[name]).replace("**", "^") for name in names)


def head_share(degree: int, heads: int) -> int:
    """How many ranks of a Ulysses axis share out ``heads``; the others share rows (rectangles)."""
    return math.gcd(degree, heads)


def attention_elements(plan: str, **values: float) -> float:
    """Elements that one attention sends: ``plan`` is ``gather`` or ``usp`` (u, w and r may be 1)."""
    if plan == "gather":
        return number(ELEMENTS["keys and values gathered"])(**values)
    names = list(ELEMENTS)[:3]
    return sum(number(ELEMENTS[name])(**values) for name in names)
