"""DDIM with classifier-free guidance, for the digits model. It knows nothing of ranks or plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fastpar.demo.model import NULL_LABEL

IMAGE_SHAPE = (1, 16, 16)
"""Channels, rows and columns of an image."""


def guided_inputs(images: Tensor, time: Tensor, labels: Tensor) -> dict[str, Any]:
    """The model's keyword arguments for one step: the batch with its labels, then again without any.

    ``images`` is ``[B, 1, 16, 16]``, ``time`` a scalar in 0..999 and ``labels`` ``[B]``. Guidance is one
    batch of 2B, so that a plan such as ``cfg=2`` can split it. ``return_dict`` is off: the output is a tuple.
    """
    return {
        "hidden_states": torch.cat([images, images]),
        "timestep": time.to(images.device).expand(2 * len(images)),
        "class_labels": torch.cat([labels, torch.full_like(labels, NULL_LABEL)]),
        "return_dict": False,
    }


def initial_noise(count: int, seed: int) -> Tensor:
    """Float32 noise ``[count, 1, 16, 16]``, drawn on the CPU so that every device starts from the same."""
    return torch.randn((count, *IMAGE_SHAPE), generator=torch.Generator().manual_seed(seed))


def schedule_of(steps: int) -> Any:
    """DDIM's, as the model was trained."""
    schedule: Any = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",  # the first step must see pure noise: it is all that the model gets
        clip_sample=False,
    )
    schedule.set_timesteps(steps)
    return schedule


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    labels: Tensor | Sequence[int],
    seed: int,
    steps: int = 20,
    guidance: float = 2.0,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image ``[B, 1, 16, 16]``, in about -1..1, for each of the B ``labels`` (digits 0..9).

    ``model`` is the module of :func:`fastpar.demo.model.load_digits` or its compiled version; the images come
    on its device and in its dtype. The same arguments give the same images. ``guidance`` 1 means no guidance.
    ``on_step(i, n)`` is called after the i-th of ``n = steps`` steps, i from 1.

    Raises ``ValueError`` for a label that is not a digit and for ``steps`` outside 1..1000.
    """
    weight = next(model.parameters())
    labels = torch.as_tensor(labels, dtype=torch.int64, device=weight.device)
    if labels.ndim != 1 or not bool(((labels >= 0) & (labels <= 9)).all()):
        raise ValueError(f"labels must be a list of digits 0..9, not {labels.tolist()}")
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps must be in 1..1000, the model's training steps, not {steps}")
    schedule = schedule_of(steps)
    images = initial_noise(len(labels), seed).to(weight)
    for i, time in enumerate(schedule.timesteps):
        (velocity,) = model(**guided_inputs(images, time, labels))
        asked, free = velocity.chunk(2)
        images = schedule.step(free + guidance * (asked - free), time, images).prev_sample
        if on_step is not None:
            on_step(i + 1, steps)
    return images
