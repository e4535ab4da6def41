"""``fastpar opt``: run passes and print the program between them, as ``mlir-opt`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpar.cli.failures import FAILED, reported
from fastpar.cli.options import (
    Component,
    Debug,
    Dtype,
    Fake,
    Input,
    InputsFrom,
    Model,
    Passes,
    PlanText,
    Ranks,
    Seed,
)

if TYPE_CHECKING:
    from fastpar.core.mesh import Mesh
    from fastpar.graph.capture import Captured, Recorded
    from fastpar.graph.pipeline import Callback, Pass, Pipeline
    from fastpar.graph.program import Program


@reported
def opt(
    model: Model,
    plan: PlanText = "auto",
    ranks: Ranks = None,
    passes: Passes = None,
    print_between: Annotated[bool, typer.Option("--print-between", help="Print before and after every pass.")] = False,
    print_after: Annotated[
        list[str] | None, typer.Option("--print-after", metavar="PASS", help="Print after this pass; repeatable.")
    ] = None,
    code: Annotated[bool, typer.Option("--code", help="Print runnable Python instead of nodes with layouts.")] = False,
    time: Annotated[bool, typer.Option("--time", help="Print the seconds and nodes of every pass.")] = False,
    verify_each: Annotated[
        bool, typer.Option("--verify-each", help="After every pass, run all ranks and compare with eager in float64.")
    ] = False,
    dump: Annotated[Path | None, typer.Option("--dump", help="Write every program into this folder.")] = None,
    graph: Annotated[int, typer.Option("--graph", min=0, help="Which graph, of a model that breaks into several.")] = 0,
    inputs: InputsFrom = None,
    input: Input = None,
    fake: Fake = False,
    dtype: Dtype = None,
    component: Component = None,
    seed: Seed = 0,
    debug: Debug = False,
) -> None:
    """Run a pipeline (--passes, else the plan's) on a captured graph; print what it gives, or as the options say.

    The mesh is the plan's. The structure of the program is checked after every pass. With none of the options
    to print, time, verify or dump, the last program is printed.
    """
    from fastpar.cli.capture import captured
    from fastpar.cli.models import load
    from fastpar.cli.tables import show_proofs, show_times
    from fastpar.core.errors import OptionError
    from fastpar.graph.capture import fake_mode_of
    from fastpar.graph.dump import dumper
    from fastpar.graph.pipeline import PassContext, Pipeline, callbacks
    from fastpar.plan.durations import durations
    from fastpar.plan.expand import mesh_for, pipeline_text
    from fastpar.registry import PASSES
    from fastpar.run.build import planned, resolve

    asked = resolve(plan, ranks)
    if not asked.auto or passes is not None:  # what is wrong with the text is said before the model is loaded
        _known(print_after or (), Pipeline.parse(pipeline_text(asked) if passes is None else passes, PASSES))
    loaded = load(model, inputs, input or (), dtype, seed, fake, component)
    if verify_each and fake_mode_of(loaded.model, loaded.inputs) is not None:
        raise OptionError("--verify-each runs the model, and this one is on fake tensors")
    recorded = _graph(captured(loaded), graph)
    chosen, order, _, _ = planned(recorded.program, asked, ranks, None)
    pipeline = Pipeline.parse(pipeline_text(chosen) if passes is None else passes, PASSES)
    mesh = mesh_for(chosen, recorded.program.graph, order)
    _ranks_exist(pipeline, mesh)

    times = _Times()
    quiet = time or verify_each or dump is not None
    each: list[Callback] = [times, _Printer(print_between, tuple(print_after or ()), code, last=not quiet)]
    if dump is not None:
        each.append(dumper(dump))
    program = recorded.program.copy()
    program.mesh, program.plan = mesh, chosen
    pipeline.run(program, PassContext(mesh=mesh, plan=chosen, costs=durations(mesh)), callbacks(each))
    if time:
        show_times(times.rows)
    if verify_each:
        _prove(recorded, pipeline, mesh, chosen, show_proofs)


def _prove(recorded: Recorded, pipeline: Pipeline, mesh: Mesh, plan: Any, show: Any) -> None:
    from fastpar.run.each import prove_each

    proofs = prove_each(recorded, pipeline, mesh, plan)
    show(proofs, mesh.ranks)
    if not all(proof.ok for proof in proofs):
        raise typer.Exit(FAILED)


def _known(names: Sequence[str], pipeline: Pipeline) -> None:
    from fastpar.core.errors import OptionError
    from fastpar.core.text import unknown

    have = [one.name for one in pipeline.passes]
    for name in names:
        if name not in have:
            raise OptionError(f"--print-after: {unknown('pass of this pipeline', name, have)}")


def _graph(found: Captured, number: int) -> Recorded:
    from fastpar.core.errors import OptionError

    if number >= len(found.programs):
        count = len(found.programs)
        raise OptionError(f"--graph {number}: the model has {count} graph{'s' * (count > 1)}, counted from 0")
    return found.programs[number]


def _ranks_exist(pipeline: Pipeline, mesh: Mesh) -> None:
    from fastpar.core.errors import OptionError

    for one in pipeline.passes:
        rank = getattr(one, "rank", 0)
        if not 0 <= rank < mesh.ranks:
            raise OptionError(f"pass {one.spec()}: rank {rank} is not on the mesh {mesh}, which has {mesh.ranks} ranks")


class _Printer:
    """Prints programs under a banner, as the options ask; ``last``: the last one if nothing else was asked."""

    def __init__(self, between: bool, after: tuple[str, ...], code: bool, last: bool) -> None:
        self.between, self.after, self.code = between, after, code
        self.last = last and not between and not after

    def __call__(self, previous: Pass | None, program: Program, next: Pass | None, seconds: float, /) -> None:
        from fastpar.graph.dump import code, text

        if previous is None:
            wanted, banner = self.between, f"before {next.name} ({program.stage})" if next else program.stage
        else:
            wanted, banner = self.between or previous.name in self.after, f"after {previous.name} ({previous.spec()})"
        if wanted or (self.last and next is None):
            typer.echo(f"# -----// IR {banner} //-----")
            typer.echo(code(program) if self.code else text(program))


class _Times:
    """Checks the structure after every pass and notes the pass, its seconds, the stage and the nodes."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str, int]] = []

    def __call__(self, previous: Pass | None, program: Program, next: Pass | None, seconds: float, /) -> None:
        from fastpar.graph.check import check

        check(program)
        name = previous.spec() if previous is not None else ""
        self.rows.append((name, seconds, program.stage, program.num_nodes))
