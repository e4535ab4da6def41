"""The ``torch.compile`` backend: ``torch.compile(model, backend="fastpar", options={...})``.

Found through the entry point group ``torch_dynamo_backends``, so a user's script imports
nothing. One call per captured graph: capture -> plan -> passes -> agreement -> localise ->
lowering -> artefact. The result takes full inputs and gives full outputs on every rank, so
each graph of a model is drop-in by itself and a graph break cannot give a wrong answer.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastpar.core.errors import FastparError, OptionError
from fastpar.core.options import Options
from fastpar.graph.capture import compile_fx
from fastpar.graph.devices import device_of
from fastpar.graph.dump import dumper
from fastpar.graph.program import Program
from fastpar.graph.unbroken import unbroken
from fastpar.registry import LOWERINGS
from fastpar.run.agree import agree, compiling, meet
from fastpar.run.alike import alike
from fastpar.run.artefact import Runner
from fastpar.run.build import Built, build
from fastpar.run.capturing import capturing
from fastpar.run.displaced import Displaced, specs_of
from fastpar.run.groups import check_device, group_of, need_group, process_groups, world
from fastpar.run.hoisted import Again, artefact_of
from fastpar.run.onesided import DISPLACED, one_sided
from fastpar.run.origin import fields, origin
from fastpar.run.stream import Dealt, ends_frame, frame_counter
from fastpar.run.strided import groups_of, strided
from fastpar.run.weights import Held, axes_held, is_shell, whole_examples

log = logging.getLogger("fastpar")

_compiled = {"count": 0}


@unbroken
def fastpar(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph for this rank.

    ``options`` are those of ``fastpar.core.options.Options``. Raises OptionError, PlanError,
    CaptureError or AgreementError, on every rank alike.
    """
    if unknown:
        raise OptionError(f"unknown arguments {sorted(unknown)}; the backend takes options= and mode=")
    group = group_of((options or {}).get("mesh"))
    with compiling(group):
        chosen = Options.from_user(options, mode)
        hold, last = any(map(is_shell, example_inputs)), ends_frame(gm)
        examples = whole_examples(example_inputs)
        finished = functools.partial(finish, options=chosen, group=group, last=last, hold=hold)
        return compile_fx(gm, examples, finished, functools.partial(compiling, group))


def finish(program: Program, options: Options, group: str | None, last: bool = False, hold: bool = False) -> Runner:
    """One captured program to the function that runs this rank's share of it.

    ``last``: its results go to the user, so that those which come from other ranks may come late. ``hold``: its
    weights are shells (``shard_weights``), for which it takes this rank's parts.
    """
    rank, ranks = world(group)
    need_group(group, max(ranks, 1 if options.plan.auto else options.plan.degree))
    device = _device(program)
    check_device(group, device)
    lowering = options.lowering or ("inductor" if device.type == "cuda" else "eager")
    if options.verify and hold:
        raise OptionError("option 'verify' needs the whole weights on every rank; leave it out with shard_weights")
    number = _compiled["count"]
    _compiled["count"] += 1
    begin = time.perf_counter()
    dump = dumper(Path(options.dump) / f"rank{rank}" / f"graph{number}") if options.dump else None
    built = build(
        program, options.plan, ranks, options.passes, dump, topology=options.topology, lowering=lowering, hold=hold
    )
    given = fields(built, f"{lowering}, captured" if options.cudagraphs else lowering, options.transport)
    agree(given, group, options.timeout)
    made = origin(given, built)
    dealt = (built.dealt,) if built.dealt else ()
    # axes of the ranks that run a call together
    together = tuple(a for a in built.mesh.names if a not in dealt and built.mesh.size((a,)) > 1)
    also = [*([dealt] if dealt else []), *axes_held(built.lowered), *([together] if together else [])]
    groups = process_groups(built.lowered.graph, built.mesh, group, also)
    if built.first is not None:
        groups |= process_groups(built.first.lowered.graph, built.mesh, group, groups_of(built))
    localise: Callable[[Built], Program] = lambda b: b.localise(rank, groups)  # noqa: E731
    compile = LOWERINGS[lowering]()
    if options.cudagraphs:
        compile = capturing(compile, device, options.timeout)
    if options.transport == "one-sided":
        if built.first is not None:
            sided, reason = None, DISPLACED
        else:
            sided, reason = one_sided(group, device, options.timeout)
        if sided is not None:
            localise, compile = sided.localise, sided.compile(compile)
        else:
            built.notes.append(f"two-sided, though transport is 'one-sided': {reason}")
            log.warning("%s", built.notes[-1])

    def localised(built: Built) -> Program:
        return replace(localise(built), origin=made)

    def runner_of(built: Built, local: Program) -> Runner:
        again: Again = lambda varying: localised(built.hoisted_anew(varying))  # noqa: E731
        return artefact_of(local, compile, again, groups.get(together))

    local = localised(built)
    if dump is not None:
        dump(None, local, None, 0.0)
    if built.first is None:
        runner = runner_of(built, local)
    else:
        first = localised(built.first)
        given_on = specs_of(first, local)
        steps = built.plan.displaced.warmup if built.plan.displaced else 1
        varying = local.gm.meta.get("varying")
        turns = (runner_of(built.first, first), runner_of(built, local), program, given_on, steps, varying)
        # a captured program takes copies of its inputs, which must be there
        runner = strided(built, turns, rank, groups, options.cudagraphs) if built.plan.steps else Displaced(*turns)
    if hold:
        runner = Held(runner, (built.first or built).lowered, built.mesh, rank, groups)
    if dealt:
        me, degree = built.mesh.coordinate(rank, dealt), built.mesh.size(dealt)
        runner = Dealt(runner, program, me, degree, groups[dealt], frame_counter(), last)
    runner = alike(runner, program, group, options.timeout, hold)
    if rank == 0:
        _announce(built, lowering, time.perf_counter() - begin)
    meet(group, options.timeout)  # compile skew ends here, not in the first collective's watchdog
    if options.verify:
        runner = _verified(runner, program, built)
    return runner


def _device(program: Program) -> torch.device:
    """The accelerator that the program computes on, or else that of its inputs (a model on ``meta``), or the CPU."""
    values = [n.meta.get("val") for n in program.placeholders]
    given = next((v.device for v in values if isinstance(v, torch.Tensor) and v.dim() > 0), torch.device("cpu"))
    return device_of(program.graph) or given


def _announce(built: Built, lowering: str, seconds: float) -> None:
    log.info("compiled %s on %d ranks (%s) in %.1f s", built.plan, built.mesh.ranks, lowering, seconds)
    for note in built.notes:
        log.info("%s", note)
    for fallback in built.lowered.gm.meta.get("fallbacks", []):
        log.warning("%s gathers: %s", fallback.operator, fallback.reason)


def _verified(runner: Runner, program: Program, built: Built) -> Runner:
    """Also runs the whole graph on every call, and raises where the outputs are not close to it."""

    def run(args: list[Any]) -> Sequence[Any]:
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        outputs = runner(args)
        for i, (mine, whole) in enumerate(zip(outputs, program.gm(*given), strict=True)):
            if isinstance(whole, torch.Tensor) and whole.is_floating_point() and whole.numel():
                error = float((mine - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
                if built.plan.lossy:
                    log.info("verify: output %d is off by %.1e (relative): %s", i, error, "; ".join(built.plan.lossy))
                elif not error <= 64 * torch.finfo(whole.dtype).eps ** 0.75:
                    raise FastparError(f"verify: output {i} under plan {built.plan} is off by {error:.1e} (relative)")
        return outputs

    return run
