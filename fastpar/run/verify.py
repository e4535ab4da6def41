"""``verify``, ``explain`` and ``simulate``: N virtual ranks in this process.

``verify`` holds the N localised programs of every graph of a model against the graph run
whole. float64 models are compared at 1e-9, with the model's own casts to float32 promoted
on both sides; other dtypes must not be further from a float64 reference than twice what
eager itself is, plus one unit in the last place. A plan that rounds what travels is held against the same rounding
on one device (``fastpar.run.rounded``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastpar.backends.onesided.rewrite import of_all, planned, rewrite, said
from fastpar.backends.simulate import run_calls, run_local
from fastpar.core.errors import FastparError, OptionError
from fastpar.core.options import TRANSPORTS
from fastpar.core.plan import Plan
from fastpar.core.text import unknown
from fastpar.graph.capture import Captured, Inputs, Recorded, call_arguments, capture, compile_fx
from fastpar.graph.check import check_order
from fastpar.graph.program import Program
from fastpar.graph.unbroken import unbroken
from fastpar.run.build import Built, build
from fastpar.run.compare import (
    FLOAT64_TOLERANCE,
    capture_and_compare,
    difference,
    float64_reference,
    same_bits,
)
from fastpar.run.diverge import first_difference
from fastpar.run.explained import Play, explained, joined
from fastpar.run.meeting import cycle
from fastpar.run.onesided import DISPLACED
from fastpar.run.report import Report
from fastpar.run.rounded import rounded, rounds
from fastpar.run.steps import Stepping, sensitivity, settles


def verify(
    model: Any,
    inputs: Inputs | None = None,
    plan: Plan | str = "auto",
    ranks: int | None = None,
    passes: str | None = None,
    topology: str | None = None,
    transport: str = "two-sided",
) -> Report:
    """Prove that the N ranks' programs of ``model`` together compute what eager computes.

    ``model`` is a module or function with ``inputs`` (a dict, a tuple, or a callable giving one),
    or a ``Captured``, so that one capture serves many plans. With ``topology`` (a preset's name or a
    TOML file) the plan's axes lie as they would there. With ``transport="one-sided"`` it is the one-sided programs that
    run, in one random interleaving, two calls in a row. Returns a Report whose ``ok`` says whether
    every output of every rank is within tolerance and the same bits on all ranks; given a model,
    also whether the captured graphs give what the model itself gives.

    Of a displaced plan both programs run: the one of a sampling run's first calls, and then the one that takes what
    the first has kept. After a call with the same inputs that is what the others have now, so it is held against
    eager just as tightly, but where ``gn`` takes the own rows' statistics. A note says what it is off by after other
    inputs.
    """
    if isinstance(model, Captured):
        captured, strayed = model, None
    else:
        captured, strayed = capture_and_compare(model, _given(inputs))
    report = None
    double = _in_double(captured)
    for recorded in captured.programs:
        built = build(recorded.program, plan, ranks, passes, topology=topology)
        part = explained(built)
        part.notes += _transported(built, transport)
        _compare(built, recorded, part, ranks, passes, double, transport)
        report = part if report is None else joined(report, part)
    report = _nothing(report)
    if strayed is not None:
        report.ok = False
        report.notes.append(strayed)
    return report


def explain(
    model: Any,
    inputs: Inputs | None = None,
    plan: Plan | str = "auto",
    ranks: int | None = None,
    passes: str | None = None,
    verify_structure: bool = True,
    topology: str | None = None,
    timeline: bool = False,
    steps: int | None = None,
    streams: int = 1,
    transport: str = "two-sided",
) -> Report:
    """What a plan would do to ``model``: shares, collectives, bytes, fallbacks; nothing is run.

    Works on fake tensors: a model of any size can be explained on a laptop. ``topology`` (a preset's name or a
    TOML file) adds the predicted time, what other plans would take, and what every rank does when
    (``Report.timeline``); with ``timeline`` also of programs that take the clock minutes. With ``steps`` it adds what
    a sampling run of so many takes that calls the model ``streams`` times in each (``Report.generation``), and the
    timeline is that of its first two steps. ``transport="one-sided"`` adds what that takes to the notes. Raises
    OptionError for ``steps`` without a topology.
    """
    if steps is not None and topology is None:
        raise OptionError("what a generation takes needs a topology: a preset or a TOML file")
    captured = model if isinstance(model, Captured) else capture(model, _given(inputs))
    report = None
    for recorded in captured.programs:
        built = build(recorded.program, plan, ranks, passes, verify_structure=verify_structure, topology=topology)
        part = explained(built, Play(timeline, steps, streams))
        part.notes += _transported(built, transport)
        report = part if report is None else joined(report, part)
    return _nothing(report)


def simulate(
    model: Any,
    inputs: Inputs | list[Inputs],
    plan: Plan | str = "auto",
    ranks: int | None = None,
    passes: str | None = None,
) -> list[Any]:
    """The model's output on each of N virtual ranks: what it returns there, in its own structure.

    A list of inputs is one call after the other, steps of one sampling run; the last one's output is returned.
    """
    steps = inputs if isinstance(inputs, list) else [inputs]
    if not steps:
        raise OptionError("simulate: the list of inputs is empty; give those of one step or more")
    calls: list[list[tuple[Any, ...]]] = []
    state = {"rank": 0, "call": 0, "ranks": 1}

    @unbroken
    def backend(gm: Any, example: Sequence[Any]) -> Any:
        def finish(program: Program) -> Any:
            built = build(program, plan, ranks, passes)
            state["ranks"] = built.mesh.ranks
            stepping = Stepping(built)

            def run(args: list[Any]) -> Sequence[Any]:
                if state["call"] == len(calls):
                    calls.append(stepping(list(args)))
                state["call"] += 1
                return calls[state["call"] - 1][state["rank"]]

            return run

        return compile_fx(gm, example, finish)

    compiled = torch.compile(model, backend=backend, dynamic=False)
    outputs = []
    given = [call_arguments(one) for one in steps]
    with torch.no_grad():
        while state["rank"] < state["ranks"]:
            state["call"] = 0
            outputs.append([compiled(*args, **kwargs) for args, kwargs in given][-1])
            state["rank"] += 1
    return outputs


def _given(inputs: Inputs | None) -> Inputs:
    if inputs is None:
        raise FastparError("give the model's inputs: a dict, a tuple, or a callable that returns one")
    return inputs


def _nothing(report: Report | None) -> Report:
    if report is None:
        raise FastparError("the model ran without a single graph: nothing was captured (is it wholly untraceable?)")
    return report


# -- verify -------------------------------------------------------------------------------------


def _compare(
    built: Built,
    recorded: Recorded,
    report: Report,
    ranks: int | None,
    passes: str | None,
    double: bool,
    transport: str,
) -> None:
    program, args = recorded.program, list(recorded.args)
    promoted, exact_args, exact = float64_reference(recorded)
    with torch.no_grad():
        if double:
            report.notes += [n for n in promoted.notes if n not in report.notes]
            box = built.choice.topology if built.choice is not None else None  # the same schedule is proved
            built = build(promoted, built.plan, ranks, passes, topology=box, order=built.order)
            eager, args = exact, exact_args
        else:
            eager = tuple(program.gm(*args))
        runs = _simulated(built, args, transport)
    _finite(exact, report)
    eps = [torch.finfo(x.dtype).eps if isinstance(x, torch.Tensor) and x.is_floating_point() else 0.0 for x in eager]
    bounds = [FLOAT64_TOLERANCE] * len(eager)
    if not double:
        bounds = [2 * difference(x, y)[1] + e if e else b for x, y, e, b in zip(eager, exact, eps, bounds, strict=True)]
    whole = (built.first or built).lowered
    own = rounded(whole, args) if rounds(whole) else None
    report.ok = True
    for sentence in own.strayed(exact, bounds) if own is not None else ():
        report.ok = False
        report.notes.append(sentence)
    report.max_abs_err = report.max_rel_err = 0.0
    report.tolerance = FLOAT64_TOLERANCE
    bounds = [b + (1 if double else 2) * difference(own.outputs[i], exact[i])[1] if own is not None and e else b
              for i, (b, e) in enumerate(zip(bounds, eps, strict=True))]  # fmt: skip
    worst = (False, -1.0)
    for run in runs:
        for i, (reference, plain) in enumerate(zip(exact, eager, strict=True)):
            if not isinstance(plain, torch.Tensor):
                report.ok = report.ok and all(r[i] == plain for r in run.results)
                continue
            same = own.outputs[i] if own is not None and double and run.bounded else None
            worst = _held(run, i, reference, bounds[i], same, report, worst)
    if built.first is not None and transport == "two-sided":
        report.notes += sensitivity(built, args, exact)
    if not report.ok:
        limit = FLOAT64_TOLERANCE if own is not None and double else report.tolerance
        report.diverged_at = first_difference(built, args, limit, own)


@dataclass
class _Simulated:
    """Outputs of every rank in one call. ``bounded``: there is something to hold them against; ``name`` of the call."""

    results: list[tuple[Any, ...]]
    bounded: bool
    name: str = ""
    alike: bool = True  # whether ranks are to have the same bits


def _held(
    run: _Simulated, i: int, reference: torch.Tensor, bound: float, same: torch.Tensor | None, report: Report,
    worst: tuple[bool, float],
) -> tuple[bool, float]:  # fmt: skip
    """Hold output ``i`` of all ranks against the reference, and say in the report what is wrong. ``same``: of the same
    rounding on one device. ``worst``: whether there was no bound, and the difference (over what is allowed)."""
    where = f"output {i}{run.name}"
    tolerance = bound if run.bounded else math.inf
    for rank, result in enumerate(run.results):
        if run.alike and not same_bits(result[i], run.results[0][i]):
            report.ok = False
            report.notes.append(f"{where}: rank {rank} has other bits than rank 0")
        absolute, relative = difference(result[i], reference)
        if not run.bounded and not torch.isfinite(result[i]).all() and torch.isfinite(reference).all():
            report.ok = False
            report.notes.append(f"{where}: rank {rank} has values that are not finite")
        if same is not None and not (off := difference(result[i], same)[1]) <= FLOAT64_TOLERANCE:
            report.ok = False
            report.notes.append(f"{where}: rank {rank} is off by {off:.1e} from the same rounding on one device")
        if not relative <= tolerance:
            report.ok = False
        held = (not run.bounded, relative / tolerance if run.bounded else relative)
        if held > worst:
            worst = held
            report.max_abs_err, report.max_rel_err, report.tolerance = absolute, relative, tolerance
    return worst


def _finite(exact: tuple[Any, ...], report: Report) -> None:
    """Say so where the reference is not finite: there is little to compare, or nothing."""
    for i, value in enumerate(exact):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            wrong = int((~torch.isfinite(value)).sum())
            if wrong:
                report.notes.append(f"output {i}: {wrong} of {value.numel()} values are not finite in eager either")


def _in_double(captured: Captured) -> bool:
    """Whether this is a float64 model: its parameters are, or without any its floating inputs, if it has any.

    Buffers do not count: a float64 model may keep a table in float32, which is promoted like its casts. Nor
    do graphs one by one: between two graphs of a float64 model a value may travel in float32.
    """
    floats: dict[str, set[torch.dtype]] = {}
    for recorded in captured.programs:
        for given, arg in zip(recorded.program.inputs, recorded.args, strict=True):
            if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                floats.setdefault(given.kind, set()).add(arg.dtype)
    return floats.get("parameter", floats.get("user")) in (None, {torch.float64})


def _simulated(built: Built, args: list[Any], transport: str) -> list[_Simulated]:
    """What a call gives; of a displaced plan the first call of a sampling run, and another with the same inputs."""
    bounded = not built.plan.naive  # its difference is reported, there is nothing to hold it against
    if built.first is not None:
        stepping = Stepping(built)
        for programs in (stepping.first, stepping.steady):
            check_order(programs)
        stepping.warmup, alike = 1, not built.plan.steps
        # with strides, what one cycle does, and the next one with what ranks had of each other in it
        later = 1 + cycle(built.plan.steps) if built.plan.steps else 1
        runs = [_Simulated(stepping(args), True)]
        names = ["of the second call", *(f"of call {i + 3}" for i in range(later))]
        return runs + [_Simulated(stepping(args), settles(built), f" {names[i]}", alike) for i in range(later)]
    programs = _localised(built)
    if transport == "two-sided":
        return [_Simulated(run_local(programs, args), bounded)]
    heaps = planned(of_all(built.lowered, built.mesh), "verify")
    sided = [rewrite(p, r, heaps) for r, p in enumerate(programs)]
    # the second call finds what the first left in the heaps
    return [_Simulated(run_calls(sided, [args, args], seed=0)[1], bounded)]


def _localised(built: Built) -> list[Program]:
    programs = [built.localise(r) for r in range(built.mesh.ranks)]
    check_order(programs)
    return programs


def _transported(built: Built, transport: str) -> list[str]:
    """What a transport takes, for the notes. Raises OptionError for one that there is not."""
    if transport not in TRANSPORTS:
        raise OptionError(unknown("transport", transport, TRANSPORTS))
    if transport == "two-sided":
        return []
    if built.first is not None:
        return [f"two-sided, though transport is 'one-sided': {DISPLACED}"]
    return [said(planned(of_all(built.lowered, built.mesh), "explain"))]
