"""``fastpar explain``: what a plan would do to a model, without running anything."""

from __future__ import annotations

from fastpar.cli.failures import reported
from fastpar.cli.options import (
    Component,
    Debug,
    Dtype,
    Fake,
    Input,
    InputsFrom,
    JsonFile,
    Model,
    Passes,
    PictureFile,
    PlanText,
    Ranks,
    Seed,
    Steps,
    Streams,
    Topology,
    TraceFile,
    Transport,
)


@reported
def explain(
    model: Model,
    plan: PlanText = "auto",
    ranks: Ranks = None,
    topology: Topology = None,
    transport: Transport = "two-sided",
    inputs: InputsFrom = None,
    input: Input = None,
    fake: Fake = False,
    dtype: Dtype = None,
    passes: Passes = None,
    component: Component = None,
    seed: Seed = 0,
    steps: Steps = None,
    streams: Streams = 1,
    json: JsonFile = None,
    trace: TraceFile = None,
    picture: PictureFile = None,
    debug: Debug = False,
) -> None:
    """Tell what a plan does to a model: work and bytes per rank, collectives, what is repeated and gathered, why."""
    from fastpar.cli.capture import captured
    from fastpar.cli.models import load
    from fastpar.cli.tables import show_report, write_json
    from fastpar.cli.timelines import check_files, write_timeline
    from fastpar.run.verify import explain as run

    check_files(trace, picture, topology, steps)

    loaded = load(model, inputs, input or (), dtype, seed, fake, component)
    report = run(captured(loaded), plan=plan, ranks=ranks, passes=passes, topology=topology,
                 timeline=bool(trace or picture), steps=steps, streams=streams,
                 transport=transport)  # fmt: skip
    if json is None or str(json) != "-":
        show_report(report)
    if json is not None:
        write_json(report, json)
    write_timeline(report, trace, picture, model)
