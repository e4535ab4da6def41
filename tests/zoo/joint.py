"""Image models that attend jointly over prompt and latent patches, in one or two streams."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def cogview(d: Draw, k: Knobs) -> dict[str, Any]:
    return dict(
        hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
        encoder_hidden_states=d.randn(k.batch, k.text, 20),
        timestep=d.steps(k.batch),
        original_size=d.times(2 * k.batch, 64.0).reshape(k.batch, 2),
        target_size=d.times(2 * k.batch, 48.0).reshape(k.batch, 2),
        crop_coords=d.times(2 * k.batch, 8.0).reshape(k.batch, 2),
        return_dict=False,
    )


def cogview_config(**more: Any) -> dict[str, Any]:
    config = dict(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        text_embed_dim=20,
        time_embed_dim=12,
        condition_dim=8,
    )
    return config | more


@entry("CogView3PlusTransformer2DModel", "image", (7, 11))
def cogview3(k: Knobs) -> Spec:
    return cogview_config(sample_size=16, pos_embed_max_size=24), lambda d: cogview(d, k)


@entry("CogView4Transformer2DModel", "image", (7, 11))
def cogview4(k: Knobs) -> Spec:
    return cogview_config(sample_size=16, rope_axes_dim=(16, 16)), lambda d: cogview(d, k)


@entry("CogView4Transformer2DModel/masked", "image", (7, 11))
def cogview4_masked(k: Knobs) -> Spec:
    """The prompt's padding is masked out of the joint attention."""

    def inputs(d: Draw) -> dict[str, Any]:
        return cogview(d, k) | dict(attention_mask=d.mask(k.batch, k.text))

    return cogview_config(sample_size=16, rope_axes_dim=(16, 16)), inputs


@entry("GlmImageTransformer2DModel", "image", (7, 11))
def glm_image(k: Knobs) -> Spec:
    """CogView4's heir: tokens of an autoregressive prior are added to the latents, dropped for some rows."""

    def inputs(d: Draw) -> dict[str, Any]:
        drop = torch.arange(k.batch) % 2 == 1
        found = cogview(d, k) | dict(
            prior_token_id=d.integers(32, k.batch, k.tokens),
            prior_token_drop=drop[:, None].expand(-1, k.tokens),
        )
        del found["original_size"]
        return found

    return cogview_config(prior_vq_quantizer_codebook_size=32), inputs


@entry("AuraFlowTransformer2DModel", "image", (7, 11))
def aura_flow(k: Knobs) -> Spec:
    """Learned register tokens stand before the prompt."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.times(k.batch),
            return_dict=False,
        )

    config = dict(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        num_attention_heads=3,
        attention_head_dim=16,
        joint_attention_dim=20,
        caption_projection_dim=48,
        pos_embed_max_size=256,
    )
    return config, inputs


def hidream(k: Knobs) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timesteps=d.steps(k.batch),
            encoder_hidden_states_t5=d.randn(k.batch, k.text, 20),
            encoder_hidden_states_llama3=d.randn(2, k.batch, k.text, 12),
            pooled_embeds=d.randn(k.batch, 16),
            return_dict=False,
        )

    config = dict(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=3,
        attention_head_dim=16,
        caption_channels=[20, 12],
        text_emb_dim=16,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(2 * max(k.size), 2 * max(k.size)),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    return config, inputs


@entry("HiDreamImageTransformer2DModel", "image", (7, 7), prompt="encoder_hidden_states_llama3")
def hidream_square(k: Knobs) -> Spec:
    """Routed experts in every feed-forward layer."""
    return hidream(k)


@entry("HiDreamImageTransformer2DModel/wide", "image", (3, 7), prompt="encoder_hidden_states_t5")
def hidream_wide(k: Knobs) -> Spec:
    """What is not square is padded to the largest resolution, with a mask."""
    return hidream(k)


def hunyuan_image(k: Knobs, **more: Any) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if more.get("text_embed_2_dim"):
            extra["encoder_hidden_states_2"] = d.randn(k.batch, 5, 12)
            extra["encoder_attention_mask_2"] = d.mask(k.batch, 5)
        if more.get("guidance_embeds"):
            extra["guidance"] = d.full(3500.0, k.batch)
        if more.get("use_meanflow"):
            extra["timestep_r"] = d.times(k.batch, 500.0)
        return dict(
            hidden_states=d.randn(k.batch, 4, *k.size),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
            **extra,
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
        rope_axes_dim=(8, 8),
        **more,
    )
    return config, inputs


@entry("HunyuanImageTransformer2DModel", "image", (7, 11))
def hunyuan_image_plain(k: Knobs) -> Spec:
    return hunyuan_image(k)


@entry("HunyuanImageTransformer2DModel/distilled", "image", (7, 11))
def hunyuan_image_distilled(k: Knobs) -> Spec:
    """Two prompts whose valid tokens are moved to the front, row by row; guidance and a second time."""
    return hunyuan_image(k, text_embed_2_dim=12, guidance_embeds=True, use_meanflow=True)


@entry("PRXTransformer2DModel", "image", (7, 11))
def prx(k: Knobs) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            attention_mask=d.mask(k.batch, k.text, torch.bool),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        context_in_dim=20,
        hidden_size=48,
        mlp_ratio=2.0,
        num_heads=3,
        depth=2,
        axes_dim=[8, 8],
        bottleneck_size=12,
        resolution_embeds=True,
    )
    return config, inputs
