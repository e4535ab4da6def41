"""Autoencoders and vocoders of sound, tokenizers of it, and a protein's decoder. Sizes are samples or frames."""

from __future__ import annotations

from typing import Any

import torch

from .autoencoders import coded
from .registry import Draw, Knobs, Spec, entry


@entry("AutoencoderOobleck", "audio", (232,), prompt="sample")
def oobleck(k: Knobs) -> Spec:
    """Stable Audio's: strided convolutions of normalised weights, sines as activations. 29 latents."""
    config = dict(encoder_hidden_size=8, decoder_channels=4, decoder_input_channels=4)
    return coded(k, of=2, **config, downsampling_ratios=[2, 4], channel_multiples=[1, 2])


@entry("LongCatAudioDiTVae", "audio", (116,), prompt="sample", dtype=torch.float32)
def longcat(k: Knobs) -> Spec:
    """Shortcuts that average on the way down and repeat on the way up. It casts its latents to float32."""
    config = dict(channels=8, c_mults=[1, 2], strides=[2, 2], latent_dim=4, encoder_latent_dim=8)
    return coded(k, of=1, **config, downsampling_ratio=4)


@entry("AutoencoderKLKVAEAudio", "audio", (174,), prompt="sample")
def kvae_audio(k: Knobs) -> Spec:
    """Attention over 29 latents; strides of 2 and 3."""
    rates = dict(encoder_rates=[2, 3], decoder_rates=[3, 2], attn_num_heads=3)
    return coded(k, of=1, encoder_dim=6, latent_dim=24, codebook_dim=6, decoder_dim=16, **rates)


@entry("AutoencoderKLLTX2Audio", "audio", (28, 22), prompt="sample")
def ltx2_audio(k: Knobs) -> Spec:
    """Spectrograms, stereo, [frames, bins]: convolutions that are causal over frames, pixel norms."""
    config = dict(base_channels=8, ch_mult=(1, 2), num_res_blocks=1, latent_channels=4, resolution=16)
    return coded(k, of=2, **config, mel_bins=k.size[1])


@entry("AutoencoderKLMiniMaxH3Audio", "audio", (116,), prompt="sample", dtype=torch.float32)
def minimax_h3_audio(k: Knobs) -> Spec:
    """Causal attention over 29 latents, then a vocoder of parallel dilated blocks. It casts to float32."""
    encoder = dict(encoder_dim=4, encoder_rates=(2, 2), latent_dim=24, latent_channels=6, num_attention_heads=3)
    decoder = dict(decoder_dim=16, decoder_rates=(2, 2), decoder_kernel_sizes=(4, 4), latents_mean=[0.0] * 6)
    blocks = dict(resblock_kernel_sizes=(3, 7), resblock_dilation_sizes=((1, 3), (1, 3)), latents_std=[1.0] * 6)
    return coded(k, of=1, **encoder, **decoder, **blocks)


@entry("AutoencoderSAME", "audio", (232,), prompt="sample")
def same(k: Knobs) -> Spec:
    """Patches of sound, resampled by transformers with differential attention in a sliding window."""
    config = dict(patch_size=4, encoder_channels=12, encoder_c_mults=(2,), encoder_strides=(2,), latent_dim=8)
    return coded(k, of=2, posterior=False, **config, encoder_transformer_depths=(2,), dim_heads=8, ff_mult=2)


@entry("Cosmos3AVAEAudioTokenizer", "audio", (116,), prompt="sample", dtype=torch.float32)
def cosmos3_audio(k: Knobs) -> Spec:
    """Complex spectra in, waveforms out. Spectra are of float32."""
    encoder = dict(enc_dim=4, enc_num_blocks=1, enc_n_fft=8, enc_hop_length=2, enc_latent_dim=8, enc_c_mults=(1,))
    decoder = dict(vocoder_input_dim=4, dec_dim=4, dec_c_mults=(1, 2), dec_strides=(2, 2), hop_size=4)
    return coded(k, of=2, **encoder, **decoder, enc_strides=(2,), sampling_rate=16)


@entry("MMAudioVAE", "audio", (232,), prompt="sample", dtype=torch.float32)
def mmaudio(k: Knobs) -> Spec:
    """Sound in, log-mel spectrum out: layers that keep magnitudes, one attention. The spectrum is of float32."""
    config = dict(mel_bins=6, latent_channels=4, hidden_channels=8, channel_multipliers=(1, 2), layers_per_block=1)

    def inputs(d: Draw) -> dict[str, Any]:
        sound = d.randn(k.batch, *k.size) * 0.2
        return dict(sample=sound, sample_posterior=False, return_dict=False)

    return dict(**config, sample_rate=64, n_fft=16, hop_length=4), inputs


@entry("MMAudioVocoder", "audio", (29,), prompt="mel")
def mmaudio_vocoder(k: Knobs) -> Spec:
    """BigVGAN: every activation is taken at twice the rate."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(mel=d.randn(k.batch, 6, *k.size), return_dict=False)

    config = dict(num_mels=6, upsample_initial_channel=16, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4))
    return dict(**config, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),)), inputs


@entry("MiniMaxMusic3Vocoder", "audio", (29,), prompt="latents")
def minimax_music3(k: Knobs) -> Spec:
    """Two channels of sound as two rows of the batch."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(latents=d.randn(k.batch, 8, *k.size))

    return dict(latent_channels=8, decoder_input_dim=12, decoder_hidden_dim=16, upsampling_ratios=(4, 2)), inputs


def acestep(**more: Any) -> dict[str, Any]:
    heads = dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8, sliding_window=2)
    return dict(hidden_size=24, intermediate_size=40, audio_acoustic_hidden_dim=10, **heads, **more)


@entry("AceStepAudioTokenizer", "audio", (29,), prompt="hidden_states")
def acestep_tokenizer(k: Knobs) -> Spec:
    """Windows of 5 latents become one of few codes each, which is given as well. Codes are of float32."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(hidden_states=d.randn(k.batch, *k.size, 5, 10))

    return acestep(fsq_dim=24, fsq_input_levels=[8, 5, 5]), inputs


@entry("AceStepAudioTokenDetokenizer", "audio", (29,), prompt="hidden_states")
def acestep_detokenizer(k: Knobs) -> Spec:
    """Every code becomes a window of 5 latents."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(hidden_states=d.randn(k.batch, *k.size, 24))

    return acestep(), inputs


@entry("RFD4ProteinaAutoencoder", "other", (31,), prompt="z_latent")
def proteina_decoder(k: Knobs) -> Spec:
    """Its forward is the decoder's: residues and atoms from latents and alpha carbons. Coordinates are of float32."""
    kinds, residues = 7, 11

    def inputs(d: Draw) -> dict[str, Any]:
        positions = torch.arange(k.tokens).expand(k.batch, -1)
        return dict(
            z_latent=d.randn(k.batch, k.tokens, 4),
            ca_coors_nm=d.randn(k.batch, k.tokens, 3),
            padding_mask=d.mask(k.batch, k.tokens, torch.bool),
            token_type=d.integers(kinds, k.batch, k.tokens),
            conditioning=dict(
                is_in_context_conditioning=positions % 5 == 1,
                supports_local_latent=positions % 3 != 2,
            ),
            return_dict=False,
        )

    config = dict(
        atom37_mask=[[(i + j) % 3 != 0 for j in range(37)] for i in range(residues)],
        allowed_residue_types=[[(i + j) % 4 != 0 for j in range(residues)] for i in range(kinds)],
        latent_dim=4,
        n_residue_types=residues,
        nlayers=2,
        token_dim=36,
        nheads=3,
        dim_cond=16,
        pair_repr_dim=12,
        token_type_emb_dim=8,
    )
    return config, inputs
