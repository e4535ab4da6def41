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
from fastpar.passes.localise import Localise
from fastpar.plan.expand import IMPLEMENTED, mesh_for, pipeline_text
from fastpar.plan.planner import Choice, choose
from fastpar.plan.predict import predict
from fastpar.plan.topology import detect, load
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
    choice: Choice | None = None  # the plans that were weighed, where there was a topology to weigh them by

    @property
    def dealt(self) -> str | None:
        """The mesh axis along which whole calls are dealt to the ranks (``fastpar.run.stream``), if any."""
        return self.lowered.gm.meta.get("dealt")

    def hoisted_anew(self, varying: Collection[str]) -> Built:
        """The same with these inputs among the varying ones, by name: fewer operators are hoisted."""
        known = self.lowered.gm.meta.get("varying", ())
        hoist = next(p for p in self.pipeline.passes if isinstance(p, Hoist))
        hoist = replace(hoist, varying=(*known, *sorted(set(varying) - set(known))))
        ctx = PassContext(mesh=self.mesh, plan=self.plan)
        passes = tuple(hoist if isinstance(p, Hoist) else p for p in self.pipeline.passes)
        return replace(self, lowered=hoist.apply(self.lowered.copy(), ctx), pipeline=Pipeline(passes))

    def localise(self, rank: int, groups: dict[tuple[str, ...], str] | None = None) -> Program:
        """The program of one rank; ``groups`` maps mesh axes to names of process groups."""
        begin = time.perf_counter()
        program = Localise(rank=rank).apply(self.lowered, PassContext(mesh=self.mesh, plan=self.plan, groups=groups))
        self.seconds["localise"] = time.perf_counter() - begin
        return program


def resolve(plan: Plan | str, ranks: int | None = None) -> Plan:
    """A plan whose degrees multiply to ``ranks``, all of whose terms are implemented.

    Raises PlanError where it is not, or where ``auto`` does not know how many ranks there are.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    if plan.auto and ranks is None:
        raise PlanError("plan 'auto' needs the number of ranks: give ranks=N, or degrees as in 'ulysses=4'")
    missing = plan.unsupported(IMPLEMENTED)
    if missing:
        raise PlanError(
            f"plan {str(plan)!r}: {', '.join(missing)} not implemented yet; implemented: {', '.join(IMPLEMENTED)}"
        )
    if ranks is not None:
        plan.check(ranks)
    return plan


def planned(
    program: Program, plan: Plan | str, ranks: int | None, topology: str | None, lowering: str = "inductor"
) -> tuple[Plan, tuple[str, ...], Choice | None, list[str]]:
    """(plan, order of its axes on the devices, what ``auto`` weighed, notes) for a captured program.

    With a topology, or ``auto``, axes are placed by their links; else in the plan's own order.
    """
    asked = resolve(plan, ranks)
    if not asked.auto and topology is None:
        return asked, (), None, []
    n = ranks if asked.auto and ranks else asked.degree
    box, why = (load(topology), "") if topology is not None else detect(n)
    work = workload(program)
    choice = choose(work, n, box, lowering)
    if asked.auto:
        won = choice.verdicts[0].prediction
        assert won is not None
        return choice.plan, won.order, choice, [choice.note, *filter(None, [why])]
    return asked, predict(work, asked, box, lowering).order, choice, []


def build(
    program: Program,
    plan: Plan | str,
    ranks: int | None = None,
    passes: str | None = None,
    callback: Callback | None = None,
    verify_structure: bool = True,
    topology: str | None = None,
    lowering: str = "inductor",
    hold: bool = False,
) -> Built:
    """Run the plan's pipeline (or ``passes``) on a captured program.

    ``passes`` may refine the plan's pipeline but not contradict it: it must contain the
    attention pass that the plan asks for. ``topology`` (a preset's name or a file) places the plan's
    axes, and decides what ``auto`` is. ``hold``: ranks are given their parts of weights.
    Raises PlanError, OptionError, CheckError.
    """
    plan, order, choice, notes = planned(program, plan, ranks, topology, lowering)
    expected = Pipeline.parse(pipeline_text(plan), PASSES)
    pipeline = expected if passes is None else Pipeline.parse(passes, PASSES)
    if passes is not None:
        _agrees(pipeline, expected, plan)
    if hold and pipeline.passes[-1].name != "hold":
        pipeline = Pipeline.parse(f"{pipeline},hold", PASSES)
    mesh = mesh_for(plan, program.graph, order)
    notes += [f"lossy: {reason}" for reason in plan.lossy]
    ctx = PassContext(mesh=mesh, plan=plan, notes=list(notes))
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
    return Built(program, lowered, mesh, plan, pipeline, notes, seconds, choice)


def _agrees(pipeline: Pipeline, expected: Pipeline, plan: Plan) -> None:
    wanted = [p.name for p in expected.passes if p.name.startswith("attention-")]
    given = [p.name for p in pipeline.passes if p.name.startswith("attention-")]
    if wanted != given:
        raise OptionError(
            f"passes {str(pipeline)!r} disagree with plan {str(plan)!r}, which expands to {str(expected)!r}"
        )
