"""``Report``: what ``verify`` and ``explain`` return."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastpar.graph.count import Collective
from fastpar.plan.timeline import Timeline


@dataclass(frozen=True)
class Replicated:
    """Work that every rank repeats: FLOPs of one source line, as a share of eager's."""

    operator: str
    source: str
    share: float


@dataclass(frozen=True)
class FallbackReport:
    """A gather that no plan asked for; ``bytes`` leave the busiest rank."""

    operator: str
    source: str
    reason: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class PlanRow:
    """One plan that the planner weighed: predicted milliseconds per call (None where it is invalid), of which
    communication that is not hidden, bytes that leave the busiest rank, gigabytes of memory, and why; and of each
    axis the outermost link that it crosses."""

    plan: str
    milliseconds: float | None
    exposed: float | None
    bytes: int | None
    gigabytes: float | None
    reason: str
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkRow:
    """One class of links of a topology: ``bytes`` that leave the busiest member (``ranks`` neighbouring ranks: a
    device, a machine) over its link per call, counted, and by the plan's closed form; ``axes`` of the mesh whose
    exchanges cross it and go no further out."""

    name: str
    ranks: int
    bytes: int
    formula: int
    axes: list[str]


@dataclass(frozen=True)
class OrderRow:
    """One order of the program that ``overlap`` weighed: milliseconds per call, of which exposed, and messages."""

    order: str
    milliseconds: float
    exposed: float
    collectives: int


@dataclass(frozen=True)
class ExposedRow:
    """Collectives of one source line that stay exposed, and why nothing hides them."""

    source: str
    milliseconds: float
    count: int
    reason: str


@dataclass(frozen=True)
class Hoisted:
    """What is computed once per generation and stream (pass ``hoist``), and what later calls hence leave out.

    ``flops_share`` is of eager's FLOPs, ``bytes`` leave the busiest rank, ``collectives`` is how many. For it a rank
    keeps ``values`` tensors of ``kept_bytes`` per stream, and checks ``checked_bytes`` of inputs and weights on every
    call; where ranks check different parts there are ``agreements`` all-reduces per call, of a number per input.
    ``varying`` are the inputs that are taken to change from step to step.
    """

    flops_share: float = 0.0
    bytes: int = 0
    collectives: int = 0
    values: int = 0
    kept_bytes: int = 0
    checked_bytes: int = 0
    agreements: int = 0
    varying: tuple[str, ...] = ()

    def __add__(self, other: Hoisted) -> Hoisted:
        """Of two graphs of one model."""
        numbers = [f.name for f in dataclasses.fields(self) if f.name != "varying"]
        summed = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return Hoisted(**summed, varying=tuple(dict.fromkeys(self.varying + other.varying)))


@dataclass
class Report:
    """Result of ``verify`` (all fields) or ``explain`` (those that need no run).

    ``max_rel_err`` is the largest absolute difference over the largest absolute reference value,
    the worst output counts; ``tolerance`` is what it is held against. Shares are of eager's
    FLOPs: ``flops_share`` is the busiest rank's, 1/N is perfect; ``time_share`` is the same of the
    seconds that products and reductions take on a roofline, communication not counted. Of several graphs
    they are those of all together, weighted by ``eager_flops`` and ``eager_time`` (eager's FLOPs, and its
    seconds on the roofline). Bytes are per call of the model and leave a rank for others;
    ``bytes_per_rank`` is the largest rank's, ``bytes_formula`` the plan's closed form: ``formula``, with what its
    symbols stand for in ``symbols``. ``collectives_formula`` is the number of collectives by it, before messages are
    joined. These are the numbers of a generation's first call; ``hoisted`` is what of it later calls leave out, and
    ``step_flops_share``, ``step_bytes_per_rank`` and ``step_collectives`` (how many) what they are left with.
    Of a displaced plan the numbers are those of a call that takes what the last one has kept, ``carried_bytes`` of it
    on the largest rank per stream. With a topology, ``links`` has what crosses each class of links, ``predicted`` the
    seconds of this plan's program on the virtual clock (in all, computing, communicating, exposed), and ``plans`` every
    plan that was weighed. ``timeline`` is what every rank does meanwhile, for ``fastpar.plan.trace`` and
    ``fastpar.plan.picture``; None where the clock had too many operators to walk. ``generation``, where steps were
    given, has the seconds of a sampling run, of its ``first`` step and of a later ``step``, and how many ``steps`` and
    ``streams`` it has.
    ``orders`` are those that ``overlap`` weighed for later calls, the one that it took first; ``exposed`` what nothing
    hides in it.
    """

    plan: str
    pipeline: str
    ranks: int
    graphs: int
    ok: bool | None = None
    max_abs_err: float | None = None
    max_rel_err: float | None = None
    tolerance: float | None = None
    diverged_at: str | None = None
    flops_share: float = 1.0
    attainable_share: float = 1.0
    time_share: float = 1.0
    eager_flops: int = 0
    eager_time: float = 0.0
    replicated: list[Replicated] = field(default_factory=list)
    fallbacks: list[FallbackReport] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    bytes_per_rank: int = 0
    bytes_formula: int = 0
    hoisted: Hoisted = field(default_factory=Hoisted)
    carried_bytes: int = 0
    formula: str = ""
    symbols: list[dict[str, int]] = field(default_factory=list)
    collectives_formula: int = 0
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    topology: str = ""
    links: list[LinkRow] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)
    plans: list[PlanRow] = field(default_factory=list)
    orders: list[OrderRow] = field(default_factory=list)
    exposed: list[ExposedRow] = field(default_factory=list)
    generation: dict[str, float] = field(default_factory=dict)
    timeline: Timeline | None = field(default=None, repr=False)

    @property
    def step_flops_share(self) -> float:
        return self.flops_share - self.hoisted.flops_share

    @property
    def step_bytes_per_rank(self) -> int:
        return self.bytes_per_rank - self.hoisted.bytes

    @property
    def step_collectives(self) -> int:
        return sum(c.count for c in self.collectives) - self.hoisted.collectives

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the timeline, whose form is a trace."""
        steps = ("step_flops_share", "step_bytes_per_rank", "step_collectives")
        plain = dataclasses.asdict(dataclasses.replace(self, timeline=None))
        del plain["timeline"]
        return {**plain, **{name: getattr(self, name) for name in steps}}

    def __bool__(self) -> bool:
        return bool(self.ok)
