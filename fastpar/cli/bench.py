"""``fastpar bench``: plans on N processes beside eager and torch.compile's own modes on one device, in turns."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastpar.cli.failures import MISTAKEN, reported
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
    Processes,
    Seed,
    Topology,
    Transport,
)

if TYPE_CHECKING:
    from fastpar.cli.processes import World


@reported
def bench(
    model: Model,
    plan: Annotated[list[str], typer.Option("--plan", help="A plan to time; repeat it for more, of as many ranks.")],
    ranks: Processes = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="In each, every entry takes its turn.")] = 5,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Calls of a turn; its time is their mean.")] = 1,
    against: Annotated[
        str | None,
        typer.Option("--against", help="What one device is timed with: eager, inductor, and on a GPU reduce-overhead "
                     "and max-autotune, joined by commas. Default: all that run here.", show_default=False),
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option("--emulate", help="Time rank 0 alone, on one GPU and the emulated links of a topology (a preset "
                     "or a TOML file).", show_default=False),
    ] = None,
    device: OnDevice = None,
    lowering: Lowering = None,
    transport: Transport = "two-sided",
    cudagraphs: Cudagraphs = False,
    topology: Topology = None,
    inputs: InputsFrom = None,
    input: Input = None,
    dtype: Dtype = None,
    component: Component = None,
    seed: Seed = 0,
    json: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Time plans on N processes, and the model on one device, in turns: what is compared was measured in one round.

    Under torchrun its processes are used; else they are started here. Every entry's calls are steps of a sampling run
    of its own, whose first ones, which compile and do what is done once, do not count.
    """  # fmt: skip
    from fastpar.cli.processes import Wanted, is_first, on_world
    from fastpar.cli.rounds import Job, emulated, work
    from fastpar.cli.tables import show_bench, write_json
    from fastpar.core.errors import FastparError

    options = {"lowering": lowering, "transport": transport, "cudagraphs": cudagraphs,
               "topology": topology or emulate}  # fmt: skip
    try:
        world = _world(plan, ranks, device, options, emulate)
        beside = _against(against, world.device)
    except FastparError:
        if is_first():
            raise
        raise typer.Exit(MISTAKEN) from None
    wanted = Wanted(model, inputs, tuple(input or ()), dtype, seed, component)
    job = Job(wanted, world, beside, tuple(plan), options, rounds, calls, emulate)
    found = emulated(job) if emulate is not None else on_world(world, work, job, debug)
    if found is None:
        return
    if json is None or str(json) != "-":
        show_bench(found)
    if json is not None:
        write_json(Kept(found), json)


class Kept:
    """Figures with what stands beside them in every results file."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def to_dict(self) -> dict[str, Any]:
        from fastpar.core.record import recorded

        return recorded(self.found.to_dict(), leave_out=("--json",))


def _world(
    plans: list[str], ranks: int | None, device: str | None, options: dict[str, Any], emulated: str | None
) -> World:
    """The processes, or the one that stands for all on emulated links. Raises OptionError and PlanError."""
    from fastpar.cli.processes import World, ranks_of, world_for
    from fastpar.core.errors import OptionError

    for text in plans:
        if plans.count(text) > 1:
            raise OptionError(f"--plan {text} is given twice; a plan takes one turn in each round")
    if emulated is None:
        return world_for(plans, ranks, device, options)
    import os

    import torch

    if "WORLD_SIZE" in os.environ:
        raise OptionError("--emulate times one process that stands for all ranks; start it without torchrun")
    if device == "cpu" or not torch.cuda.is_available():
        raise OptionError("--emulate needs a GPU: what a CPU computes takes so long that no link matters beside it; "
                          "explain --topology predicts times without one")  # fmt: skip
    return World(ranks_of(plans, ranks, options), "cuda", False)


def _against(text: str | None, device: str) -> tuple[str, ...]:
    """What one device is timed with. Raises OptionError."""
    from fastpar.cli.rounds import MODES
    from fastpar.core.errors import OptionError
    from fastpar.core.text import unknown

    compiles = device == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl"))
    here = ("eager", *MODES) if device == "cuda" else ("eager", "inductor") if compiles else ("eager",)
    if text is None:
        return here
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in ("eager", *MODES):
            raise OptionError(f"--against: {unknown('way to run', name, ('eager', *MODES))}")
        if name not in here:
            why = "needs a C++ compiler" if name == "inductor" else "needs a GPU"
            raise OptionError(f"--against {name} {why}; here there is {' and '.join(here)}")
    return names
