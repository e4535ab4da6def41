"""The denoisers of the published rows at their published sizes, on fake tensors, at any depth.

Configurations are those of the models' published ``config.json`` (most are the defaults of diffusers' classes).
Sizes are in tokens and latents as the pipelines make them. What is not published and stands in for it is said here:
where a row leaves the text's length unsaid it is what the pipeline pads to, or ``UNSAID`` tokens where the pipeline
drops the padding (Qwen-Image, Z-Image) or was not read (MiniMax-H3). Open-Sora 2.0, which diffusers lacks and whose
blocks are FLUX's, is FLUX over the tokens of a video.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

UNSAID = 128  # tokens of a prompt whose length no source gives


@dataclass(frozen=True)
class Size:
    """What is generated, in pixels and frames, and tokens of text."""

    width: int
    height: int
    frames: int
    text: int

    def latents(self, spatial: int, temporal: int = 1) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return (self.frames - 1) // temporal + 1, self.height // spatial, self.width // spatial


Inputs = Callable[[Size, int], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A denoiser: its class, configuration, inputs for a size and a batch, and its stacks of equal blocks:
    name of the argument -> (published depth, blocks that repeat together). ``batched``: guidance is a batch of two.
    ``valid``: the model looks up which tokens of the text its mask leaves, which fake tensors cannot say: all.
    ``text``: tokens of text that its pipeline pads to."""

    name: str
    inputs: Inputs
    config: dict[str, Any] = field(default_factory=dict)
    depth: dict[str, tuple[int, int]] = field(default_factory=dict)
    batched: bool = False
    valid: bool = False
    text: int = UNSAID


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def _flux(spatial: int = 16, axes: int = 3, text: int = 4096, pooled: bool = True, channels: int = 64) -> Inputs:
    def inputs(s: Size, batch: int) -> dict[str, Any]:
        f, h, w = s.latents(spatial, 4)
        tokens = f * h * w
        more: dict[str, Any] = {"pooled_projections": randn(batch, 768)} if pooled else {}
        return more | {
            "hidden_states": randn(batch, tokens, channels),
            "encoder_hidden_states": randn(batch, s.text, text),
            "timestep": torch.ones(batch),
            "guidance": torch.ones(batch),
            "img_ids": torch.zeros(tokens, axes),
            "txt_ids": torch.zeros(s.text, axes),
        }

    return inputs


def _without(inputs: Inputs, *names: str) -> Inputs:
    return lambda s, batch: {k: v for k, v in inputs(s, batch).items() if k not in names}


def _video(spatial: int, temporal: int, channels: int, text: int, **more: Callable[[Size, int], Any]) -> Inputs:
    def inputs(s: Size, batch: int) -> dict[str, Any]:
        return {
            "hidden_states": randn(batch, channels, *s.latents(spatial, temporal)),
            "encoder_hidden_states": randn(batch, s.text, text),
            "timestep": torch.ones(batch),
        } | {name: make(s, batch) for name, make in more.items()}

    return inputs


def _keep(s: Size, batch: int) -> torch.Tensor:
    return torch.ones(batch, s.text)


def _cogvideox(patch_t: int | None = None, rotary: bool = True, face: bool = False) -> Inputs:
    def inputs(s: Size, batch: int) -> dict[str, Any]:
        f, h, w = s.latents(8, 4)
        f += -f % (patch_t or 1)
        tokens = f // (patch_t or 1) * (h // 2) * (w // 2)
        more: dict[str, Any] = {}
        if rotary:
            more["image_rotary_emb"] = (randn(tokens, 64), randn(tokens, 64))
        if face:
            more["id_cond"] = randn(batch, 1280)
            more["id_vit_hidden"] = [randn(batch, 577, 1024) for _ in range(5)]
        return more | {
            "hidden_states": randn(batch, f, 32 if face else 16, h, w),
            "encoder_hidden_states": randn(batch, s.text, 4096),
            "timestep": torch.ones(batch, dtype=torch.int64),
        }

    return inputs


def _qwen(s: Size, batch: int) -> dict[str, Any]:
    _, h, w = s.latents(16)
    return {
        "hidden_states": randn(batch, h * w, 64),
        "encoder_hidden_states": randn(batch, s.text, 3584),
        "timestep": torch.ones(batch),
        "img_shapes": [[(1, h, w)]] * batch,
    }


def _sana(s: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(batch, 32, s.height // 32, s.width // 32),
        "encoder_hidden_states": randn(batch, s.text, 2304),
        "timestep": torch.ones(batch),
    }


def _z_image(s: Size, batch: int) -> dict[str, Any]:
    x = [randn(16, 1, s.height // 8, s.width // 8) for _ in range(batch)]
    return {"x": x, "t": torch.ones(batch), "cap_feats": [randn(s.text, 2560) for _ in range(batch)]}


def _unet(s: Size, batch: int) -> dict[str, Any]:
    return {
        "sample": randn(batch, 4, s.height // 8, s.width // 8),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": randn(batch, s.text, 2048),
        "added_cond_kwargs": {"text_embeds": randn(batch, 1280), "time_ids": randn(batch, 6)},
    }


def _ltx2(s: Size, batch: int) -> dict[str, Any]:
    f, h, w = s.latents(32, 8)
    audio = round(s.frames / 24 * 25)  # 25 latents of sound per second
    return {
        "hidden_states": randn(batch, f * h * w, 128),
        "audio_hidden_states": randn(batch, audio, 128),
        "encoder_hidden_states": randn(batch, s.text, 3840),
        "audio_encoder_hidden_states": randn(batch, s.text, 3840),
        "timestep": torch.ones(batch, f * h * w),
        "audio_timestep": torch.ones(batch, audio),
        "num_frames": f,
        "height": h,
        "width": w,
        "audio_num_frames": audio,
    }


def _minimax(s: Size, batch: int) -> dict[str, Any]:
    f, h, w = s.latents(32, 4)
    video, audio = f * h * w, round(s.frames / 24 * 25)
    kinds = (s.text, video, audio)

    def each(*values: int) -> torch.Tensor:
        return torch.cat([torch.full((n,), v, dtype=torch.int64) for n, v in zip(kinds, values, strict=True)])

    at = torch.arange(sum(kinds))
    return {
        "hidden_states": randn(batch, video, 96),
        "audio_hidden_states": randn(batch, audio, 32),
        "encoder_hidden_states": randn(batch, s.text, 5120),
        "timestep": torch.ones(3),
        "timestep_indices": each(0, 1, 2),
        "token_tags": each(2, 0, 1),
        "position_ids": at[:, None].expand(-1, 3),
        "video_indices": at[s.text : s.text + video],
        "audio_indices": at[s.text + video :],
        "text_indices": at[: s.text],
    }


def _wan5b(s: Size, batch: int) -> dict[str, Any]:
    """From an image: its frame is at time 0, so each token has a time of its own."""
    f, h, w = s.latents(32, 4)
    return _video(16, 4, 48, 4096)(s, batch) | {"timestep": torch.ones(batch, f * h * w)}


_COG = {"num_attention_heads": 48, "use_rotary_positional_embeddings": True}
_WAN = _video(8, 4, 16, 4096)
_SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

MODELS: dict[str, Model] = {
    "flux-dev": Model(
        "FluxTransformer2DModel", _flux(), {"guidance_embeds": True},
        {"num_layers": (19, 1), "num_single_layers": (38, 1)},
    ),
    "flux-schnell": Model(
        "FluxTransformer2DModel", _without(_flux(), "guidance"), {},
        {"num_layers": (19, 1), "num_single_layers": (38, 1)},
    ),
    "flux2-dev": Model(
        "Flux2Transformer2DModel", _flux(axes=4, text=15360, pooled=False, channels=128), {},
        {"num_layers": (8, 1), "num_single_layers": (48, 1)},
    ),
    "flux2-klein-4b": Model(
        "Flux2Transformer2DModel", _without(_flux(axes=4, text=7680, pooled=False, channels=128), "guidance"),
        {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
        {"num_layers": (5, 1), "num_single_layers": (20, 1)}, text=512,
    ),
    "longcat-image": Model(
        "LongCatImageTransformer2DModel", _without(_flux(text=3584, pooled=False), "guidance"), {},
        {"num_layers": (10, 1), "num_single_layers": (20, 1)}, text=512,
    ),
    "opensora2-11b": Model(
        "FluxTransformer2DModel", _flux(), {"guidance_embeds": True},
        {"num_layers": (19, 1), "num_single_layers": (38, 1)}, batched=True,
    ),
    "hunyuanvideo": Model(
        "HunyuanVideoTransformer3DModel",
        _video(8, 4, 16, 4096, encoder_attention_mask=_keep, pooled_projections=lambda s, b: randn(b, 768),
               guidance=lambda s, b: torch.ones(b)), {"guidance_embeds": True},
        {"num_layers": (20, 1), "num_single_layers": (40, 1)},
    ),
    "mochi": Model(
        "MochiTransformer3DModel",
        _video(8, 6, 12, 4096, encoder_attention_mask=lambda s, b: torch.ones(b, s.text, dtype=torch.bool)), {},
        {"num_layers": (48, 1)}, batched=True, valid=True,
    ),
    "cogvideox-2b": Model(
        "CogVideoXTransformer3DModel", _cogvideox(rotary=False), {}, {"num_layers": (30, 1)}, batched=True
    ),
    "cogvideox-5b": Model("CogVideoXTransformer3DModel", _cogvideox(), _COG, {"num_layers": (42, 1)}, batched=True),
    "cogvideox1.5-5b": Model(
        "CogVideoXTransformer3DModel", _cogvideox(patch_t=2),
        _COG | {"patch_size_t": 2, "patch_bias": False, "sample_width": 170, "sample_height": 96, "sample_frames": 81},
        {"num_layers": (42, 1)}, batched=True,
    ),
    "consisid": Model(
        "ConsisIDTransformer3DModel", _cogvideox(face=True), _COG | {"in_channels": 32, "is_train_face": True},
        {"num_layers": (42, 2)}, batched=True,
    ),
    "qwen-image": Model("QwenImageTransformer2DModel", _qwen, {}, {"num_layers": (60, 1)}),
    "sana-1.6b": Model("SanaTransformer2DModel", _sana, {"sample_size": 128}, {"num_layers": (20, 1)}, batched=True),
    "z-image": Model("ZImageTransformer2DModel", _z_image, {}, {"n_layers": (30, 1)}),
    "wan2.1-14b": Model("WanTransformer3DModel", _WAN, {}, {"num_layers": (40, 1)}),
    "wan2.2-14b": Model("WanTransformer3DModel", _WAN, {}, {"num_layers": (40, 1)}),
    "wan2.2-5b": Model(
        "WanTransformer3DModel", _wan5b,
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336}, {"num_layers": (30, 1)},
    ),
    "ltx-2": Model("LTX2VideoTransformer3DModel", _ltx2, {}, {"num_layers": (48, 1)}, text=1024),
    "minimax-h3": Model("MiniMaxH3Transformer3DModel", _minimax, {}, {"num_layers": (50, 1)}),
    "sdxl": Model("UNet2DConditionModel", _unet, _SDXL, batched=True),
}  # fmt: skip


@contextlib.contextmanager
def fake(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Fake tensors, made in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def all_valid(name: str) -> Iterator[None]:
    """While a model is captured that asks which tokens its mask leaves: it is told all of them."""
    before = torch.nonzero
    if MODELS[name].valid:
        torch.nonzero = lambda x, as_tuple=False: torch.arange(x.numel())[:, None]  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nonzero = before


def build(name: str, size: Size, batch: int, blocks: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """The model with so many blocks of each stack, on fake tensors, and the inputs of one call."""
    import diffusers

    model = MODELS[name]
    with fake():
        made = getattr(diffusers, model.name)(**(model.config | blocks)).eval().requires_grad_(False)
        return made, model.inputs(size, batch) | {"return_dict": False}
