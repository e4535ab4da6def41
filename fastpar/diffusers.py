"""``fastpar.parallelize``: a diffusers pipeline whose denoiser runs on all ranks."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastpar.core.errors import OptionError
from fastpar.core.options import Options
from fastpar.core.plan import Plan
from fastpar.run.build import resolve
from fastpar.run.groups import group_of, world
from fastpar.run.stream import Generation, generation


def parallelize(pipe: Any, plan: str | Plan = "auto", *, decoder: str | Plan | None = None, **options: Any) -> Any:
    """Compile what a pipeline calls in every step, and make each of its calls one generation; returns ``pipe`` itself.

    Denoisers (and ControlNets) are the models of diffusers among its components that decode nothing; they are compiled
    in place, with ``plan`` and the other ``options`` of the backend. ``decoder`` is a plan for ``vae.decode``
    (``gather=4``), which is left alone without one. Every rank calls the pipeline with the same arguments, a seeded
    ``generator`` among them.

    Under a plan with ``steps`` the steps of the pipeline's schedulers also put together the latents, which ranks have
    of their own rows, at the ends of cycles and of the run.

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

    strides = bool(Options.from_user(given).plan.steps)

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with generation() as run, _put_together(self, run) if strides else contextlib.nullcontext():
            return kind.__call__(self, *args, **kwargs)

    members = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__, "_fastpar": True}
    pipe.__class__ = type(kind.__name__, (kind,), members)  # of the same name, under which it is saved
    return pipe


@contextlib.contextmanager
def _put_together(pipe: Any, run: Generation) -> Iterator[None]:
    """While it is entered, what the schedulers of ``pipe`` step to is what all ranks have.

    By their class, which a pipeline that copies its scheduler (for sound beside pictures) copies along.
    """
    from diffusers import SchedulerMixin

    parts = pipe.components.values()
    schedulers = [(part, type(part)) for part in parts if isinstance(part, SchedulerMixin) and hasattr(part, "step")]
    for scheduler, kind in schedulers:
        members = {"step": _stepping(kind.step, run), "__module__": kind.__module__, "__doc__": kind.__doc__}
        scheduler.__class__ = type(kind.__name__, (kind,), members)
    try:
        yield
    finally:
        for scheduler, kind in schedulers:
            scheduler.__class__ = kind


def _stepping(step: Callable[..., Any], run: Generation) -> Callable[..., Any]:
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines look at which arguments it takes
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        time = torch.as_tensor(signature.bind(self, *args, **kwargs).arguments["timestep"]).flatten()[0]
        out = step(self, *args, **kwargs)
        last = bool(time == self.timesteps[-1].to(time.device))
        if isinstance(out, tuple):
            return (run.gather(out[0], now=last), *out[1:])
        out.prev_sample = run.gather(out.prev_sample, now=last)
        return out

    return stepped
