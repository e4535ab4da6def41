"""The trained digits model: diffusers' own DiT with the weights of ``benchmarks/train_digits.py``."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import torch
from safetensors.torch import load

NULL_LABEL = 10
"""The label that means no label, for classifier-free guidance; 0..9 are the digits."""


def load_digits(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The trained ``DiTTransformer2DModel`` on the CPU, in evaluation mode, without gradients.

    Called as ``model(hidden_states, timestep=..., class_labels=...)`` with ``[B, 1, 16, 16]`` images in
    -1..1, times ``[B]`` in 0..999 and labels ``[B]`` in 0..10. It predicts the velocity, in the same shape.

    Raises ``FileNotFoundError`` where the package was installed without its data files.
    """
    from diffusers import DiTTransformer2DModel  # slow to import, and only needed here

    data = files("fastpar.demo")
    config: dict[str, Any] = json.loads((data / "digits.json").read_text(encoding="utf-8"))
    model: torch.nn.Module = DiTTransformer2DModel.from_config(config)
    model.load_state_dict(load((data / "digits.safetensors").read_bytes()))
    # Not diffusers' own override of to(): it warns of modules to be kept in float32, of which there are none.
    torch.nn.Module.to(model, dtype)
    return model.eval().requires_grad_(False)
