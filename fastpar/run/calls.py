"""Calls of a model as a sampler makes them: the sample moves from step to step, and nothing else does.

What is computed once per generation is hence kept, displaced plans have a step before, and every rank, and the eager
model, is called with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fastpar.graph.capture import Inputs, call_arguments
from fastpar.passes.hoist import like
from fastpar.run.steps import APART

_SEED = 0


class Steps:
    """The arguments of one call after the other. ``at(0)`` are the inputs as they were given."""

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        given = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), call_arguments(inputs))
        self.leaves, self.spec = pytree.tree_flatten(given)
        self.sample: int | None = None
        self.moved: dict[int, torch.Tensor] = {}

    def saw(self, outputs: Sequence[torch.Tensor]) -> None:
        """Find the sample: a float that is shaped like an output, if only but for the channels; else the largest."""
        floats = {i: x for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor) and x.is_floating_point()}
        shapes = [tuple(x.shape) for x in outputs if x.dim() > 1]
        same = [i for i, x in floats.items() if tuple(x.shape) in shapes]
        same += [i for i, x in floats.items() if any(like(tuple(x.shape), shape) for shape in shapes)]
        same += sorted(floats, key=lambda i: -floats[i].numel())
        self.sample = same[0] if same else None

    def at(self, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a step; its sample is another tensor than those of other steps."""
        if step == 0 or self.sample is None:
            return pytree.tree_unflatten(list(self.leaves), self.spec)
        if step not in self.moved:
            self.moved[step] = _moved(self.leaves[self.sample], step)
        leaves = list(self.leaves)
        leaves[self.sample] = self.moved[step]
        return pytree.tree_unflatten(leaves, self.spec)


def _moved(x: torch.Tensor, step: int) -> torch.Tensor:
    """``x``, ``APART`` of its size further for each step, drawn on the host: the same on every device."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(_SEED + step), dtype=torch.float64)
    size = x.double().square().mean().sqrt() if x.numel() else 0.0
    return x + (step * APART * size * noise.to(x.device)).to(x.dtype)


def digest(outputs: Sequence[torch.Tensor]) -> str:
    """What is equal where the bits of all outputs are."""
    found = hashlib.sha256()
    for x in outputs:
        found.update(f"{x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
