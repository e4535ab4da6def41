"""Autoencoders of videos. Sizes are frames and pixels; causal ones take one frame more than they fold."""

from __future__ import annotations

from typing import Any

import torch

from .autoencoders import coded, halved
from .registry import Draw, Knobs, Spec, entry

LTX_BLOCKS = ("LTXVideoDownBlock3D",) * 2
LTX95_BLOCKS = ("LTXVideo095DownBlock3D",) * 2
LTX2_BLOCKS = ("LTX2VideoDownBlock3D",) * 2
TILED = ("enable_tiling",)


@entry("AutoencoderKLTemporalDecoder", "video", (5, 14, 22), batch=1, prompt="sample")
def temporal_decoder(k: Knobs) -> Spec:
    """Stable Video Diffusion's: frames are encoded as a batch of images, decoded with convolutions over time."""
    frames, *size = k.size
    config = dict(down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4)

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(sample=d.randn(k.batch * frames, 3, *size), num_frames=frames, return_dict=False)

    return config, inputs


@entry("AutoencoderKLCogVideoX", "video", (5, 20, 28), batch=1, prompt="sample")
def cogvideox(k: Knobs) -> Spec:
    """Causal convolutions with what the frames before left, norms modulated by the latents."""
    blocks = halved("CogVideoXDownBlock3D", "CogVideoXUpBlock3D", levels=3)
    return coded(k, **blocks, block_out_channels=(8,) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=2)


@entry("AutoencoderKLWan", "video", (5, 14, 22), batch=1, prompt="sample")
def wan_2_1(k: Knobs) -> Spec:
    """Wan 2.1's: frame by frame, or four by four, with a cache of the last two in every convolution."""
    return coded(k, base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])


@entry("AutoencoderKLWan/residual", "video", (5, 28, 44), batch=1, prompt="sample")
def wan_2_2(k: Knobs) -> Spec:
    """Wan 2.2's: pixels folded into channels first, shortcuts of averages and repeats around each level."""
    patches = dict(in_channels=12, out_channels=12, patch_size=2, decoder_base_dim=16, is_residual=True)
    config = dict(base_dim=8, z_dim=4, dim_mult=[2, 2], num_res_blocks=1, temperal_downsample=[True])
    return coded(k, **config, **patches)


@entry("AutoencoderKLQwenImage", "image", (1, 14, 22), prompt="sample")
def qwen_image(k: Knobs) -> Spec:
    """Wan's without time: one frame."""
    return coded(k, base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False])


@entry("AutoencoderKLQwenImage21", "image", (1, 14, 22), prompt="sample")
def qwen_image_21(k: Knobs) -> Spec:
    """Images with transparency, one frame, shortcuts around each level."""
    config = dict(base_dim=8, decoder_base_dim=16, z_dim=4, dim_mult=[2, 2], num_res_blocks=1)
    return coded(k, of=4, **config, temperal_downsample=[True])


@entry("AutoencoderKLLTXVideo", "video", (9, 28, 44), batch=1, prompt="sample")
def ltx(k: Knobs) -> Spec:
    """Patches of 2x2 pixels become channels; a causal encoder, a decoder that is not."""
    widths = dict(block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), latent_channels=8, patch_size=2)
    blocks = dict(layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), down_block_types=LTX_BLOCKS)
    halving = dict(spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False))
    more = dict(decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False,) * 2)
    return coded(k, **widths, **blocks, **halving, **more, upsample_factor=(1, 1))


@entry("AutoencoderKLLTXVideo/timestep", "video", (9, 28, 44), batch=1, prompt="temb")
def ltx_timestep(k: Knobs) -> Spec:
    """LTX 0.9.5's: averaged shortcuts, repeated channels, and a decoder that takes the time of its latents."""
    widths = dict(block_out_channels=(8, 16, 16), decoder_block_out_channels=(8, 16), latent_channels=8, patch_size=2)
    blocks = dict(layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), down_block_types=LTX95_BLOCKS)
    halving = dict(spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True))
    more = dict(decoder_inject_noise=(False,) * 3, downsample_type=("spatial", "temporal"))
    up = dict(upsample_residual=(True,) * 2, upsample_factor=(2, 2), timestep_conditioning=True)
    config, plain = coded(k, **widths, **blocks, **halving, **more, **up)

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(**plain(d), temb=d.times(k.batch, 0.1))

    return config, inputs


@entry("AutoencoderKLLTX2Video", "video", (9, 24, 40), batch=1, prompt="sample")
def ltx2(k: Knobs) -> Spec:
    """Spatial, then temporal folding; the decoder's rows are padded by reflection."""
    widths = dict(block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), latent_channels=8, patch_size=2)
    blocks = dict(layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), down_block_types=LTX2_BLOCKS)
    halving = dict(spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True))
    more = dict(decoder_inject_noise=(False,) * 3, downsample_type=("spatial", "spatiotemporal"))
    up = dict(upsample_residual=(True,) * 2, upsample_factor=(2, 2), upsample_type=("spatiotemporal", "spatial"))
    return coded(k, **widths, **blocks, **halving, **more, **up)


@entry("AutoencoderKLHunyuanVideo", "video", (5, 20, 28), batch=1, prompt="sample")
def hunyuan(k: Knobs) -> Spec:
    """Frames attend to the frames before them, in the middle."""
    blocks = halved("HunyuanVideoDownBlock3D", "HunyuanVideoUpBlock3D", levels=3)
    config = dict(block_out_channels=(8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4)
    return coded(k, **blocks, **config, spatial_compression_ratio=4)


def hunyuan_folded(k: Knobs) -> Spec:
    config = dict(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1)
    return coded(k, **config, spatial_compression_ratio=2, temporal_compression_ratio=2)


@entry("AutoencoderKLHunyuanVideo15", "video", (5, 14, 22), batch=1, prompt="sample")
def hunyuan_15(k: Knobs) -> Spec:
    """Pixels and frames are folded into channels and back, the first frame alone."""
    return hunyuan_folded(k)


@entry("AutoencoderKLHunyuanImageRefiner", "video", (5, 14, 22), batch=1, prompt="sample")
def hunyuan_refiner(k: Knobs) -> Spec:
    """As HunyuanVideo 1.5's."""
    return hunyuan_folded(k)


@entry("AutoencoderKLMochi", "video", (7, 16, 24), batch=1, prompt="sample", dtype=torch.float32)
def mochi(k: Knobs) -> Spec:
    """Fourier features of the pixels, four levels, attention over frames. The features are of float32."""
    config = dict(latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4)
    return coded(k, **config, layers_per_block=(1,) * 5)


@entry("AutoencoderKLAllegro", "video", (24, 20, 20), batch=1, prompt="sample", fixed=("batch", "size"), ready=TILED)
def allegro(k: Knobs) -> Spec:
    """Convolutions over space, then over time. It only runs tiled, in tiles of 24 frames; here one is the video."""
    blocks = halved("AllegroDownBlock3D", "AllegroUpBlock3D", levels=3)
    when = dict(temporal_downsample_blocks=(True, True, False), temporal_upsample_blocks=(False, True, True))
    config = dict(block_out_channels=(8,) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=2)
    return coded(k, **blocks, **when, **config, sample_size=k.size[1])


@entry("AutoencoderKLCosmos", "video", (9, 28, 44), batch=1, prompt="sample")
def cosmos(k: Knobs) -> Spec:
    """Haar wavelets, factorised causal convolutions, attention over space and over time at low resolution."""
    widths = dict(encoder_block_out_channels=(8, 16), decode_block_out_channels=(8, 16), latent_channels=4)
    sizes = dict(attention_resolutions=(16,), resolution=32, num_layers=1, patch_size=2)
    return coded(k, **widths, **sizes, spatial_compression_ratio=4, temporal_compression_ratio=4)


@entry("AutoencoderKLKVAEVideo", "video", (5, 14, 22), batch=1, prompt="sample")
def kvae_video(k: Knobs) -> Spec:
    """Segments of frames, each with what the ones before left in its convolutions and norms; norms of 32 groups."""
    config = dict(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, temporal_compress_times=2)
    return coded(k, **config)


@entry("AutoencoderKLMagvit", "video", (5, 14, 22), batch=1, prompt="sample")
def magvit(k: Knobs) -> Spec:
    """EasyAnimate's: norms over one frame at a time."""
    blocks = halved("SpatialTemporalDownBlock3D", "SpatialTemporalUpBlock3D")
    return coded(k, **blocks, block_out_channels=[8, 16], latent_channels=4, layers_per_block=1, norm_num_groups=4)


@entry("AutoencoderKLMiniMaxH3", "video", (10, 14, 22), batch=1, prompt="sample")
def minimax_h3(k: Knobs) -> Spec:
    """Clips of 5 frames are encoded by convolutions with reflected borders, decoded by a transformer, and blended."""
    encoder = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, clip_length=5, token_drop=1)
    folds = dict(spatial_downsample_factors=(2, 1), temporal_downsample_factors=(2, 1), latents_mean=(0.0,) * 4)
    decoder = dict(decoder_num_layers=2, decoder_num_attention_heads=3, decoder_attention_head_dim=8)
    more = dict(decoder_num_register_tokens=2, decoder_ffn_mult=2, latents_std=(1.0,) * 4, latent_channels=4)
    return coded(k, **encoder, **folds, **decoder, **more)


def vidtok(k: Knobs, **config: Any) -> Spec:
    levels = dict(spatial_ds=[0], spatial_us=[1], tempo_ds=[0], tempo_us=[1])
    return coded(k, ch=8, ch_mult=[1, 2], num_res_blocks=1, **levels, **config)


@entry("AutoencoderVidTok", "video", (5, 14, 22), batch=1, prompt="sample")
def vidtok_causal(k: Knobs) -> Spec:
    """Space and time apart, the past only."""
    return vidtok(k)


@entry("AutoencoderVidTok/discrete", "video", (16, 14, 22), batch=1, prompt="sample")
def vidtok_discrete(k: Knobs) -> Spec:
    """Latents are rounded to levels; future frames are seen."""
    quantised = dict(regularizer="fsq", z_channels=3, codebook_size=512, double_z=False)
    return vidtok(k, is_causal=False, **quantised)


@entry("Kandinsky6SRVAE", "video", (19, 14, 22), batch=1, prompt="sample")
def kandinsky6(k: Knobs) -> Spec:
    """Two segments of frames, the second with what the first left in its causal convolutions."""
    widths = dict(encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), latent_channels=4)
    return coded(k, **widths, layers_per_block=1, temporal_compression_ratio=2, temporal_compression_start_level=0)
