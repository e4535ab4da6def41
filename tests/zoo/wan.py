"""Wan and the models derived from it: SkyReels, ChronoEdit, VACE, Animate, Helios, AnyFlow."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def wan_config(image: bool = False, **more: Any) -> dict[str, Any]:
    config = dict(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=8 if image else 4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        rope_max_seq_len=32,
    )
    if image:
        config |= dict(image_dim=20, added_kv_proj_dim=36)
    return config | more


def wan(k: Knobs, image: bool = False, per_token: bool = False, **more: Any) -> Spec:
    """With an image, the models take the last 512 tokens for the prompt: zeros pad it, unmasked."""
    f, h, w = k.size
    config = wan_config(image, **more)

    def inputs(d: Draw) -> dict[str, Any]:
        prompt = d.randn(k.batch, k.text, 20)
        extra = {}
        if image:
            prompt = torch.nn.functional.pad(prompt, (0, 0, 0, max(0, 512 - k.text)))
            extra = dict(encoder_hidden_states_image=d.randn(k.batch, 9, 20))
        times = d.steps(k.batch)
        if per_token:
            later = times[:, None].expand(-1, k.tokens - h * w)
            times = torch.cat([times.new_zeros(k.batch, h * w), later], 1)
        return dict(
            hidden_states=d.randn(k.batch, config["in_channels"], f, 2 * h, 2 * w),
            timestep=times,
            encoder_hidden_states=prompt,
            return_dict=False,
            **extra,
        )

    return config, inputs


@entry("WanTransformer3DModel", "video", (5, 5, 7))
def wan_t2v(k: Knobs) -> Spec:
    return wan(k)


@entry("WanTransformer3DModel/i2v", "video", (5, 5, 7))
def wan_i2v(k: Knobs) -> Spec:
    """Image-to-video: a second cross-attention, to image embeddings."""
    return wan(k, image=True)


@entry("WanTransformer3DModel/ti2v", "video", (5, 5, 7))
def wan_ti2v(k: Knobs) -> Spec:
    """Wan 2.2 TI2V: one time per token, zero on the first frame."""
    return wan(k, per_token=True)


@entry("SkyReelsV2Transformer3DModel", "video", (5, 5, 7))
def skyreels(k: Knobs) -> Spec:
    return wan(k, image=True)


@entry("SkyReelsV2Transformer3DModel/forcing", "video", (4, 5, 7), batch=1, fixed=("batch", "size"))
def skyreels_forcing(k: Knobs) -> Spec:
    """Diffusion forcing: one time per frame, attention causal over blocks of two frames, a frame rate.

    The number of frames is even. diffusers' frame rate embedding only broadcasts for one row.
    """
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=d.steps(k.batch * f).reshape(k.batch, f),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            enable_diffusion_forcing=True,
            fps=[1] * k.batch,
            return_dict=False,
        )

    return wan_config(inject_sample_info=True, num_frame_per_block=2), inputs


@entry("ChronoEditTransformer3DModel", "video", (2, 5, 7))
def chronoedit(k: Knobs) -> Spec:
    """Image editing as a video of two frames, far apart in position."""
    return wan(k, image=True, rope_temporal_skip_len=8)


@entry("WanVACETransformer3DModel", "video", (5, 5, 7))
def vace(k: Knobs) -> Spec:
    """A second stack of blocks reads control latents and feeds every second block."""
    config, base = wan(k, vace_layers=[0, 1], vace_in_channels=6)
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return base(d) | dict(
            control_hidden_states=d.randn(k.batch, 6, f, 2 * h, 2 * w),
            control_hidden_states_scale=d.times(2, 1.5),
        )

    return config, inputs


@entry("WanAnimateTransformer3DModel", "video", (5, 5, 7))
def animate(k: Knobs) -> Spec:
    """Poses are added to all frames but the first; motion of faces is cross-attended per frame."""
    f, h, w = k.size
    channels = {str(2**i): 8 for i in range(2, 6)}
    motion = dict(
        motion_encoder_channel_sizes=channels,
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    config, base = wan(k, image=True, in_channels=12, latent_channels=4, **motion)

    def inputs(d: Draw) -> dict[str, Any]:
        return base(d) | dict(
            pose_hidden_states=d.randn(k.batch, 4, f - 1, 2 * h, 2 * w),
            face_pixel_values=d.randn(k.batch, 3, 4 * (f - 1), 16, 16),
        )

    return config, inputs


@entry("WanAnimate2Transformer3DModel", "video", (5, 5, 7))
def animate2(k: Knobs) -> Spec:
    """The pass over the reference, which stores keys and values in a cache. Lists of latents and prompts."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

        grid = torch.tensor([list(k.size)] * k.batch)
        return dict(
            hidden_states=[d.randn(4, f, 2 * h, 2 * w) for _ in range(k.batch)],
            condition_latents=[d.randn(5, f, 2 * h, 2 * w) for _ in range(k.batch)],
            timestep=d.steps(k.batch),
            encoder_hidden_states=[d.randn(n, 20) for n in d.mask(k.batch, k.text).sum(1).tolist()],
            encoder_hidden_states_image=d.randn(k.batch, 9, 1280),
            kv_cache=WanAnimate2KVCache(2),
            kv_cache_mode="extract",
            seq_len=k.tokens,
            offset_grid_sizes=grid,
            return_dict=False,
        )

    config = dict(
        text_len=k.text,
        in_dim=9,
        dim=36,
        ffn_dim=40,
        freq_dim=16,
        text_dim=20,
        out_dim=4,
        num_heads=3,
        num_layers=2,
    )
    return config, inputs


@entry("HeliosTransformer3DModel", "video", (5, 5, 7))
def helios(k: Knobs) -> Spec:
    """Three scales of history, patched more and more coarsely, stand before the latents."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        def frames(start: int, count: int) -> torch.Tensor:
            return torch.arange(start, start + count).expand(k.batch, -1).contiguous()

        return dict(
            hidden_states=d.randn(k.batch, 4, f, 2 * h, 2 * w),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            indices_hidden_states=frames(7, f),
            indices_latents_history_short=frames(6, 1),
            indices_latents_history_mid=frames(4, 2),
            indices_latents_history_long=frames(0, 4),
            latents_history_short=d.randn(k.batch, 4, 1, 2 * h, 2 * w),
            latents_history_mid=d.randn(k.batch, 4, 2, 2 * h, 2 * w),
            latents_history_long=d.randn(k.batch, 4, 4, 2 * h, 2 * w),
            return_dict=False,
        )

    config = wan_config(rope_dim=(4, 4, 4), is_amplify_history=True)
    del config["rope_max_seq_len"]
    return config, inputs


@entry("AnyFlowTransformer3DModel", "video", (5, 5, 7))
def anyflow(k: Knobs) -> Spec:
    """Flow maps: from one time to another, per frame. Frames come before channels."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        times = d.times(k.batch * f, 1000.0).reshape(k.batch, f)
        return dict(
            hidden_states=d.randn(k.batch, f, 4, 2 * h, 2 * w),
            timestep=times,
            r_timestep=0.5 * times,
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            return_dict=False,
        )

    return wan_config(deltatime_type="t-r"), inputs


@entry("AnyFlowFARTransformer3DModel", "video", (5, 4, 6), fixed=("size",))
def anyflow_far(k: Knobs) -> Spec:
    """Chunks of frames, causal by flex attention; the oldest chunk is patched coarsely and has no output.

    More than three frames.
    """
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        times = d.times(k.batch * f, 1000.0).reshape(k.batch, f)
        return dict(
            hidden_states=d.randn(k.batch, f, 4, 2 * h, 2 * w),
            timestep=times,
            r_timestep=0.5 * times,
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            chunk_partition=[1, 2, f - 3],
            return_dict=False,
        )

    return wan_config(full_chunk_limit=2, attention_head_dim=16, chunk_partition=(1, 2, f - 3)), inputs
