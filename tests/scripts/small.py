"""Models for the verbs that start processes, which import them by name (``small:denoiser``)."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Denoiser(nn.Module):
    """Attention with 3 heads over 7 tokens, whose prompt is projected once per generation."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.prompt, self.out = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = (t.unflatten(-1, (3, 2)).transpose(1, 2) for t in self.qkv(x + self.prompt(prompt)).chunk(3, -1))
        return (self.out(x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)),)


def denoiser() -> tuple[nn.Module, dict[str, Any]]:
    return Denoiser(), {"x": torch.randn(2, 7, 6), "prompt": torch.randn(2, 1, 6)}


@torch._dynamo.disable
def off(x: torch.Tensor) -> torch.Tensor:
    """On processes other values than eager's, and others on each of them."""
    return x * (1.001 + 0.5 * dist.get_rank()) if dist.is_initialized() else x


class Wrong(Denoiser):
    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (off(super().forward(x, prompt)[0]),)


def wrong() -> tuple[nn.Module, dict[str, Any]]:
    return Wrong(), denoiser()[1]


def other_noise() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = denoiser()
    return model, {**inputs, "x": inputs["x"] + int(os.environ["RANK"])}


def has_a_bug() -> tuple[nn.Module, dict[str, Any]]:
    raise ZeroDivisionError("a bug of the model's own")


def dies() -> tuple[nn.Module, dict[str, Any]]:
    if os.environ["RANK"] == "1":
        os._exit(7)
    return denoiser()
