"""Models with random weights, made where they are used: 12B parameters in bf16 never pass through the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

from benchmarks.gpu.part import Unavailable


@dataclass(frozen=True)
class Made:
    """A model and the arguments of one call."""

    model: Any
    inputs: dict[str, Any]

    def shared(self) -> Any:
        """Another instance with the very same parameters and with code of its own, for those that patch modules.

        Where Dynamo cannot trace a function as one graph it gives it up for all that is ever compiled from that code:
        a peer whose hooks break the graph would have those called after it run in pieces.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        other = copy.deepcopy(self.model, {id(t): t for t in tensors})
        other.forward = MethodType(_own_code(type(other).forward), other)
        return other


def _own_code(function: FunctionType) -> FunctionType:
    """The same function, and those that it wraps, as code objects that nobody else has."""
    cells = tuple(
        CellType(_own_code(cell.cell_contents)) if isinstance(cell.cell_contents, FunctionType) else cell
        for cell in function.__closure__ or ()
    )
    code = function.__code__.replace()
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(made, function, updated=())


def make(name: str, size: str, device: torch.device) -> Made:
    """The model ``name`` (see ``MODELS``), in bf16 on ``device`` (float32 where it is tiny or small). Seeded.

    ``size`` is one of ``part.SIZES``, or ``small``: a second or two of a CPU core for a call, with at least 768 rows
    for each of two ranks. With fewer, torch's attention takes smaller blocks on a CPU, and would decide between plans.

    Raises Unavailable without diffusers.
    """
    try:
        import diffusers
    except ImportError as error:
        raise Unavailable(
            f"diffusers cannot be imported ({error}): install it, or give its wheel by --wheels"
        ) from error
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    kind, build = MODELS[name]
    config, inputs = build(size)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if size in ("tiny", "small") else torch.bfloat16)
    try:
        with torch.device(device):
            model = getattr(diffusers, kind)(**config).eval().requires_grad_(False)
            return Made(model, {**inputs(), "return_dict": False})
    finally:
        torch.set_default_dtype(before)


Build = Callable[[str], tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


def _flux(size: str, pixels: int = 1024) -> Any:
    """FLUX.1-dev: a token for each 16 x 16 pixels, and 512 of text."""
    config: dict[str, Any] = {}  # diffusers' defaults are FLUX.1's
    side, text, channels, wide, pooled = pixels // 16, 512, 64, 4096, 768
    if size == "short":
        config = dict(num_layers=5, num_single_layers=10)
    if size == "small":
        side, text = side * 3 // 4, 256
        config = dict(num_layers=2, num_single_layers=4, num_attention_heads=8, attention_head_dim=64,
                      axes_dims_rope=(16, 24, 24))  # fmt: skip
    if size == "tiny":
        side, text, channels, wide, pooled = pixels // 128, 16, 8, 24, 16
        config = dict(in_channels=8, num_layers=1, num_single_layers=1, num_attention_heads=8, attention_head_dim=16,
                      joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6))  # fmt: skip

    def inputs() -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        return dict(
            hidden_states=torch.randn(1, side * side, channels),
            encoder_hidden_states=torch.randn(1, text, wide),
            pooled_projections=torch.randn(1, pooled),
            timestep=torch.full((1,), 0.5),
            img_ids=ids.to(torch.get_default_dtype()),
            txt_ids=torch.zeros(text, 3),
        )

    return config, inputs


def _pixart(size: str) -> Any:
    tiny = size == "tiny"
    side, wide, text = (16, 32, 8) if tiny else (128, 4096, 120)
    heads, head, layers = (8, 8, 2) if tiny else (16, 72, 7 if size == "short" else 28)
    if size == "small":
        side, heads, head, layers = 80, 8, 64, 4
    config = dict(
        sample_size=side, num_layers=layers, num_attention_heads=heads, attention_head_dim=head, in_channels=4,
        out_channels=8, cross_attention_dim=heads * head, caption_channels=wide, patch_size=2,
        norm_type="ada_norm_single", norm_elementwise_affine=False, use_additional_conditions=False,
    )  # fmt: skip

    def inputs() -> dict[str, Any]:
        return dict(
            hidden_states=torch.randn(1, 4, side, side),
            encoder_hidden_states=torch.randn(1, text, wide),
            timestep=torch.full((1,), 500.0),
        )

    return config, inputs


def _wan(size: str) -> Any:
    """Wan 2.1 1.3B, 81 frames of 832 x 480: 32760 tokens."""
    tiny = size == "tiny"
    frames, height, width, wide, text = (3, 8, 8, 32, 16) if tiny else (21, 60, 104, 4096, 512)
    config: dict[str, Any] = dict(num_attention_heads=12, ffn_dim=8960, num_layers=8 if size == "short" else 30)
    if size == "small":
        frames, height, width, text = 3, 48, 48, 128
        config = dict(num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=4)
    if tiny:
        config = dict(num_attention_heads=8, attention_head_dim=12, ffn_dim=64, num_layers=2, text_dim=32,
                      freq_dim=16)  # fmt: skip

    def inputs() -> dict[str, Any]:
        return dict(
            hidden_states=torch.randn(1, 16, frames, height, width),
            encoder_hidden_states=torch.randn(1, text, wide),
            timestep=torch.full((1,), 500.0),
        )

    return config, inputs


MODELS: dict[str, tuple[str, Build]] = {
    "flux": ("FluxTransformer2DModel", _flux),
    "flux-2048": ("FluxTransformer2DModel", partial(_flux, pixels=2048)),
    "pixart": ("PixArtTransformer2DModel", _pixart),
    "wan": ("WanTransformer3DModel", _wan),
}
"""Class in diffusers, and what gives its config and its inputs for a size."""
