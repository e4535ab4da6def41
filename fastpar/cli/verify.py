"""``fastpar verify``: run all ranks in this process and hold them against eager."""

from __future__ import annotations

import typer

from fastpar.cli.failures import FAILED, reported
from fastpar.cli.options import (
    Component,
    Debug,
    Dtype,
    Input,
    InputsFrom,
    JsonFile,
    Model,
    Passes,
    PlanText,
    Ranks,
    Seed,
    Topology,
    Transport,
)


@reported
def verify(
    model: Model,
    plan: PlanText = "auto",
    ranks: Ranks = None,
    inputs: InputsFrom = None,
    input: Input = None,
    dtype: Dtype = None,
    passes: Passes = None,
    topology: Topology = None,
    transport: Transport = "two-sided",
    component: Component = None,
    seed: Seed = 0,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Prove that the programs of N ranks together compute what the model does. Exit status 1 if they do not.

    All ranks run in this process, so it needs the memory of one model and no launcher. With --dtype f64 the
    bound is 1e-9; in other dtypes it is twice eager's own error against float64, plus one rounding.
    """
    from fastpar.cli.capture import captured
    from fastpar.cli.models import load
    from fastpar.cli.tables import show_verdict, write_json
    from fastpar.core.errors import OptionError
    from fastpar.graph.capture import fake_mode_of
    from fastpar.run.verify import verify as run

    loaded = load(model, inputs, input or (), dtype, seed, component=component)
    if fake_mode_of(loaded.model, loaded.inputs) is not None:
        raise OptionError("verify runs the model, and this one is on fake tensors; explain can plan it")
    report = run(
        captured(loaded), plan=plan, ranks=ranks, passes=passes, topology=topology, transport=transport
    )
    if json is None or str(json) != "-":
        show_verdict(report)
    if json is not None:
        write_json(report, json)
    if not report.ok:
        raise typer.Exit(FAILED)
