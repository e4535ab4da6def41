"""Several modalities or items in one forward: video with audio, world models, packed sequences, edits."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def ltx2_config(**more: Any) -> dict[str, Any]:
    config = dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=3,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=24,
        num_layers=2,
        caption_channels=20,
    )
    return config | more


def ltx2(k: Knobs, **more: Any) -> Spec:
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        times = d.times(k.batch, 1000.0)
        mask = d.mask(k.batch, k.text)
        extra = dict(sigma=times, audio_sigma=0.5 * times) if "cross_attn_mod" in more else {}
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 8),
            audio_hidden_states=d.randn(k.batch, 13, 6),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            audio_encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=times[:, None].expand(-1, k.tokens).contiguous(),
            audio_timestep=times[:, None].expand(-1, 13).contiguous(),
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=f,
            height=h,
            width=w,
            audio_num_frames=13,
            return_dict=False,
            **extra,
        )

    return ltx2_config(**more), inputs


@entry("LTX2VideoTransformer3DModel", "video", (5, 5, 7))
def ltx2_plain(k: Knobs) -> Spec:
    """Video and audio streams, one time per token, attention across in both directions."""
    return ltx2(k)


@entry("LTX2VideoTransformer3DModel/2.3", "video", (5, 5, 7))
def ltx23(k: Knobs) -> Spec:
    """LTX 2.3: gated attention, the prompt is modulated by time, rotary dimensions split in halves."""
    gates = dict(gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True)
    return ltx2(k, rope_type="split", **gates)


@entry("SanaWMLTX2RefinerTransformer3DModel", "video", (5, 5, 7))
def sana_wm_refiner(k: Knobs) -> Spec:
    """LTX-2's video stream alone, with rotary tables from outside."""

    def inputs(d: Draw) -> dict[str, Any]:
        cos, sin = d.rotary(k.tokens, 48)
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 8),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=d.times(k.batch, 1000.0)[:, None].expand(-1, k.tokens).contiguous(),
            video_rotary_emb=(cos[None], sin[None]),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
        )

    return ltx2_config(), inputs


@entry("SanaWMTransformer3DModel", "video", (5, 5, 7), fixed=("text",))
def sana_wm(k: Knobs) -> Spec:
    """World model: gated delta rule in time and softmax attention by turns, with cameras and ray maps.

    diffusers squeezes the prompt's axis away if it has one token.
    """
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        poses = torch.eye(4, dtype=torch.float64).repeat(k.batch, f, 1, 1)
        poses[..., :3, :3] = torch.linalg.qr(d.randn(k.batch, f, 3, 3).double())[0]
        poses[..., :3, 3] = d.randn(k.batch, f, 3).double()
        lens = torch.tensor([1.1 * w, 1.3 * h, 0.5 * w, 0.5 * h], dtype=torch.float64)
        cameras = torch.cat([poses.flatten(2), lens.expand(k.batch, f, 4)], 2).to(d.dtype)
        return dict(
            hidden_states=d.randn(k.batch, 4, f, h, w),
            timestep=d.times(k.batch * f, 1000.0).reshape(k.batch, 1, f),
            encoder_hidden_states=d.randn(k.batch, 1, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            camera_conditions=cameras,
            chunk_plucker=d.randn(k.batch, 6, f, h, w),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        num_layers=2,
        hidden_size=72,
        num_attention_heads=3,
        softmax_every_n=2,
        linear_head_dim=24,
        chunk_plucker_channels=6,
        caption_channels=20,
        mlp_ratio=2.0,
    )
    return config, inputs


@entry("MiniMaxH3Transformer3DModel", "video", (5, 5, 7))
def minimax_h3(k: Knobs) -> Spec:
    """Prompt, video and audio tokens scattered into one sequence, each modulated by its time and kind."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        text, video, audio = torch.arange(k.text + k.tokens + 13).split([k.text, k.tokens, 13])
        tags = torch.cat([torch.full_like(text, 2), torch.zeros_like(video), torch.ones_like(audio)])
        times = torch.cat([torch.zeros_like(text), torch.ones_like(video), torch.full_like(audio, 2)])
        places = [text[:, None].expand(-1, 3), d.grid(f, h, w).long() + k.text, audio[:, None].expand(-1, 3)]
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 16),
            audio_hidden_states=d.randn(k.batch, 13, 6),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            timestep=torch.cat([d.full(0.0, 1), d.times(2, 1000.0)]),
            timestep_indices=times,
            token_tags=tags,
            position_ids=torch.cat(places),
            video_indices=video,
            audio_indices=audio,
            text_indices=text,
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=16,
        hidden_size=40,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=36,
        in_channels=4,
        audio_in_channels=6,
        text_dim=20,
        freq_dim=16,
        time_embed_hidden_dim=24,
        time_embed_dim=20,
        rope_freq_dim=2,
    )
    return config, inputs


def cosmos3(k: Knobs, omni: bool) -> Spec:
    """The sequence is packed, without a batch axis; the first frame is given."""
    f, h, w = k.size
    frame = h * w

    def inputs(d: Draw) -> dict[str, Any]:
        sound, action = (13, 6) if omni else (0, 0)
        total = k.text + k.tokens + sound + action
        parts = torch.arange(total).split([k.text, k.tokens, sound, action])
        positions = torch.cat([parts[0].expand(3, -1), d.grid(f, h, w).long().T + k.text], 1)
        extra: dict[str, Any] = {}
        if omni:
            positions = torch.cat([positions, parts[2].expand(3, -1), parts[3].expand(3, -1)], 1)
            extra = dict(
                sound_tokens=[d.randn(5, sound)],
                sound_token_shapes=[(sound, 1, 1)],
                sound_sequence_indexes=parts[2],
                sound_mse_loss_indexes=parts[2],
                sound_timesteps=d.full(400.0, sound),
                sound_noisy_frame_indexes=[torch.arange(sound)],
                action_tokens=[d.randn(action, 3)],
                action_token_shapes=[(action, 1, 1)],
                action_sequence_indexes=parts[3],
                action_mse_loss_indexes=parts[3],
                action_timesteps=d.full(300.0, action),
                action_noisy_frame_indexes=[torch.arange(action)],
                action_domain_ids=[torch.tensor(1)],
            )
        return dict(
            input_ids=d.integers(32, k.text),
            text_indexes=parts[0],
            position_ids=positions,
            und_len=k.text,
            sequence_length=total,
            vision_tokens=[d.randn(1, 4, f, 2 * h, 2 * w)],
            vision_token_shapes=[(f, h, w)],
            vision_sequence_indexes=parts[1],
            vision_mse_loss_indexes=parts[1][frame:],
            vision_timesteps=d.full(500.0, k.tokens - frame),
            vision_noisy_frame_indexes=[torch.arange(1, f)],
            return_dict=False,
            **extra,
        )

    config = dict(
        head_dim=16,
        hidden_size=48,
        intermediate_size=40,
        latent_channel=4,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_axes_dim=(4, 2, 2),
        vocab_size=32,
    )
    if omni:
        config |= dict(action_dim=3, action_gen=True, num_embodiment_domains=2, sound_dim=5, sound_gen=True)
    return config, inputs


@entry("Cosmos3OmniTransformer", "video", (5, 5, 7), batch=1, prompt="input_ids", fixed=("batch",))
def cosmos3_video(k: Knobs) -> Spec:
    """Two sets of weights, one for understanding the prompt (causal), one for generating."""
    return cosmos3(k, omni=False)


@entry("Cosmos3OmniTransformer/omni", "video", (5, 5, 7), batch=1, prompt="input_ids", fixed=("batch",))
def cosmos3_omni(k: Knobs) -> Spec:
    """With sound and robot actions."""
    return cosmos3(k, omni=True)


def joy_config() -> dict[str, Any]:
    return dict(
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=48,
        num_attention_heads=3,
        text_dim=20,
        mlp_width_ratio=2.0,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


@entry("JoyImageEditTransformer3DModel", "image", (7, 11))
def joy_edit(k: Knobs) -> Spec:
    """Two items of equal size, the target last, moved to the front inside."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 2, 4, 1, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            return_dict=False,
        )

    return joy_config() | dict(rope_type="mrope"), inputs


@entry("JoyImageEditPlusTransformer3DModel", "image", (7, 11))
def joy_edit_plus(k: Knobs) -> Spec:
    """Items of any size: patches are padded to the longest row and masked."""
    h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.tokens + 15, 4, 1, 2, 2),
            timestep=d.times(k.batch, 1000.0),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_hidden_states_mask=d.mask(k.batch, k.text),
            shape_list=[[(1, h, w), (1, 3, 5 - i % 2)] for i in range(k.batch)],
            return_dict=False,
        )

    return joy_config(), inputs
