"""Arguments and options that several verbs take, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A diffusers folder, the hub id of one on disk, a diffusers config .json or class name (random "
        "weights), or package.module:function that returns (model, inputs).",
        show_default=False,
    ),
]
PlanText = Annotated[str, typer.Option("--plan", help="A plan, as in ulysses=4; auto needs --ranks.")]
Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Number of virtual ranks, where the plan does not say.")
]
Transport = Annotated[
    str, typer.Option("--transport", help="How exchanges travel: two-sided, or one-sided (puts and flags).")
]
Topology = Annotated[
    str | None,
    typer.Option(
        "--topology",
        help="A preset (h100-8, a100-4x8, l40-8, rtx4090-8, ...) or a TOML file: places the plan's axes by their "
        "links; explain adds predicted times of this plan and of every other one.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="f64, f32, bf16 or f16. Default: bf16 with --fake, else f32.", show_default=False),
]
Passes = Annotated[
    str | None, typer.Option("--passes", help="A pipeline instead of the one that the plan expands to.")
]
InputsFrom = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        help="A .json file of name: value, or package.module:function that returns the inputs "
        "(given the model if it takes an argument).",
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="One input, repeated for more: hidden_states=float[1,16,64] (float: the model's dtype; or bf16, f32, "
        "i64, bool...), timestep=500, label=int[2]:3 (filled with 3), or any JSON.",
        show_default=False,
    ),
]
Component = Annotated[
    str | None, typer.Option("--component", help="Which model of a pipeline's folder. Default: its denoiser.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random weights and inputs.")]
Fake = Annotated[
    bool, typer.Option("--fake", help="Build without memory for weights: a model of any size, which is not run.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the report as JSON; - prints it instead of the tables.")
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Also predict a sampling run of so many steps on --topology.")
]
Streams = Annotated[
    int, typer.Option("--streams", min=1, help="With --steps: calls per step; 2 where guidance is a call of its own.")
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="Also write what every rank does when, predicted on --topology, as a Chrome trace "
                 "(.json; ui.perfetto.dev opens it)."),
]  # fmt: skip
PictureFile = Annotated[
    Path | None, typer.Option("--picture", help="The same as a picture (.png).")
]
Processes = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Processes to start; by default as many as the plan's degrees, or torchrun's."),
]
OnDevice = Annotated[
    str | None,
    typer.Option("--device", help="cuda (NCCL, a GPU per process) or cpu (gloo). Default: cuda where there is one.",
                 show_default=False),
]  # fmt: skip
Lowering = Annotated[
    str | None,
    typer.Option("--lowering", help="inductor or eager. Default: inductor on a GPU, eager on the CPU.",
                 show_default=False),
]  # fmt: skip
Cudagraphs = Annotated[bool, typer.Option("--cudagraphs", help="Capture each program as one CUDA graph.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
