"""From a captured program and a plan to the program of N ranks, and of one of them.

The one road that ``torch.compile``, ``verify``, ``explain``, ``simulate`` and the command
line all take: plan -> mesh and pipeline -> passes -> localise.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from fastpar.core.errors import OptionError, PlanError
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.check import check
from fastpar.graph.pipeline import Callback, PassContext, Pipeline, callbacks
from fastpar.graph.program import Program
from fastpar.passes.hoist import Hoist
from fastpar.passes.hold import Hold
from fastpar.passes.localise import Localise
from fastpar.passes.overlap import Overlap
from fastpar.plan.durations import durations
from fastpar.plan.expand import mesh_for, pipeline_text
from fastpar.plan.planner import Choice, choose
from fastpar.plan.predict import USABLE, predict
from fastpar.plan.topology import Topology, detect, load
from fastpar.plan.workload import workload
from fastpar.registry import PASSES


@dataclass
class Built:
    """One captured program on its way: what was asked, and the lowered program for all ranks."""

    captured: Program
    lowered: Program
    mesh: Mesh
    plan: Plan
    pipeline: Pipeline
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # per pass, without the verifier
    order: tuple[str, ...] = ()  # of the plan's axes on the devices; empty for the plan's own
    choice: Choice | None = None  # the plans that were weighed, where there was a topology to weigh them by
    first: Built | None = None  # what the first calls of a sampling run do, where it is something else (``displace``)

    @property
    def dealt(self) -> str | None:
        """The mesh axis along which whole calls are dealt to the ranks (``fastpar.run.stream``), if any."""
        return self.lowered.gm.meta.get("dealt")

    def hoisted_anew(self, varying: Collection[str]) -> Built:
        """The same with these inputs among the varying ones, by name: fewer operators are hoisted."""
        known = self.lowered.gm.meta.get("varying", ())
        hoist = next(p for p in self.pipeline.passes if isinstance(p, Hoist))
        hoist = replace(hoist, varying=(*known, *sorted(set(varying) - set(known))))
        passes = tuple(hoist if isinstance(p, Hoist) else p for p in self.pipeline.passes)
        costs = durations(self.mesh, self.choice.topology if self.choice is not None else None)
        again = Pipeline(tuple(p for p in passes if isinstance(p, (Hoist, Overlap))))
        lowered = self.lowered.copy()
        lowered.stage = "lowered"
        lowered = again.run(lowered, PassContext(mesh=self.mesh, plan=self.plan, costs=costs))
        return replace(self, lowered=lowered, pipeline=Pipeline(passes))

    def localise(self, rank: int, groups: dict[tuple[str, ...], str] | None = None) -> Program:
        """The program of one rank; ``groups`` maps mesh axes to names of process groups."""
        begin = time.perf_counter()
        program = Localise(rank=rank).apply(self.lowered, PassContext(mesh=self.mesh, plan=self.plan, groups=groups))
        self.seconds["localise"] = time.perf_counter() - begin
        return program


def resolve(plan: Plan | str, ranks: int | None = None) -> Plan:
    """A plan whose degrees multiply to ``ranks``.

    Raises PlanError where they do not, or where ``auto`` does not know how many ranks there are.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    if plan.auto and ranks is None:
        raise PlanError("plan 'auto' needs the number of ranks: give ranks=N, or degrees as in 'ulysses=4'")
    if ranks is not None:
        plan.check(ranks)
    return plan


def planned(
    program: Program, plan: Plan | str, ranks: int | None, topology: str | Topology | None, lowering: str = "inductor"
) -> tuple[Plan, tuple[str, ...], Choice | None, list[str]]:
    """(plan, order of its axes on the devices, what ``auto`` weighed, notes) for a captured program.

    With a topology, or ``auto``, axes are placed by their links; else in the plan's own order.
    """
    asked = resolve(plan, ranks)
    if not asked.auto and topology is None:
        return asked, (), None, []
    n = ranks if asked.auto and ranks else asked.degree
    if topology is None:
        box, why = detect(n)
    else:
        box, why = load(topology) if isinstance(topology, str) else topology, ""
    work = workload(program)
    choice = choose(work, n, box, lowering)
    if asked.auto:
        if len(choice.near) > 1:
            choice = choice.decided(_scheduled(program, choice, lowering))
        return choice.plan, choice.near[0].order, choice, [choice.note, *filter(None, [why])]
    found = predict(work, asked, box, lowering)
    limit = USABLE * box.device.memory
    if asked.displaced and found.memory > limit:
        waiting = predict(work, replace(asked, displaced=None), box, lowering)
        raise PlanError(
            f"plan {str(asked)!r} needs {found.memory / 1e9:.3g} GB on each device, "
            f"{(found.memory - waiting.memory) / 1e9:.3g} of them for what is kept from step to step, and {box.name} "
            f"has {limit / 1e9:.3g} usable; {str(waiting.plan)!r} needs {waiting.memory / 1e9:.3g}"
        )
    return asked, found.order, choice, []


def _scheduled(program: Program, choice: Choice, lowering: str) -> dict[str, float]:
    """Seconds of a call as ``overlap`` plays it, of the plans that a prediction does not tell apart: it predicts plans
    as they are written, and what hides behind what is known only once a program has been put in order."""
    found: dict[str, float] = {}
    for near in choice.near:
        options: dict[str, Any] = {"topology": choice.topology, "lowering": lowering, "order": near.order}
        built = build(program, near.plan, verify_structure=False, **options)
        schedule = built.lowered.gm.meta.get("schedule")
        found[str(near.plan)] = schedule.ways[0].seconds if schedule is not None else near.seconds
    return found


def build(
    program: Program,
    plan: Plan | str,
    ranks: int | None = None,
    passes: str | None = None,
    callback: Callback | None = None,
    verify_structure: bool = True,
    topology: str | Topology | None = None,
    lowering: str = "inductor",
    hold: bool = False,
    order: tuple[str, ...] | None = None,
) -> Built:
    """Run the plan's pipeline (or ``passes``) on a captured program.

    ``passes`` may refine the plan's pipeline but not contradict it: it must contain the attention and lossy passes
    that the plan asks for, and no other. ``topology`` (a preset's name or a file) places the plan's axes, and decides
    what ``auto`` is; ``order`` is that of axes which were placed before. ``hold``: ranks are given their parts of
    weights.
    Raises PlanError, OptionError, CheckError.
    """
    if order is None:
        plan, order, choice, notes = planned(program, plan, ranks, topology, lowering)
    else:
        plan, choice, notes = resolve(plan, ranks), None, []
    expected = Pipeline.parse(pipeline_text(plan), PASSES)
    pipeline = expected if passes is None else Pipeline.parse(passes, PASSES)
    if passes is not None:
        _agrees(pipeline, expected, plan)
    if hold and "hold" not in [p.name for p in pipeline.passes]:
        pipeline = _holding(pipeline)
    mesh = mesh_for(plan, program.graph, order)
    notes += [f"lossy: {reason}" for reason in plan.lossy]
    costs = durations(mesh, choice.topology if choice is not None else topology)
    ctx = PassContext(mesh=mesh, plan=plan, costs=costs, notes=list(notes))
    notes = ctx.notes
    seconds: dict[str, float] = {}

    def timed(previous: Any, now: Program, following: Any, took: float) -> None:
        if previous is not None:
            seconds[previous.name] = seconds.get(previous.name, 0.0) + took
        if verify_structure:
            check(now)

    each = [timed] if callback is None else [timed, callback]
    start = program.copy()
    start.mesh, start.plan = mesh, plan
    lowered = pipeline.run(start, ctx, callbacks(each))
    notes += [n for n in lowered.notes if n not in notes]
    built = Built(program, lowered, mesh, plan, pipeline, notes, seconds, order, choice)
    if lowered.first is not None:
        names = [p.name for p in pipeline.passes]
        took = next(i for i, name in enumerate(names) if name in ("displace", "stride"))
        rest = Pipeline(pipeline.passes[took + 1 :])
        first = rest.run(lowered.first.copy(), PassContext(mesh=mesh, plan=plan, costs=costs))
        if verify_structure:
            check(first)
        built.first = replace(built, lowered=first)
    return built


def _holding(pipeline: Pipeline) -> Pipeline:
    """The pipeline with ``hold`` as soon as all slices of weights are there."""
    passes = list(pipeline.passes)
    last = max(i for i, p in enumerate(passes) if p.name in ("lower", "split-weights"))
    return Pipeline((*passes[: last + 1], Hold(), *passes[last + 1 :]))


def _agrees(pipeline: Pipeline, expected: Pipeline, plan: Plan) -> None:
    wanted, given = (
        [p.spec() if p.lossy else p.name for p in one.passes if p.lossy or p.name.startswith("attention-")]
        for one in (expected, pipeline)
    )
    if wanted != given:
        raise OptionError(
            f"passes {str(pipeline)!r} disagree with plan {str(plan)!r}, which expands to {str(expected)!r}"
        )
