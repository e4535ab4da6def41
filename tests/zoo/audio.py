"""Audio models."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


@entry("AceStepTransformer1DModel", "audio", (67,))
def ace_step(k: Knobs) -> Spec:
    """One layer attends in a sliding window, one everywhere; grouped queries; a cross-attention."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 2 * k.tokens, 4),
            timestep=d.times(k.batch),
            timestep_r=d.times(k.batch, 0.5),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            context_latents=d.randn(k.batch, 2 * k.tokens, 8),
            return_dict=False,
        )

    config = dict(
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=8,
        encoder_hidden_size=20,
        layer_types=["sliding_attention", "full_attention"],
    )
    return config, inputs


@entry("LongCatAudioDiTTransformer", "audio", (67,))
def longcat_audio(k: Knobs) -> Spec:
    """Prompt and audio are both masked; convolutions over the prompt, a condition added to the latents."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 4),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text, torch.bool),
            timestep=d.times(k.batch),
            attention_mask=d.mask(k.batch, k.tokens, torch.bool),
            latent_cond=d.randn(k.batch, k.tokens, 4),
            return_dict=False,
        )

    config = dict(dit_dim=48, dit_depth=2, dit_heads=3, dit_text_dim=20, latent_dim=4, ff_mult=2.0)
    return config, inputs


@entry("MiniMaxMusic3RVQDepthDecoder", "audio", (7,), prompt="inputs_embeds")
def minimax_depth(k: Knobs) -> Spec:
    """A causal decoder over the codebooks of one audio frame."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(inputs_embeds=d.randn(k.batch, k.tokens, 48))

    config = dict(
        hidden_size=48,
        num_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        audio_vocab_size=16,
        num_codebooks=4,
        max_position_embeddings=max(16, k.tokens),
    )
    return config, inputs


@entry("MiniMaxMusic3Transformer1DModel", "audio", (67,))
def minimax_music(k: Knobs) -> Spec:
    """The condition is aligned with the latents and joins them as channels; a time token stands first."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, k.tokens),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.tokens, 20),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        condition_dim=20,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        ff_inner_dim=40,
        rotary_dim=8,
        fourier_embedding_dim=16,
    )
    return config, inputs


@entry("StableAudioDiTModel", "audio", (67,))
def stable_audio(k: Knobs) -> Spec:
    """A global token stands first; keys and values of the cross-attention have fewer heads."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, k.tokens),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            global_hidden_states=d.randn(k.batch, 1, 24),
            rotary_embedding=d.rotary(k.tokens + 1, 8),
            return_dict=False,
        )

    config = dict(
        sample_size=k.tokens,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=24,
        cross_attention_input_dim=20,
    )
    return config, inputs


@entry("StableAudio3DiTModel", "audio", (67,))
def stable_audio3(k: Knobs) -> Spec:
    """Differential attention, memory tokens, a condition per token, learned padding of the prompt."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, k.tokens),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            global_hidden_states=d.randn(k.batch, 12),
            encoder_attention_mask=d.mask(k.batch, k.text),
            local_add_cond=d.randn(k.batch, 5, k.tokens),
            return_dict=False,
        )

    config = dict(
        io_channels=4,
        embed_dim=48,
        depth=2,
        num_heads=3,
        cond_token_dim=20,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        ff_mult=2.0,
        num_memory_tokens=3,
    )
    return config, inputs


@entry("T5FilmDecoder", "audio", (67,), prompt="encodings_and_masks")
def t5_film(k: Knobs) -> Spec:
    """Spectrogram diffusion: a T5 decoder with FiLM, over the concatenation of masked encodings."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            encodings_and_masks=[
                (d.randn(k.batch, k.text, 36), d.mask(k.batch, k.text).to(d.dtype)),
                (d.randn(k.batch, 5, 36), d.mask(k.batch, 5).to(d.dtype)),
            ],
            decoder_input_tokens=d.randn(k.batch, k.tokens, 8),
            decoder_noise_time=d.times(k.batch),
        )

    config = dict(
        input_dims=8,
        targets_length=k.tokens,
        d_model=36,
        num_layers=2,
        num_heads=3,
        d_kv=12,
        d_ff=40,
    )
    return config, inputs
