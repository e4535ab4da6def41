"""What a plan costs, as expressions: bytes that leave a rank, collectives, memory.

One place for the closed forms: ``formula.py`` holds counted bytes against them, the planner evaluates them for
plans that nobody has built. Symbols: Q, K elements of the query and of the key tensor of one attention
(B S H D and B T H D); n ranks that split its tokens, of which u share out heads, w share the rows of one step of
a ring (where heads do not fill the Ulysses axis) and r form the ring: n = u w r. A torus over M machines, of which m
share out heads, leaves keys split over r ranks: M times the ring inside a machine. S elements of a rank's result of
a product whose weight is cut by rows over t ranks, or of any other sum that t ranks add up. R elements of a rank's rows
that the windows of its two neighbours have as well. E elements of the outputs, N all ranks. D numbers of b
bytes are a row; of a tensor that travels quantized, f = (D + 4)/(b*D) of the bytes do. Sources: DeepSpeed-Ulysses
section 3; USP table 1; Ring Attention section 3; DistriFusion section 4; Megatron-LM section 3; StreamFusion,
sections on topology-aware scheduling and Torus Attention; cache-dit's 8-bit exchanges, in which K is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import sympy

from fastpar.core.plan import Plan
from fastpar.ops.quantize import row_bytes
from fastpar.passes.attention_ulysses import UNBALANCED

Q, K, S, R, E, n, N, u, w, r, t, M, m, f = sympy.symbols("Q K S R E n N u w r t M m f", positive=True)

ELEMENTS: dict[str, Any] = {
    "queries and outputs to heads and back": 2 * Q / n * (u - 1) / u,
    "keys and values to heads": 2 * K / (r * u) * (u * w - 1) / (u * w),
    "keys and values round the ring": 2 * K / (r * u) * (r - 1),
    "keys and values gathered": 2 * K * (n - 1) / n,
    "queries and outputs in stages": 2 * Q / n * (m - 1) / m,
    "keys and values in stages": 2 * K / (r * u * m) * (M - 1),
    "keys and values round machines' rings": 2 * K / (r * u * m) * (r - M),
    "sums over ranks": 2 * S * (t - 1) / t,
    "sums of which ranks keep rows": S * (t - 1) / t,
    "terms of sums": S * (t - 1),
    "halos": R,
    "outputs": E * (N - 1) / N,
}
"""Elements that leave a rank: per attention (the first seven), per sum (behind each pair of products whose weights are
cut, and over split rows), per exchange of windows (a convolution of k taps and stride s has R = k - s rows, of which
each of only two ranks sends its own side's), per call."""

TERMS = {
    "ulysses": tuple(ELEMENTS)[:2],
    "ring": tuple(ELEMENTS)[2:3],
    "gather": tuple(ELEMENTS)[3:4],
    "torus": tuple(ELEMENTS)[4:6],
    "torus,ring": tuple(ELEMENTS)[6:7],
}
"""What an attention's elements add up from, by the term of the plan that sends them."""

BETWEEN_MACHINES = TERMS["torus"]
"""Of these, what leaves a machine where a torus joins machines."""

COLLECTIVES: dict[str, Any] = {
    "ulysses": sympy.Piecewise((4, u > 1), (2, w > 1), (0, True)),
    "ring": r - 1,
    "gather": sympy.Integer(2),
    "torus": 2 * (m - 1) + M - 1 + r - M,
}
"""Collectives per attention; K and V of a step travel together. A torus has Ulysses' as well, inside machines."""

MEMORY: dict[str, Any] = {
    "ulysses": (2 * Q + 2 * K) / n,
    "ring": 4 * K / (u * w * r),
    "gather": 2 * K,
    "torus": 4 * Q / n + 2 * K / (r * u * m) * (1 + r / M),
}
"""Elements of buffers that one attention needs besides its own rows."""


@cache
def number(form: Any) -> Callable[..., float]:
    """The expression as a function of keyword arguments named as its symbols; those that it lacks are ignored."""
    names = sorted(map(str, form.free_symbols))
    compiled = sympy.lambdify(names, form, "math")
    return lambda **values: float(compiled(*(values[name] for name in names)))


def text(*names: str, fp8: str = "") -> str:
    """The named elements added up, as one reads them; of tensors in ``fp8`` (letters) only f travels."""
    pairs = {Q: _mean(fp8, "qo", f) * Q, K: _mean(fp8, "kv", f) * K}
    return " + ".join(str(ELEMENTS[name].subs(pairs, simultaneous=True)).replace("**", "^") for name in names)


def _mean(fp8: str, pair: str, quantized: Any) -> Any:
    """What travels of a pair of tensors, over what they are: ``quantized`` of those in ``fp8``, all of the others."""
    count = sum(letter in fp8 for letter in pair)
    return (2 - count + count * quantized) / sympy.Integer(2)


def shares(fp8: str, width: int, itemsize: int) -> tuple[float, float]:
    """(of queries and outputs, of keys and values) the bytes that travel over those of the tensors themselves.

    Every form is linear in Q, which stands for queries and outputs alike, or in K, for keys and values; so these are
    what Q and K are to be multiplied by. ``width`` numbers of ``itemsize`` bytes are a row.
    """
    if not width:
        return 1.0, 1.0
    row = row_bytes(width, itemsize) / (width * itemsize)
    return float(_mean(fp8, "qo", row)), float(_mean(fp8, "kv", row))


def head_share(degree: int, heads: int) -> int:
    """How many ranks of a Ulysses axis share out ``heads``; the others share rows (rectangles).

    As many as leave the busiest about as much work as the mean: five ranks of 24 heads have 5, 5, 5, 5 and 4.
    """
    shares = (d for d in range(1, degree + 1) if degree % d == 0)
    return max(d for d in shares if math.ceil(heads / d) * d <= UNBALANCED * heads)


def attention_elements(plan: str, **values: float) -> float:
    """Elements that one attention sends: ``plan`` is ``gather`` or ``usp`` (u, w and r may be 1)."""
    names = TERMS["gather"] if plan == "gather" else TERMS["ulysses"] + TERMS["ring"]
    return sum(elements(name, **values) for name in names)


def elements(name: str, **values: float) -> float:
    """One entry of ``ELEMENTS`` for the symbols' values."""
    return number(ELEMENTS[name])(**values)


def terms(plan: Plan) -> tuple[str, ...]:
    """Names of the elements that an attention sends under ``plan``."""
    found: tuple[str, ...] = ()
    for name in ("ulysses", "ring", "gather", "torus"):
        if getattr(plan, name):
            found += TERMS["torus,ring"] if name == "ring" and plan.torus else TERMS[name]
    return found


def spaces(plan: Plan) -> tuple[str, ...]:
    """Entries of ``COLLECTIVES`` and ``MEMORY`` that a plan's attention adds up from: a torus counts its rings."""
    found = tuple(name for name in ("ulysses", "gather", "torus") if getattr(plan, name))
    return (*found, "ring") if plan.ring and not plan.torus else found
