"""Image models with one prompt: FLUX, SD3, Qwen-Image, PixArt, Sana, DiT, HunyuanDiT."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


@entry("FluxTransformer2DModel", "image", (7, 11))
def flux(k: Knobs) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 8),
            encoder_hidden_states=d.randn(k.batch, k.text, 24),
            pooled_projections=d.randn(k.batch, 20),
            timestep=d.times(k.batch),
            guidance=d.full(3.5, k.batch),
            img_ids=d.ids(k.size, 3),
            txt_ids=d.full(0.0, k.text, 3),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return config, inputs


def sd3(k: Knobs, **more: Any) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            encoder_hidden_states=d.randn(k.batch, k.text, 24),
            pooled_projections=d.randn(k.batch, 20),
            timestep=d.times(k.batch, 1000.0),
            return_dict=False,
        )

    config = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=12,
        joint_attention_dim=24,
        caption_projection_dim=36,
        pooled_projection_dim=20,
        pos_embed_max_size=24,
        **more,
    )
    return config, inputs


@entry("SD3Transformer2DModel", "image", (7, 11))
def sd3_plain(k: Knobs) -> Spec:
    return sd3(k)


@entry("SD3Transformer2DModel/dual", "image", (7, 11))
def sd3_dual(k: Knobs) -> Spec:
    """SD 3.5: the first block attends twice, queries and keys are normalised."""
    return sd3(k, dual_attention_layers=(0,), qk_norm="rms_norm")


def qwen(k: Knobs, references: bool = False, **more: Any) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        extra = dict(additional_t_cond=torch.arange(k.batch) % 2) if "use_additional_t_cond" in more else {}
        return dict(
            hidden_states=d.randn(k.batch, k.tokens + (15 if references else 0), 16),
            encoder_hidden_states=d.randn(k.batch, k.text, 24),
            encoder_hidden_states_mask=d.mask(k.batch, k.text),
            timestep=d.times(k.batch),
            img_shapes=[[(1, *k.size), (1, 3, 5)] if references else [(1, *k.size)]] * k.batch,
            return_dict=False,
            **extra,
        )

    config = dict(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        **more,
    )
    return config, inputs


@entry("QwenImageTransformer2DModel", "image", (7, 11))
def qwen_image(k: Knobs) -> Spec:
    """Prompts of unequal lengths, masked."""
    return qwen(k)


@entry("QwenImageTransformer2DModel/edit", "image", (7, 11))
def qwen_edit(k: Knobs) -> Spec:
    """Reference tokens follow, modulated as at time zero."""
    return qwen(k, references=True, zero_cond_t=True)


@entry("QwenImageTransformer2DModel/layered", "image", (7, 11))
def qwen_layered(k: Knobs) -> Spec:
    """Layers have positions of their own; a flag is embedded with the time."""
    return qwen(k, references=True, use_additional_t_cond=True, use_layer3d_rope=True)


def pixart(k: Knobs, sizes: bool) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        extra = dict(resolution=d.randn(k.batch, 2), aspect_ratio=d.randn(k.batch, 1))
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            timestep=d.steps(k.batch),
            added_cond_kwargs=extra if sizes else dict(resolution=None, aspect_ratio=None),
            return_dict=False,
        )

    config = dict(
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=12,
        cross_attention_dim=36,
        caption_channels=20,
        sample_size=16,
        use_additional_conditions=sizes,
    )
    return config, inputs


@entry("PixArtTransformer2DModel", "image", (7, 11))
def pixart_sigma(k: Knobs) -> Spec:
    return pixart(k, sizes=False)


@entry("PixArtTransformer2DModel/alpha", "image", (7, 11))
def pixart_alpha(k: Knobs) -> Spec:
    """PixArt-alpha at 1024 pixels also embeds resolution and aspect ratio."""
    return pixart(k, sizes=True)


def sana(k: Knobs, guided: bool) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        more = dict(guidance=d.full(4.5, k.batch)) if guided else {}
        return dict(
            hidden_states=d.randn(k.batch, 4, *k.size),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            timestep=d.times(k.batch, 1000.0),
            return_dict=False,
            **more,
        )

    config = dict(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=12,
        num_cross_attention_heads=3,
        cross_attention_head_dim=16,
        cross_attention_dim=48,
        caption_channels=20,
        sample_size=16,
        qk_norm="rms_norm_across_heads" if guided else None,
        guidance_embeds=guided,
    )
    return config, inputs


@entry("SanaTransformer2DModel", "image", (7, 11))
def sana_plain(k: Knobs) -> Spec:
    """Linear attention over the image, softmax attention to the prompt, depthwise convolutions."""
    return sana(k, guided=False)


@entry("SanaTransformer2DModel/sprint", "image", (7, 11))
def sana_sprint(k: Knobs) -> Spec:
    """Sana-Sprint: guidance is embedded, queries and keys are normalised."""
    return sana(k, guided=True)


@entry("DiTTransformer2DModel", "image", (7, 7), prompt="class_labels", fixed=("size",))
def dit(k: Knobs) -> Spec:
    """The model assumes a square grid of tokens."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.steps(k.batch),
            class_labels=d.integers(10, k.batch),
            return_dict=False,
        )

    config = dict(
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        sample_size=2 * k.size[0],
        num_embeds_ada_norm=10,
    )
    return config, inputs


@entry("HunyuanDiT2DModel", "image", (7, 11))
def hunyuan_dit(k: Knobs) -> Spec:
    """Four blocks give one long skip connection. Two prompts of fixed lengths: CLIP's (`text`), T5's (9)."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            text_embedding_mask=d.mask(k.batch, k.text),
            encoder_hidden_states_t5=d.randn(k.batch, 9, 16),
            text_embedding_mask_t5=d.mask(k.batch, 9),
            image_meta_size=d.times(6 * k.batch, 64.0).reshape(k.batch, 6),
            style=torch.zeros(k.batch, dtype=torch.int64),
            image_rotary_emb=d.rotary(k.tokens, 16),
            return_dict=False,
        )

    config = dict(
        num_layers=4,
        num_attention_heads=3,
        attention_head_dim=16,
        hidden_size=48,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        mlp_ratio=2.0,
        cross_attention_dim=20,
        cross_attention_dim_t5=16,
        pooled_projection_dim=12,
        text_len=k.text,
        text_len_t5=9,
    )
    return config, inputs
