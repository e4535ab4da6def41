"""U-Nets for videos, sound and trajectories. Sizes are (frames, rows, columns) of the latent video, or (length,)."""

from __future__ import annotations

from typing import Any

from .registry import Draw, Knobs, Spec, entry


def blocks(kind: str) -> dict[str, Any]:
    return dict(
        down_block_types=(f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        up_block_types=(f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    )


SMALL = dict(block_out_channels=(24, 48), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20)


@entry("UNet3DConditionModel", "video", (5, 14, 10))
def modelscope(k: Knobs) -> Spec:
    """ModelScope: every layer in a frame, then one over frames: convolutions and attention."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            return_dict=False,
        )

    return SMALL | blocks("3D") | dict(attention_head_dim=8), inputs


@entry("I2VGenXLUNet", "video", (5, 14, 10))
def i2vgen(k: Knobs) -> Spec:
    """The first frame is concatenated, attended to in 64 pooled patches, and embedded."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            fps=d.times(k.batch, 16.0),
            image_latents=d.randn(k.batch, 4, *k.size),
            image_embeddings=d.randn(k.batch, 20),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            return_dict=False,
        )

    return SMALL | blocks("3D") | dict(attention_head_dim=8), inputs


@entry("UNetSpatioTemporalConditionModel", "video", (5, 14, 10))
def stable_video(k: Knobs) -> Spec:
    """Frames are mixed by convolutions and attention, with learned weights. Always 32 norm groups."""

    def inputs(d: Draw) -> dict[str, Any]:
        f, h, w = k.size
        return dict(
            sample=d.randn(k.batch, f, 8, h, w),
            timestep=d.times(k.batch, 2.0),
            encoder_hidden_states=d.randn(k.batch, 1, 20),
            added_time_ids=d.times(3 * k.batch, 8.0).reshape(k.batch, 3),
            return_dict=False,
        )

    config = blocks("SpatioTemporal") | dict(
        block_out_channels=(32, 64),
        layers_per_block=1,
        num_attention_heads=(4, 4),
        cross_attention_dim=20,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=k.size[0],
    )
    return config, inputs


@entry("UNetMotionModel", "video", (5, 14, 10))
def animatediff(k: Knobs) -> Spec:
    """AnimateDiff: Stable Diffusion's U-Net with a motion module after every layer. One prompt per frame."""

    def inputs(d: Draw) -> dict[str, Any]:
        prompt = d.randn(k.batch, k.text, 20).repeat_interleave(k.size[0], dim=0)
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=prompt,
            return_dict=False,
        )

    return SMALL | blocks("Motion") | dict(num_attention_heads=3, motion_num_attention_heads=3), inputs


@entry("UNet1DModel", "audio", (56,), prompt="sample", fixed=("size",))
def dance(k: Knobs) -> Spec:
    """Dance Diffusion: fixed filters, attention at the bottom (heads of 32), random Fourier times as channels."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(sample=d.randn(k.batch, 2, *k.size), timestep=d.times(k.batch), return_dict=False)

    config = dict(block_out_channels=(8, 32, 96), extra_in_channels=16, sample_size=k.tokens)
    return config, inputs


def trajectory(k: Knobs, **more: Any) -> Spec:
    """Diffuser (reinforcement learning): residual blocks over time, no attention."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(sample=d.randn(k.batch, 4, *k.size), timestep=d.steps(k.batch), return_dict=False)

    config = dict(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 32),
        time_embedding_type="positional",
        use_timestep_embedding=True,
        flip_sin_to_cos=False,
        freq_shift=1.0,
        down_block_types=("DownResnetBlock1D",) * 3,
        act_fn="mish",
        norm_num_groups=8,
        layers_per_block=1,
        **more,
    )
    return config, inputs


@entry("UNet1DModel/planner", "other", (52,), prompt="sample", fixed=("size",))
def planner(k: Knobs) -> Spec:
    return trajectory(
        k,
        up_block_types=("UpResnetBlock1D",) * 2,
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
    )


@entry("UNet1DModel/value", "other", (29,), prompt="sample", fixed=("size",))
def value(k: Knobs) -> Spec:
    """One number for a trajectory of up to 32 steps: down-sampled at every block, until one is left."""
    return trajectory(
        k,
        up_block_types=(),
        mid_block_type="ValueFunctionMidBlock1D",
        out_block_type="ValueFunction",
        downsample_each_block=True,
    )
