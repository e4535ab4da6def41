"""Kandinsky 5 and 6. Channels come last in the latents; rotary positions are computed in low precision."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


@entry("Kandinsky5Transformer3DModel", "video", (5, 5, 7), dtype=torch.float32)
def kandinsky5(k: Knobs) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, f, 2 * h, 2 * w, 9),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.times(k.batch, 1000.0),
            pooled_projections=d.randn(k.batch, 12),
            visual_rope_pos=tuple(torch.arange(n) for n in k.size),
            text_rope_pos=torch.arange(k.text),
            return_dict=False,
        )

    config = dict(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=16,
        model_dim=48,
        ff_dim=40,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    )
    return config, inputs


def kandinsky6(k: Knobs, audio: bool, **more: Any) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        extra = dict(audio_hidden_states=d.randn(k.batch, 13, 5)) if audio else {}
        return dict(
            hidden_states=d.randn(k.batch, f, 2 * h, 2 * w, 9),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            pooled_projections=d.randn(k.batch, 12),
            timestep=d.times(k.batch, 1000.0),
            encoder_attention_mask=d.mask(k.batch, k.text, torch.bool),
            return_dict=False,
            **extra,
        )

    config = dict(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=20,
        in_text_dim2=12,
        time_dim=16,
        model_dim=48,
        ff_dim=40,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        in_audio_dim=5,
        out_audio_dim=5,
        **more,
    )
    return config, inputs


@entry("Kandinsky6Transformer3DModel/silent", "video", (5, 5, 7))
def kandinsky6_video(k: Knobs) -> Spec:
    """The audio stream is left out."""
    return kandinsky6(k, audio=False)


@entry("Kandinsky6Transformer3DModel", "video", (5, 5, 7))
def kandinsky6_audio(k: Knobs) -> Spec:
    """Video and audio streams attend to each other, as the released checkpoints do."""
    more = dict(model_dim_a=32, time_dim_a=12, ff_dim_a=24, axes_dims_a=(4, 6, 6))
    return kandinsky6(k, audio=True, ca_rope=True, cross_gates=True, fix_modulation=True, **more)


@entry("Kandinsky6SRTransformer3DModel", "video", (2, 8, 16), prompt="hidden_states", fixed=("size",))
def kandinsky6_sr(k: Knobs) -> Spec:
    """Block-sparse flex attention over 8x8 tiles, chosen by content. Height and width are multiples of 8."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, f, h, w, 9),
            timestep=d.times(k.batch, 1000.0),
            return_dict=False,
        )

    config = dict(
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=48,
        ff_dim=40,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        nabla_window=(1, 1, 1),
    )
    return config, inputs
