"""Proof between passes: after every pass the program runs on N virtual ranks and must give what eager gives.

This is what makes each stage a program and not a note about one. It is done in float64 whatever
the model's dtype: a pass that is right there is right, and what rounding does elsewhere is
``verify``'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastpar.backends.simulate import run_global, run_local, with_carried
from fastpar.core.errors import CheckError
from fastpar.core.mesh import Mesh
from fastpar.graph.capture import Recorded
from fastpar.graph.check import check_order
from fastpar.graph.pipeline import Pass, PassContext, Pipeline
from fastpar.graph.program import Program
from fastpar.passes.displace import Displace
from fastpar.plan.durations import durations
from fastpar.run.compare import FLOAT64_TOLERANCE, difference, float64_reference, same_bits
from fastpar.run.rounded import rounded, rounds


@dataclass(frozen=True)
class Proof:
    """One stage on N ranks against eager: the worst relative difference of any output on any rank."""

    after: str  # the pass, as pipeline text; empty for the captured program itself
    stage: str
    error: float
    same_bits: bool  # the ranks' outputs are equal bit by bit
    lossy: bool  # the pass, or one before it, changes numerics on purpose
    off: float | None = None  # where the program rounds: from the same rounding on one device

    @property
    def ok(self) -> bool:
        """Whether ranks agree and eager's values came out, or those of the same rounding. A NaN is no value."""
        if self.off is not None:
            return self.same_bits and self.off <= FLOAT64_TOLERANCE
        return self.same_bits and (self.lossy or self.error <= FLOAT64_TOLERANCE)


@dataclass
class EachStage:
    """A pipeline callback that runs every program it sees; ``proofs`` has one entry per stage."""

    args: list[Any]
    expected: tuple[Any, ...]
    ctx: PassContext
    proofs: list[Proof] = field(default_factory=list)
    _before: Program | None = None
    _lossy: bool = False
    _own: tuple[Any, ...] | None = None

    def __call__(self, previous: Pass | None, program: Program, next: Pass | None, seconds: float, /) -> None:
        # what is a step late is right after a step with the same inputs, which is what is run here
        self._lossy = self._lossy or (previous is not None and previous.lossy and not _settles(previous))
        with torch.no_grad():
            results = self._run(previous, program)
        if program.stage != "localised" and rounds(program):
            own = rounded(program.first or program, self.args)
            wrong = own.strayed(self.expected, [FLOAT64_TOLERANCE] * len(self.expected))
            self._own = own.outputs if not wrong else (None,) * len(self.expected)
        same = all(same_bits(a, b) for r in results for a, b in zip(r, results[0], strict=True) if _tensors(a, b))
        off = _worst(results, self._own) if self._own is not None else None
        name = previous.spec() if previous is not None else ""
        self.proofs.append(Proof(name, program.stage, _worst(results, self.expected), same, self._lossy, off))
        # A pass may edit its program in place, and what it was is needed to localise the other ranks.
        self._before = program.copy() if program.stage in ("lowered", "scheduled") else None

    def _run(self, previous: Pass | None, program: Program) -> list[tuple[Any, ...]]:
        if program.stage == "captured":
            return [tuple(program.gm(*self.args))]
        if program.stage != "localised":
            results = run_global(program, with_carried(program, self.args))
            return [r[: len(self.expected)] for r in results]
        if previous is None or self._before is None or not hasattr(previous, "rank"):
            raise CheckError("a localised program can only be run beside the other ranks', right after 'localise'")
        mesh: Mesh = self.ctx.mesh
        before = self._before
        programs = [replace(previous, rank=r).apply(before, self.ctx) for r in range(mesh.ranks)]  # type: ignore[call-arg]
        check_order(programs)
        results = run_local(programs, with_carried(before, self.args))
        return [r[: len(self.expected)] for r in results]


def _settles(previous: Pass) -> bool:
    return isinstance(previous, Displace) and previous.settles


def _tensors(*values: Any) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)


def _worst(results: list[tuple[Any, ...]], expected: tuple[Any, ...]) -> float:
    """The largest relative difference of any output on any rank."""
    errors = [0.0]
    for i, reference in enumerate(expected):
        for result in results:
            if _tensors(result[i], reference):
                errors.append(difference(result[i], reference)[1])
            else:
                errors.append(0.0 if result[i] is reference or result[i] == reference else float("inf"))
    return max(errors)


def prove_each(recorded: Recorded, pipeline: Pipeline, mesh: Mesh, plan: Any) -> list[Proof]:
    """Run ``pipeline`` on the float64 version of a captured graph, and every program in between on all ranks."""
    promoted, args, expected = float64_reference(recorded)
    program = promoted.copy()
    program.mesh, program.plan = mesh, plan
    ctx = PassContext(mesh=mesh, plan=plan, costs=durations(mesh))
    each = EachStage(args, expected, ctx)
    pipeline.run(program, ctx, each)
    return each.proofs
