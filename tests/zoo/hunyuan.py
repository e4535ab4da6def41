"""HunyuanVideo and its successors."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def hunyuan_video(k: Knobs, condition: str | None = None) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            pooled_projections=d.randn(k.batch, 12),
            guidance=d.full(6000.0, k.batch),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
    )
    return config, inputs


@entry("HunyuanVideoTransformer3DModel", "video", (5, 5, 7))
def hunyuan_t2v(k: Knobs) -> Spec:
    return hunyuan_video(k)


@entry("HunyuanVideoTransformer3DModel/i2v", "video", (5, 5, 7))
def hunyuan_i2v(k: Knobs) -> Spec:
    """The first frame's tokens get their own modulation."""
    return hunyuan_video(k, condition="token_replace")


@entry("HunyuanVideo15Transformer3DModel", "video", (5, 5, 7))
def hunyuan_video15(k: Knobs) -> Spec:
    """Three prompts (two texts and an image) whose valid tokens are moved to the front, row by row."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 9, f, h, w),
            timestep=d.times(k.batch, 1000.0),
            timestep_r=d.times(k.batch, 500.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            encoder_hidden_states_2=d.randn(k.batch, 5, 12),
            encoder_attention_mask_2=d.mask(k.batch, 5),
            image_embeds=d.randn(k.batch, 6, 10),
            return_dict=False,
        )

    config = dict(
        in_channels=9,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=20,
        text_embed_2_dim=12,
        image_embed_dim=10,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        use_meanflow=True,
    )
    return config, inputs


@entry("HunyuanVideoFramepackTransformer3DModel", "video", (5, 5, 7))
def framepack(k: Knobs) -> Spec:
    """Clean frames and history of two scales are packed before the latents; an image joins the prompt."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            pooled_projections=d.randn(k.batch, 12),
            image_embeds=d.randn(k.batch, 5, 10),
            indices_latents=torch.arange(f) + 8,
            guidance=d.full(6000.0, k.batch),
            latents_clean=d.randn(k.batch, 4, 2, 2 * h, 2 * w),
            indices_latents_clean=torch.tensor([0, 7]),
            latents_history_2x=d.randn(k.batch, 4, 2, 2 * h, 2 * w),
            indices_latents_history_2x=torch.arange(2) + 5,
            latents_history_4x=d.randn(k.batch, 4, 4, 2 * h, 2 * w),
            indices_latents_history_4x=torch.arange(4) + 1,
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=20,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=10,
        has_clean_x_embedder=True,
    )
    return config, inputs
