"""A plan: how one model's work is spread over ranks, as text and as a frozen dataclass.

``Plan.parse("ulysses=4,ring=2,fp8(qvo)")`` equals ``Plan(ulysses=4, ring=2, fp8="qvo")``, and ``str`` of
either gives that text back. The order in which terms are written carries no meaning; the canonical text has
the order of ``TERMS``. What a plan says is checked when it is made, so a ``Plan`` that exists is consistent;
whether it fits a mesh is asked by ``check``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from fastpar.core.errors import PlanError
from fastpar.core.text import Term, Value, duplicates, format_terms, parse_terms, pointed, unknown

# Terms with a degree, then the others; also the order of the canonical text.
DEGREES = ("ulysses", "ring", "torus", "gather", "cfg", "tp", "naive")
TERMS = (*DEGREES, "displaced", "fp8", "speeds", "steps", "auto")

# Row-major order of the mesh, so the last axis joins neighbouring ranks, which have the fastest links.
# Guidance exchanges least and once per step; torus is meant to cross machines; a ring sends to one neighbour
# and hides it; an all-to-all and tensor parallelism's reductions stand in every layer, in the way.
MESH_ORDER = ("cfg", "torus", "ring", "gather", "naive", "ulysses", "tp")
TOKEN_AXES = ("torus", "ring", "gather", "naive", "ulysses")
"""Axes over which tokens or rows are split, in mesh order."""

GROUP_NORMS = ("corrected", "stale", "sync", "separate", "none")
FP8_LETTERS = "qkvogh"
FP8_MEANING = "q, k, v, o of attention, g for other gathers, h for halos"

# What cannot stand together: a term, the terms that it excludes, and the reason that the error gives.
_CONFLICTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("gather", ("ulysses", "ring", "torus"), "both split the tokens and bring K and V together"),
    ("naive", ("ulysses", "ring", "torus", "gather", "displaced", "fp8"), "naive patches never talk"),
)


@dataclass(frozen=True)
class Displaced:
    """Activations of the other ranks come from the previous step (DistriFusion).

    ``warmup`` is the number of synchronous steps at the start; distrifuser's W is our W + 1. ``gn`` says what
    group norms do: ``corrected`` (stale statistics corrected by the own patch's change), ``stale``, ``sync``
    (fresh statistics, exchanged in the way), ``separate`` and ``none``.
    """

    warmup: int = 4
    gn: str = "corrected"

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise PlanError(f"displaced: warmup is a number of steps, 0 or more, not {self.warmup!r}")
        if self.gn not in GROUP_NORMS:
            raise PlanError("displaced: " + unknown("gn", str(self.gn), GROUP_NORMS))

    def __str__(self) -> str:
        return str(self._term())

    def _term(self) -> Term:
        # The grammar's bare word `none` is the value None, so `gn=none` is written from None.
        gn = None if self.gn == "none" else self.gn
        return Term("displaced", options=(("warmup", self.warmup), ("gn", gn)))


@dataclass(frozen=True)
class Plan:
    """The terms of a plan; an absent one is ``None`` or empty. Raises ``PlanError`` if they do not combine.

    Degrees are whole numbers from 1; a term with degree 1 is kept, it makes an axis of size 1. ``fp8`` holds
    letters of ``qkvogh``; ``speeds`` and ``steps`` hold one entry per rank of the token split, in rank order.
    """

    ulysses: int | None = None
    ring: int | None = None
    torus: int | None = None
    gather: int | None = None
    cfg: int | None = None
    tp: int | None = None
    naive: int | None = None
    displaced: Displaced | None = None
    fp8: str = ""
    speeds: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    auto: bool = False

    def __post_init__(self) -> None:
        # Normal forms first, so that equal plans compare equal: letters in one order, speeds as floats.
        object.__setattr__(self, "fp8", fp8_letters(self.fp8))
        object.__setattr__(self, "speeds", tuple(_speed(speed) for speed in self.speeds))
        object.__setattr__(self, "steps", tuple(_stride(stride) for stride in self.steps))
        for name in DEGREES:
            degree = getattr(self, name)
            if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int) or degree < 1):
                raise PlanError(f"{name} takes a whole number of ranks, 1 or more, not {degree!r}")
        _combine(self)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that ``text`` says.

        Raises ``TextError`` where the text breaks the grammar and ``PlanError`` for unknown, repeated or
        conflicting terms and for arguments that a term does not take.
        """
        terms = parse_terms(text, "plan")
        found: dict[str, object] = {}
        for term in terms:
            if term.name not in TERMS:
                raise PlanError(pointed(text, term.at, unknown("plan term", term.name, TERMS)))
            if term.name in found:
                raise PlanError(pointed(text, term.at, f"plan term {term.name!r} is given twice"))
            try:
                found[term.name] = _READERS.get(term.name, _read_degree)(term)
            except PlanError as error:
                raise PlanError(pointed(text, term.at, str(error))) from None
        return cls(**found)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Canonical text: ``Plan.parse(str(plan)) == plan``."""
        return format_terms(self._terms())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms that the plan has, in the order of ``TERMS``."""
        return tuple(name for name in TERMS if getattr(self, name) not in (None, "", (), False))

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """Mesh axes in row-major order (``MESH_ORDER``), as pairs of name and degree."""
        return tuple((name, getattr(self, name)) for name in MESH_ORDER if getattr(self, name) is not None)

    @property
    def degree(self) -> int:
        """Number of ranks: the product of all degrees (1 for ``auto``, whose degrees are not chosen yet)."""
        return math.prod(degree for _, degree in self.axes)

    @property
    def token_degree(self) -> int:
        """Number of ranks over which tokens or rows are split."""
        return math.prod(degree for name, degree in self.axes if name in TOKEN_AXES)

    @property
    def lossy(self) -> list[str]:
        """Why the plan does not compute the model's own function, one reason per term; empty if it does."""
        return list(self._reasons())

    def check(self, world_size: int) -> None:
        """Raise ``PlanError`` unless the degrees multiply to ``world_size``. ``auto`` fits every mesh."""
        if world_size < 1:
            raise PlanError(f"a mesh has 1 rank or more, not {world_size}")
        if self.auto or self.degree == world_size:
            return
        product = " x ".join(f"{name}={degree}" for name, degree in self.axes) or "no degree"
        raise PlanError(
            f"plan {str(self)!r} is for {_ranks(self.degree)} ({product}) but the mesh has {world_size}; "
            f"plans that fit {world_size}: {' or '.join(map(repr, self._fitting(world_size)))}"
        )

    def _terms(self) -> Iterator[Term]:
        for name in self.names:
            value = getattr(self, name)
            if name in DEGREES:
                yield Term(name, value)
            elif isinstance(value, Displaced):
                yield value._term()
            elif name == "auto":
                yield Term(name)
            elif name == "speeds":
                yield Term(name, args=(_row(tuple(_short(speed) for speed in value)),))
            elif name == "steps":
                yield Term(name, args=(_row(value),))
            else:
                yield Term(name, args=(value,))

    def _reasons(self) -> Iterator[str]:
        if self.naive and self.naive > 1:
            yield f"naive={self.naive}: patches never exchange anything"
        if self.displaced:
            yield (
                f"{self.displaced}: after {self.displaced.warmup} synchronous steps the other ranks' "
                "activations are those of the previous step"
            )
        if self.fp8:
            yield f"fp8({self.fp8}): tensors travel as e4m3 with per-row scales"
        if any(stride > 1 for stride in self.steps):
            yield (
                f"steps({':'.join(map(str, self.steps))}): after the warm-up a rank runs the model in one of so many "
                "steps, and keeps its output for those between"
            )

    def _fitting(self, world_size: int) -> list[str]:
        """Up to three plans of ``world_size`` ranks: this one with one degree changed, then plain ones."""
        found: list[str] = []
        for name, degree in self.axes:
            rest = self.degree // degree
            if world_size % rest == 0:
                change: dict[str, Any] = {name: world_size // rest, "speeds": (), "steps": ()}
                found.append(str(replace(self, **change)))  # without the rows: their length is the split's
        return [*dict.fromkeys([*found, f"ulysses={world_size}", f"gather={world_size}"])][:3]


def _combine(plan: Plan) -> None:
    """Raise ``PlanError`` for terms that cannot stand together."""
    names = plan.names
    if not names:
        raise PlanError("an empty plan; give 'auto', or terms such as 'ulysses=4' or 'gather=2,cfg=2'")
    if plan.auto and len(names) > 1:
        raise PlanError(f"'auto' stands alone: it chooses all terms; remove it, or {', '.join(names[:-1])}")
    for one, others, why in _CONFLICTS:
        for other in others:
            if one in names and other in names:
                raise PlanError(f"{one!r} and {other!r} exclude each other: {why}")
    if plan.torus and plan.ring and plan.ulysses:
        raise PlanError("'torus' takes one of 'ring' and 'ulysses' inside the machine, not both")
    if plan.displaced and not plan.gather:
        raise PlanError("'displaced' needs 'gather', whose exchange it displaces, as in 'gather=2,displaced'")
    if plan.fp8 and not plan.axes:
        raise PlanError("'fp8' is how tensors travel, and nothing does; add a degree: 'ulysses=4,fp8(qvo)'")
    if plan.steps and not plan.displaced:
        raise PlanError("'steps' needs 'displaced': ranks with unequal strides have no fresh values")
    if plan.steps and plan.displaced and plan.displaced.gn in ("sync", "none"):
        reason = {"sync": "waits for all ranks in every step", "none": "sends nothing after the warm-up"}
        raise PlanError(f"'steps' and displaced(gn={plan.displaced.gn}), which {reason[plan.displaced.gn]}, exclude "
                        "each other; gn=corrected, gn=stale and gn=separate go with it")
    for name, row in (("speeds", plan.speeds), ("steps", plan.steps)):
        if not row:
            continue
        split = [f"{axis}={degree}" for axis, degree in plan.axes if axis in TOKEN_AXES]
        if not split:
            raise PlanError(f"{name!r} needs a split of tokens or rows; add one of {', '.join(TOKEN_AXES)}")
        if len(row) != plan.token_degree:
            raise PlanError(
                f"{name!r} has {len(row)} entries but {' x '.join(split)} splits over "
                f"{_ranks(plan.token_degree)}; give one entry per rank of the split"
            )


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def fp8_letters(letters: str) -> str:
    """The letters of ``fp8`` in their order. Raises ``PlanError`` for others, and for one that is given twice."""
    if not isinstance(letters, str):
        raise PlanError(f"fp8 takes letters of {FP8_MEANING}, not {letters!r}")
    bad = [letter for letter in letters if letter not in FP8_LETTERS]
    if bad:
        raise PlanError(f"fp8 does not know {bad[0]!r}; valid letters: {FP8_MEANING}")
    if duplicates(letters):
        raise PlanError(f"fp8 has the letter {duplicates(letters)[0]!r} twice in {letters!r}")
    return "".join(letter for letter in FP8_LETTERS if letter in letters)


def _speed(speed: object) -> float:
    if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed < math.inf:
        raise PlanError(f"speeds are finite numbers above 0, as in speeds(1:0.6), not {speed!r}")
    return float(speed)


def _stride(stride: object) -> int:
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise PlanError(f"steps are whole numbers, 1 or more, as in steps(1:2), not {stride!r}")
    return stride


def _short(speed: float) -> int | float:
    """1 rather than 1.0, as one would write it; huge floats keep their exponent."""
    return int(speed) if speed.is_integer() and speed < 1e6 else speed


def _row(values: tuple[int | float, ...]) -> Value:
    return values[0] if len(values) == 1 else values


def _read_degree(term: Term) -> int:
    if term.degree is None or term.degree < 1:
        raise PlanError(f"{term.name!r} takes a number of ranks, 1 or more, as in '{term.name}=2'")
    return term.degree


def _read_auto(term: Term) -> bool:
    if term != Term("auto"):
        raise PlanError("'auto' takes no arguments")
    return True


def _read_displaced(term: Term) -> Displaced:
    _plain(term, "displaced(warmup=4,gn=corrected)", options=("warmup", "gn"))
    options = {key: "none" if key == "gn" and value is None else value for key, value in term.options}
    return Displaced(**options)  # type: ignore[arg-type]  # its own checks look at the types


def _read_fp8(term: Term) -> str:
    (letters,) = _plain(term, "fp8(qvo)", args=1)
    if not isinstance(letters, str) or not letters:
        raise PlanError(f"fp8 takes letters, as in fp8(qvo): {FP8_MEANING}")
    return fp8_letters(letters)


def _read_row(check: Callable[[object], object], example: str) -> Callable[[Term], object]:
    def read(term: Term) -> object:
        (row,) = _plain(term, example, args=1)
        values = row if isinstance(row, tuple) else (row,)
        if not values:
            raise PlanError(f"{term.name!r} takes one entry per rank, as in {example}")
        return tuple(check(value) for value in values)

    return read


def _plain(term: Term, example: str, *, args: int = 0, options: tuple[str, ...] = ()) -> tuple[Value, ...]:
    """The arguments of ``term`` if it has the shape of ``example``, else ``PlanError``."""
    for key, _ in term.options:
        if key not in options:
            valid = unknown("option", key, options) if options else "takes no options"
            raise PlanError(f"{term.name!r}: {valid}; write it as {example}")
    if term.degree is not None or len(term.args) != args:
        raise PlanError(f"{term.name!r} is written as {example}")
    return term.args


_READERS: Mapping[str, Callable[[Term], object]] = MappingProxyType(
    {
        "displaced": _read_displaced,
        "fp8": _read_fp8,
        "speeds": _read_row(_speed, "speeds(1:0.6)"),
        "steps": _read_row(_stride, "steps(1:2)"),
        "auto": _read_auto,
    }
)
