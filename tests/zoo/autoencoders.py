"""Autoencoders of images: encoded, the mode of the posterior, decoded, in one forward. Sizes are pixels."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def coded(k: Knobs, *, of: int = 3, posterior: bool = True, **config: Any) -> Spec:
    """An autoencoder of [batch, of, *size]. One with a posterior takes its mode: noise would not be the same."""

    def inputs(d: Draw) -> dict[str, Any]:
        more = dict(sample_posterior=False) if posterior else {}
        return dict(sample=d.randn(k.batch, of, *k.size), return_dict=False, **more)

    return config, inputs


def halved(blocks: str = "DownEncoderBlock2D", up: str = "UpDecoderBlock2D", levels: int = 2) -> dict[str, Any]:
    return dict(down_block_types=(blocks,) * levels, up_block_types=(up,) * levels)


@entry("AutoencoderKL", "image", (14, 22), prompt="sample")
def kl(k: Knobs) -> Spec:
    """Stable Diffusion's: attention of one head over the latents."""
    return coded(k, **halved(), block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4)


@entry("AutoencoderKL/deep", "image", (24, 40), prompt="sample", batch=1)
def kl_deep(k: Knobs) -> Spec:
    """Four levels, as released; no convolutions around the latents, as in SD3 and FLUX.1."""
    config = dict(block_out_channels=(8, 8, 8, 16), latent_channels=4, norm_num_groups=4, use_quant_conv=False)
    return coded(k, **halved(levels=4), **config, use_post_quant_conv=False)


@entry("AutoencoderKLFlux2", "image", (14, 22), prompt="sample")
def kl_flux2(k: Knobs) -> Spec:
    """FLUX.2's: the decoder has widths of its own."""
    config = dict(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1)
    return coded(k, **halved(), **config, decoder_block_out_channels=(8, 24))


@entry("AsymmetricAutoencoderKL", "image", (14, 22), prompt="sample")
def kl_asymmetric(k: Knobs) -> Spec:
    """A decoder that is larger than the encoder, without the mask that it may be conditioned by."""
    config = dict(down_block_out_channels=(8, 16), up_block_out_channels=(8, 24), layers_per_up_block=2)
    return coded(k, **halved(), **config, latent_channels=4, norm_num_groups=4, sample_size=16)


@entry("AsymmetricAutoencoderKL/inpaint", "image", (24, 40), prompt="mask", batch=1)
def kl_asymmetric_inpaint(k: Knobs) -> Spec:
    """The decoder mixes features of the unmasked image in at every level, which fits four levels only."""
    widths = dict(down_block_out_channels=(4, 8, 8, 8), up_block_out_channels=(4, 8, 16, 16))
    config, plain = coded(k, **halved(levels=4), **widths, latent_channels=4, norm_num_groups=4, sample_size=16)

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(**plain(d), mask=d.randn(k.batch, 1, *k.size).gt(0).to(d.dtype))

    return config, inputs


@entry("AutoencoderTiny", "image", (14, 22), prompt="sample", dtype=torch.float32)
def tiny(k: Knobs) -> Spec:
    """Latents are bytes in between, which come back as float32."""
    config = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    return coded(k, posterior=False, **config, num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))


@entry("AutoencoderDC", "image", (14, 22), prompt="sample")
def dc(k: Knobs) -> Spec:
    """DC-AE: linear attention of float32 at several scales, pixel shuffles with shortcuts of averaged channels."""
    config = dict(latent_channels=4, attention_head_dim=4, scaling_factor=0.4, **multiscale())
    return coded(k, posterior=False, **config)


def multiscale() -> dict[str, Any]:
    config: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        config[f"{half}_block_types"] = ("ResBlock", "EfficientViTBlock")
        config[f"{half}_block_out_channels"] = (8, 16)
        config[f"{half}_layers_per_block"] = (1, 1)
        config[f"{half}_qkv_multiscales"] = ((), (5,))
    return config


@entry("AutoencoderDC/interpolated", "image", (14, 22), prompt="sample")
def dc_interpolated(k: Knobs) -> Spec:
    """DC-AE as Sana has it: strided convolutions down, nearest neighbours up."""
    config = dict(latent_channels=4, attention_head_dim=4, scaling_factor=0.4, **multiscale())
    return coded(k, posterior=False, **config, downsample_block_type="conv", upsample_block_type="interpolate")


@entry("VQModel", "image", (14, 22), prompt="sample")
def vq(k: Knobs) -> Spec:
    """Latents are replaced by the nearest of a codebook."""
    config = dict(block_out_channels=(8, 16), latent_channels=3, norm_num_groups=4, num_vq_embeddings=24)
    return coded(k, posterior=False, **halved(), **config)


@entry("VQModel/spatial", "image", (14, 22), prompt="sample")
def vq_spatial(k: Knobs) -> Spec:
    """MoVQ of Kandinsky 2: the decoder's norms are modulated by the latents at each level's size; 32 groups."""
    config = dict(block_out_channels=(32, 32), latent_channels=4, num_vq_embeddings=24)
    return coded(k, posterior=False, **halved(up="AttnUpDecoderBlock2D"), **config, norm_type="spatial")


@entry("AutoencoderKLHunyuanImage", "image", (14, 22), prompt="sample")
def kl_hunyuan_image(k: Knobs) -> Spec:
    """Pixels are folded into channels and back, with shortcuts; norms of 32 groups."""
    config = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1)
    return coded(k, **config, spatial_compression_ratio=2, sample_size=16)


@entry("AutoencoderKLKVAE", "image", (14, 22), prompt="sample")
def kl_kvae(k: Knobs) -> Spec:
    """Kandinsky 5's: the decoder's norms are modulated by the latents; norms of 32 groups."""
    return coded(k, channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1), sample_size=16)


@entry("AutoencoderRAE", "image", (42, 54), prompt="sample")
def rae(k: Knobs) -> Spec:
    """A vision transformer's tokens are the latents, another one decodes them. Images become squares first."""
    encoder = dict(encoder_hidden_size=192, encoder_num_hidden_layers=1, encoder_patch_size=14, encoder_input_size=70)
    decoder = dict(decoder_hidden_size=36, decoder_num_hidden_layers=2, decoder_num_attention_heads=3)
    return coded(k, posterior=False, **encoder, **decoder, patch_size=3, decoder_intermediate_size=48)


@entry("ConsistencyDecoderVAE", "image", (14, 22), prompt="sample")
def consistency(k: Knobs) -> Spec:
    """A U-Net decodes from noise in two steps, conditioned by the latents."""
    encoder = dict(encoder_block_out_channels=(8, 16), encoder_down_block_types=("DownEncoderBlock2D",) * 2)
    decoder = dict(decoder_block_out_channels=(8, 16), decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2)
    groups = dict(encoder_norm_num_groups=4, decoder_norm_num_groups=4, encoder_layers_per_block=1)
    blocks = dict(decoder_layers_per_block=1, decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2)
    config, plain = coded(k, **encoder, **decoder, **groups, **blocks)

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(**plain(d), generator=torch.Generator().manual_seed(3))

    return config, inputs
