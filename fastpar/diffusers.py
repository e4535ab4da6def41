"""``fastpar.parallelize``: a diffusers pipeline whose denoiser runs on all ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastpar.core.errors import OptionError
from fastpar.core.options import Options
from fastpar.core.plan import Plan
from fastpar.run.build import resolve
from fastpar.run.groups import group_of, world
from fastpar.run.stream import generation


def parallelize(pipe: Any, plan: str | Plan = "auto", *, decoder: str | Plan | None = None, **options: Any) -> Any:
    """Compile what a pipeline calls in every step, and make each of its calls one generation; returns ``pipe`` itself.

    Denoisers (and ControlNets) are the models of diffusers among its components that decode nothing; they are compiled
    in place, with ``plan`` and the other ``options`` of the backend. ``decoder`` is a plan for ``vae.decode``
    (``gather=4``), which is left alone without one. Every rank calls the pipeline with the same arguments, a seeded
    ``generator`` among them.

    Raises OptionError for a pipeline without such models or that was parallelized before, and what the backend raises
    for bad options, before anything is changed.
    """
    import diffusers  # late: fastpar itself does without it

    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise OptionError(f"parallelize takes a diffusers pipeline, not {type(pipe).__name__}; compile a module with "
                          'torch.compile(module, backend="fastpar")')  # fmt: skip
    if getattr(pipe, "_fastpar", False):
        raise OptionError("this pipeline was parallelized before; load it again for another plan")
    models = {name: part for name, part in pipe.components.items() if isinstance(part, diffusers.ModelMixin)}
    denoisers = {name: part for name, part in models.items() if not hasattr(part, "decode")}
    decoders = {name: part for name, part in models.items() if hasattr(part, "decode")}
    if not denoisers:
        raise OptionError(f"no denoiser among the components {', '.join(sorted(pipe.components))} of "
                          f"{type(pipe).__name__}")  # fmt: skip
    if decoder is not None and not decoders:
        raise OptionError(f"no decoder among the components {', '.join(sorted(pipe.components))}; leave it out")
    given = {"plan": plan, **options}
    for one in (plan, *([decoder] if decoder is not None else [])):
        chosen = Options.from_user({**given, "plan": one})
        group = group_of(chosen.mesh)  # without one, the first call says what is missing
        resolve(chosen.plan, world(group)[1] if group is not None or chosen.plan.auto else None)
    for part in denoisers.values():
        part.compile(backend="fastpar", options=given)
    if decoder is not None:
        for part in decoders.values():
            part.decode = torch.compile(part.decode, backend="fastpar", options={**given, "plan": decoder})
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with generation():
            return kind.__call__(self, *args, **kwargs)

    members = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__, "_fastpar": True}
    pipe.__class__ = type(kind.__name__, (kind,), members)  # of the same name, under which it is saved
    return pipe
