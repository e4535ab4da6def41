"""FLUX's descendants: two streams, then one, over token sequences with position ids."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def basic(d: Draw, k: Knobs, axes: int = 3) -> dict[str, Any]:
    """What all of these models take: 8 channels, 24 prompt features, unequal times."""
    return dict(
        hidden_states=d.randn(k.batch, k.tokens, 8),
        encoder_hidden_states=d.randn(k.batch, k.text, 24),
        timestep=d.times(k.batch),
        img_ids=d.ids(k.size, axes),
        txt_ids=d.full(0.0, k.text, axes),
        return_dict=False,
    )


def layers(**more: Any) -> dict[str, Any]:
    config = dict(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    return config | more


@entry("Flux2Transformer2DModel", "image", (7, 11))
def flux2(k: Knobs) -> Spec:
    """Shared modulation, fused single blocks, four position axes of which the last counts prompt tokens."""

    def inputs(d: Draw) -> dict[str, Any]:
        ids = torch.cat([d.full(0.0, k.text, 3), d.grid(k.text)], 1)
        return basic(d, k, 4) | dict(guidance=d.full(3.5, k.batch), txt_ids=ids)

    return layers(axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16), inputs


def flux3(k: Knobs, references: bool) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        more = {}
        if references:
            more = dict(
                image_cond_hidden_states=d.randn(k.batch, 15, 10),
                image_cond_ids=d.ids((3, 5), 4) + 1,
                target_timestep=d.times(k.batch, 0.5),
            )
        return basic(d, k, 4) | more

    sizes = dict(axes_dims_rope=(4, 4, 4, 4), cond_in_channels=10, timestep_channels=16)
    return layers(flow_map=references, **sizes), inputs


@entry("Flux3Transformer2DModel", "image", (7, 11))
def flux3_plain(k: Knobs) -> Spec:
    return flux3(k, references=False)


@entry("Flux3Transformer2DModel/edit", "image", (7, 11))
def flux3_edit(k: Knobs) -> Spec:
    """A stream of reference tokens joins the others; a flow map embeds a second time."""
    return flux3(k, references=True)


@entry("ChromaTransformer2DModel", "image", (7, 11))
def chroma(k: Knobs) -> Spec:
    """All modulation comes from one small network. The mask covers prompt and image tokens."""

    def inputs(d: Draw) -> dict[str, Any]:
        image = torch.ones(k.batch, k.tokens, dtype=torch.bool)
        return basic(d, k) | dict(attention_mask=torch.cat([d.mask(k.batch, k.text, torch.bool), image], 1))

    more = dict(approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=1)
    return layers(**more), inputs


@entry("BriaTransformer2DModel", "image", (7, 11))
def bria(k: Knobs) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return basic(d, k) | dict(timestep=d.times(k.batch, 1000.0))

    return layers(axes_dims_rope=[4, 6, 6]), inputs


@entry("BriaFiboTransformer2DModel", "image", (7, 11))
def bria_fibo(k: Knobs) -> Spec:
    """Every block gets its own layer of the text encoder."""

    def inputs(d: Draw) -> dict[str, Any]:
        return basic(d, k) | dict(
            timestep=d.times(k.batch, 1000.0),
            guidance=d.full(5.0, k.batch),
            text_encoder_layers=[d.randn(k.batch, k.text, 12) for _ in range(3)],
        )

    return layers(axes_dims_rope=[4, 6, 6], text_encoder_dim=12, guidance_embeds=True), inputs


@entry("LongCatImageTransformer2DModel", "image", (7, 11))
def longcat_image(k: Knobs) -> Spec:
    return layers(pooled_projection_dim=12), lambda d: basic(d, k)


@entry("OvisImageTransformer2DModel", "image", (7, 11))
def ovis(k: Knobs) -> Spec:
    return layers(out_channels=8), lambda d: basic(d, k)
