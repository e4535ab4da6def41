"""``fastpar run``: call the compiled model on real processes, and hold what they give against eager."""

from __future__ import annotations

from typing import Annotated

import typer

from fastpar.cli.failures import FAILED, MISTAKEN, reported
from fastpar.cli.options import (
    Component,
    Cudagraphs,
    Debug,
    Dtype,
    Input,
    InputsFrom,
    JsonFile,
    Lowering,
    Model,
    OnDevice,
    Passes,
    PlanText,
    Processes,
    Seed,
    Topology,
    Transport,
)


@reported
def run(
    model: Model,
    plan: PlanText = "auto",
    calls: Annotated[int, typer.Option("--calls", min=1, help="How often to call it, as one sampling run.")] = 3,
    ranks: Processes = None,
    device: OnDevice = None,
    lowering: Lowering = None,
    transport: Transport = "two-sided",
    cudagraphs: Cudagraphs = False,
    topology: Topology = None,
    passes: Passes = None,
    inputs: InputsFrom = None,
    input: Input = None,
    dtype: Dtype = None,
    component: Component = None,
    seed: Seed = 0,
    check: Annotated[bool, typer.Option(help="Also run it eagerly, in its own dtype and in float64.")] = True,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Call the compiled model on N processes. Exit status 1 if ranks differ, or are further from eager than they may.

    Under torchrun they are its processes; else they are started here. Calls are steps of one sampling run: the
    sample moves from one to the next. The first and the last are checked, with the bound that verify has.
    """
    from fastpar.cli.calling import Job, work
    from fastpar.cli.processes import Wanted, is_first, on_world, world_for
    from fastpar.cli.tables import show_run, write_json
    from fastpar.core.errors import FastparError

    options = {"lowering": lowering, "transport": transport, "cudagraphs": cudagraphs, "topology": topology,
               "passes": passes}  # fmt: skip
    try:
        world = world_for([plan], ranks, device, options)
    except FastparError:
        if is_first():
            raise
        raise typer.Exit(MISTAKEN) from None  # said once is enough, of what all of torchrun's processes find
    wanted = Wanted(model, inputs, tuple(input or ()), dtype, seed, component)
    ran = on_world(world, work, Job(wanted, world, {**options, "plan": plan}, calls, check), debug)
    if ran is None:
        return
    if json is None or str(json) != "-":
        show_run(ran)
    if json is not None:
        write_json(ran, json)
    if not ran.ok:
        raise typer.Exit(FAILED)
