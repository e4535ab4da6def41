"""What prepares conditions for a denoiser: adapters, projections, encoders of prompts; and up-scalers of latents."""

from __future__ import annotations

from typing import Any

import torch

from .registry import UNAVAILABLE, Draw, Knobs, Spec, entry

UNAVAILABLE["ControlNetXSAdapter"] = (
    "no forward of its own (ValueError: A ControlNetXSAdapter cannot be run by itself. Use it together with a "
    "UNet2DConditionModel to instantiate a UNetControlNetXSModel.): the case of UNetControlNetXSModel has its blocks"
)
UNAVAILABLE["MotionAdapter"] = "a container, whose forward returns nothing: the case of UNetMotionModel has its modules"
UNAVAILABLE["CosmosControlNetModel"] = (
    "NameError: name 'transforms' is not defined (torchvision resizes the padding mask)"
)


def adapter(k: Knobs, kind: str) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(x=d.randn(k.batch, 3, *k.size))

    config = dict(channels=[8, 12, 16], num_res_blocks=1, downscale_factor=2, adapter_type=kind)
    return config, inputs


@entry("T2IAdapter", "image", (28, 20), prompt="x", fixed=("size",))
def t2i(k: Knobs) -> Spec:
    """A picture, its pixels shuffled into channels, encoded at every scale of a U-Net."""
    return adapter(k, "full_adapter")


@entry("T2IAdapter/xl", "image", (28, 20), prompt="x", fixed=("size",))
def t2i_xl(k: Knobs) -> Spec:
    return adapter(k, "full_adapter_xl")


@entry("T2IAdapter/light", "image", (28, 20), prompt="x", fixed=("size",))
def t2i_light(k: Knobs) -> Spec:
    return adapter(k, "light_adapter")


@entry("MultiAdapter", "image", (28, 20), prompt="xs", fixed=("size",))
def multi_adapter(k: Knobs) -> Spec:
    """Two pictures; the features of each scale are added with weights."""
    config, _ = adapter(k, "full_adapter")
    assert isinstance(config, dict)

    def build() -> torch.nn.Module:
        import diffusers

        return diffusers.MultiAdapter([diffusers.T2IAdapter(**config) for _ in range(2)])

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(xs=[d.randn(k.batch, 3, *k.size) for _ in range(2)], adapter_weights=[0.7, 0.4])

    return build, inputs


@entry("CLIPImageProjection", "image", (1,), prompt="x")
def clip_projection(k: Knobs) -> Spec:
    """One embedding per picture."""
    return dict(hidden_size=20), lambda d: dict(x=d.randn(k.batch, 20))


@entry("ReduxImageEncoder", "image", (31,), prompt="x")
def redux(k: Knobs) -> Spec:
    """FLUX Redux: SigLIP's tokens become the prompt's."""
    return dict(redux_dim=12, txt_in_features=20), lambda d: dict(x=d.randn(k.batch, k.tokens, 12))


@entry("Ideogram4PromptEnhancerHead", "image", (31,), prompt="hidden_states")
def enhancer_head(k: Knobs) -> Spec:
    """The logits of a language model."""
    return dict(hidden_size=20, vocab_size=53), lambda d: dict(hidden_states=d.randn(k.batch, k.tokens, 20))


@entry("UniDiffuserTextDecoder", "image", (31,), prompt="prefix_embeds")
def text_decoder(k: Knobs) -> Spec:
    """GPT-2 after a prefix of `text` embeddings, both of which may be masked."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            input_ids=d.integers(53, k.batch, k.tokens),
            prefix_embeds=d.randn(k.batch, k.text, 20),
            attention_mask=d.mask(k.batch, k.text + k.tokens),
        )

    config = dict(
        prefix_length=k.text,
        prefix_inner_dim=20,
        prefix_hidden_dim=12,
        vocab_size=53,
        n_positions=k.text + k.tokens,
        n_embd=36,
        n_layer=2,
        n_head=3,
        use_cache=False,
    )
    return config, inputs


@entry("AnimaTextConditioner", "image", (31,), prompt="source_hidden_states")
def anima(k: Knobs) -> Spec:
    """Token ids attend to a language model's states (`text`), both masked, and are padded to a fixed length."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            source_hidden_states=d.randn(k.batch, k.text, 20),
            target_input_ids=d.integers(53, k.batch, k.tokens),
            target_attention_mask=d.mask(k.batch, k.tokens),
            source_attention_mask=d.mask(k.batch, k.text),
        )

    config = dict(
        source_dim=20,
        target_dim=24,
        model_dim=36,
        num_layers=2,
        num_attention_heads=3,
        target_vocab_size=53,
        min_sequence_length=k.tokens + 6,
    )
    return config, inputs


@entry("AudioLDM2ProjectionModel", "audio", (31,), prompt="hidden_states")
def audioldm2_projection(k: Knobs) -> Spec:
    """CLAP's tokens (`text`) and VITS', with learned positions and learned tokens around each."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.text, 12),
            hidden_states_1=d.randn(k.batch, k.tokens, 20),
            attention_mask=d.mask(k.batch, k.text),
            attention_mask_1=d.mask(k.batch, k.tokens),
        )

    config = dict(
        text_encoder_dim=12,
        text_encoder_1_dim=20,
        langauge_model_dim=24,
        use_learned_position_embedding=True,
        max_seq_length=k.tokens,
    )
    return config, inputs


@entry("StableAudioProjectionModel", "audio", (31,), prompt="text_hidden_states")
def stable_audio_projection(k: Knobs) -> Spec:
    """The prompt, and the seconds of beginning and end."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            text_hidden_states=d.randn(k.batch, k.tokens, 12),
            start_seconds=d.times(k.batch, 40.0),
            end_seconds=d.times(k.batch, 60.0),
        )

    return dict(text_encoder_dim=12, conditioning_dim=20, min_value=0, max_value=512), inputs


@entry("StableAudio3DurationEmbedder", "audio", (1,), prompt="seconds")
def duration(k: Knobs) -> Spec:
    """One number per sample, in float32 until the last layer."""
    return dict(output_dim=20, fourier_dim=16), lambda d: dict(seconds=d.times(k.batch, 60.0))


@entry("MiniMaxMusic3ConditionEncoder", "audio", (31,), prompt="hidden_states")
def minimax_condition(k: Knobs) -> Spec:
    """States of several layers, weighed, convolved and resampled from 25 to about 86 per second."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(hidden_states=d.randn(k.batch, k.tokens, 3 * 12))

    return dict(condition_hidden_dim=12, num_condition_layers=3, out_dim=20), inputs


@entry("AceStepConditionEncoder", "audio", (31,), prompt="lyric_hidden_states")
def ace_step_condition(k: Knobs) -> Spec:
    """Lyrics and sounds to imitate through transformers with sliding windows; what is masked is sorted to the end."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            text_hidden_states=d.randn(k.batch, k.text, 20),
            text_attention_mask=d.mask(k.batch, k.text),
            lyric_hidden_states=d.randn(k.batch, k.tokens, 20),
            lyric_attention_mask=d.mask(k.batch, k.tokens),
            refer_audio_acoustic_hidden_states_packed=d.randn(k.batch + 1, 11, 12),
            refer_audio_order_mask=torch.tensor([*range(k.batch), k.batch - 1]),
        )

    config = dict(
        hidden_size=36,
        intermediate_size=48,
        text_hidden_dim=20,
        timbre_hidden_dim=12,
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        sliding_window=5,
    )
    return config, inputs


def upscaler(k: Knobs, scale: int) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(latents=d.randn(k.batch, 4, *k.size), scale=scale, return_dict=False)

    config = dict(
        in_channels=4,
        stage_channels=(16, 12, 8),
        num_pre_blocks=1,
        num_mid_blocks=1,
        num_post_blocks=1,
        num_x2_adapter_blocks=1,
    )
    return config, inputs


@entry("Kandinsky6SRLatentUpscalerBank", "video", (3, 7, 5), prompt="latents")
def upscaler_4(k: Knobs) -> Spec:
    return upscaler(k, 4)


@entry("Kandinsky6SRLatentUpscalerBank/double", "video", (3, 7, 5), prompt="latents")
def upscaler_2(k: Knobs) -> Spec:
    """The model for a factor of two has another branch."""
    return upscaler(k, 2)


@entry("LTX2VideoDiffusionDecoderModel", "video", (3, 5, 5), prompt="z")
def ltx2_decoder(k: Knobs) -> Spec:
    """Pixels denoised in one step, with attention to neighbours in space and time. The forward draws the noise."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(z=d.randn(k.batch, 4, *k.size), generator=torch.Generator().manual_seed(3), return_dict=False)

    config = dict(
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(48, 24, 24),
        decoder_stage_depths=(1, 1, 1),
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3)),
        decoder_upsample_strides=((1, 2, 2), (2, 1, 1)),
        decoder_upsample_channel_reductions=(2, 1),
        decoder_stage5_kernel=(3, 5, 5),
        decoder_t_emb_dim=16,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )
    return config, inputs
