"""Video models with one prompt: CogVideoX, ConsisID, LTX-Video, Latte, Allegro, EasyAnimate, Mochi, Motif."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def cogvideox(k: Knobs, rotary: bool, p_t: int | None = None, **more: Any) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        frames = f * (p_t or 1)
        extra = dict(image_rotary_emb=d.rotary(k.tokens, 16)) if rotary else {}
        if "ofs_embed_dim" in more:
            extra["ofs"] = d.full(2.0, k.batch)
        return dict(
            hidden_states=d.randn(k.batch, frames, 4, 2 * h, 2 * w),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.steps(k.batch),
            return_dict=False,
            **extra,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=12,
        text_embed_dim=20,
        num_layers=2,
        sample_width=2 * w,
        sample_height=2 * h,
        sample_frames=4 * (f - 1) + 1,
        max_text_seq_length=k.text,
        patch_size_t=p_t,
        use_rotary_positional_embeddings=rotary,
        **more,
    )
    return config, inputs


@entry("CogVideoXTransformer3DModel", "video", (5, 5, 7))
def cogvideox_5b(k: Knobs) -> Spec:
    return cogvideox(k, rotary=True)


@entry("CogVideoXTransformer3DModel/2b", "video", (5, 5, 7))
def cogvideox_2b(k: Knobs) -> Spec:
    """Sine and cosine positions are added instead of rotary ones."""
    return cogvideox(k, rotary=False)


@entry("CogVideoXTransformer3DModel/1.5", "video", (5, 5, 7))
def cogvideox_15(k: Knobs) -> Spec:
    """CogVideoX 1.5 image-to-video: patches over two frames, an offset embedding."""
    return cogvideox(k, rotary=True, p_t=2, ofs_embed_dim=12, patch_bias=False)


@entry("CogVideoXTransformer3DModel/learned", "video", (5, 5, 7))
def cogvideox_learned(k: Knobs) -> Spec:
    """CogVideoX 5B image-to-video: a learned position table beside the rotary one."""
    return cogvideox(k, rotary=True, use_learned_positional_embeddings=True)


@entry("LTXVideoTransformer3DModel", "video", (5, 5, 7))
def ltx(k: Knobs) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 8),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            timestep=d.steps(k.batch),
            num_frames=f,
            height=h,
            width=w,
            rope_interpolation_scale=(1 / 3, 32.0, 32.0),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=12,
        cross_attention_dim=36,
        num_layers=2,
        caption_channels=20,
    )
    return config, inputs


@entry("LatteTransformer3DModel", "video", (5, 5, 7))
def latte(k: Knobs) -> Spec:
    """Attention over space, then over time, by turns."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text * f).reshape(k.batch * f, 1, k.text).to(d.dtype),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=36,
        attention_bias=True,
        sample_size=14,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=20,
        video_length=f,
    )
    return config, inputs


@entry("AllegroTransformer3DModel", "video", (5, 5, 7))
def allegro(k: Knobs) -> Spec:
    """Rotary tables per axis, looked up by position; some latents of the second row are masked."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        positions = d.grid(f, h, w).long().T.reshape(3, 1, -1).contiguous()
        keep = d.full(1.0, k.batch, f, 2 * h, 2 * w)
        keep[1:, :, :, 2 * w - 2 :] = 0
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.steps(k.batch),
            attention_mask=keep,
            encoder_attention_mask=d.mask(k.batch, k.text),
            image_rotary_emb=(tuple(d.rotary(n, 6) for n in (f, h, w)), tuple(positions)),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=18,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=54,
        sample_height=2 * h,
        sample_width=2 * w,
        sample_frames=f,
        caption_channels=20,
    )
    return config, inputs


@entry("ConsisIDTransformer3DModel", "video", (5, 5, 7))
def consisid(k: Knobs) -> Spec:
    """CogVideoX with features of a face: a perceiver of two scales, attended to from every second block."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, f, 4, 2 * h, 2 * w),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.steps(k.batch),
            image_rotary_emb=d.rotary(k.tokens, 16),
            id_cond=d.randn(k.batch, 16),
            id_vit_hidden=[d.randn(k.batch, 5, 12) for _ in range(2)],
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=12,
        text_embed_dim=20,
        num_layers=2,
        sample_width=2 * w,
        sample_height=2 * h,
        sample_frames=4 * (f - 1) + 1,
        max_text_seq_length=k.text,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=16,
        LFE_vit_dim=12,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=3,
        LFE_num_querie=5,
        LFE_output_dim=32,
        LFE_ff_mult=2,
        LFE_num_scale=2,
    )
    return config, inputs


@entry("EasyAnimateTransformer3DModel", "video", (5, 5, 7))
def easy_animate(k: Knobs) -> Spec:
    """Two prompts; a two-stream block, then one that shares its weights; inpainting and control latents."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_hidden_states_t5=d.randn(k.batch, 5, 20),
            inpaint_latents=d.randn(k.batch, 5, f, 2 * h, 2 * w),
            control_latents=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=13,
        out_channels=4,
        patch_size=2,
        sample_width=2 * w,
        sample_height=2 * h,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=12,
        add_norm_text_encoder=True,
        text_embed_dim=20,
        text_embed_dim_t5=20,
        after_norm=True,
    )
    return config, inputs


@entry("MochiTransformer3DModel", "video", (5, 5, 7))
def mochi(k: Knobs) -> Spec:
    """Attention runs row by row over the valid prompt tokens; positions are learned frequencies."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            encoder_hidden_states=d.randn(k.batch, k.text, 24),
            timestep=d.times(k.batch, 1000.0),
            encoder_attention_mask=d.mask(k.batch, k.text, torch.bool),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=12,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=16,
        max_sequence_length=k.text,
    )
    return config, inputs


def motif(k: Knobs, image: bool) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        more = dict(image_embeds=d.randn(k.batch, 5, 12)) if image else {}
        return dict(
            hidden_states=d.randn(k.batch, 9, f, 2 * h, 2 * w),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
            **more,
        )

    config = dict(
        in_channels=9,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1 if image else 0,
        mlp_ratio=2.0,
        text_embed_dim=20,
        image_embed_dim=12 if image else None,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=image,
        enable_text_cross_attention_single=image,
    )
    return config, inputs


@entry("MotifVideoTransformer3DModel", "video", (5, 5, 7), dtype=torch.float32)
def motif_t2v(k: Knobs) -> Spec:
    return motif(k, image=False)


@entry("MotifVideoTransformer3DModel/i2v", "video", (5, 5, 7), dtype=torch.float32)
def motif_i2v(k: Knobs) -> Spec:
    """An image prompt, cross-attention beside joint attention, and a decoder block after the encoder's."""
    return motif(k, image=True)


def cosmos(k: Knobs, image: bool = False, learned: bool = False) -> Spec:
    """Without the padding mask, whose resizing needs torchvision."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        text = d.randn(k.batch, k.text, 20 if image else 24)
        times = d.times(k.batch)
        if image:
            times = times.reshape(k.batch, 1, 1, 1, 1).expand(-1, -1, f, -1, -1).contiguous()
            times[:, :, 0] = 0.01
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=times,
            encoder_hidden_states=(text, d.randn(k.batch, 5, 12)) if image else text,
            condition_mask=d.mask(k.batch, 4 * k.tokens).reshape(k.batch, 1, f, 2 * h, 2 * w).to(d.dtype),
            fps=16,
            return_dict=False,
        )

    config = dict(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=24,
        adaln_lora_dim=8,
        max_size=(16, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable" if learned else None,
        use_crossattn_projection=image,
        crossattn_proj_in_channels=20,
        encoder_hidden_states_channels=24,
        img_context_dim_in=12 if image else None,
        img_context_num_tokens=5,
        img_context_dim_out=48,
    )
    return config, inputs


@entry("CosmosTransformer3DModel", "video", (5, 5, 7))
def cosmos_predict2(k: Knobs) -> Spec:
    return cosmos(k)


@entry("CosmosTransformer3DModel/learned", "video", (5, 5, 7), dtype=torch.float32)
def cosmos_predict1(k: Knobs) -> Spec:
    """Cosmos 1 adds learned positions in every block."""
    return cosmos(k, learned=True)


@entry("CosmosTransformer3DModel/transfer", "video", (5, 5, 7))
def cosmos_predict25(k: Knobs) -> Spec:
    """Cosmos 2.5: one time per frame, the prompt is projected, and images are cross-attended as well."""
    return cosmos(k, image=True)


@entry("SanaVideoTransformer3DModel", "video", (5, 5, 7))
def sana_video(k: Knobs) -> Spec:
    """Linear attention with rotary positions, convolutions in space and time."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.times(k.batch, 1000.0),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=3,
        cross_attention_head_dim=12,
        cross_attention_dim=36,
        caption_channels=20,
        sample_size=14,
        rope_max_seq_len=32,
    )
    return config, inputs
