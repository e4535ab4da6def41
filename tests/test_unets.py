"""U-Nets, autoencoders and ControlNets of diffusers, tiny and unmodified: exact, and split along their rows throughout.

Their attentions, where they have any, are in the middle; most of the work is at full resolution before and after, and
is split too: down-sampling, up-sampling, pads and norms keep rows where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import fastpar

torch.set_num_threads(1)

Made = tuple[torch.nn.Module, dict[str, Any]]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def unet_2d() -> Made:
    model = diffusers.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4)  # fmt: skip
    return model, {"sample": random(1, 3, 16, 16), "timestep": number(3)}


def unet_2d_condition() -> Made:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4)  # fmt: skip
    return model, {"sample": random(2, 4, 16, 16), "timestep": number(3), "encoder_hidden_states": random(2, 5, 8)}


def unet_spatio_temporal() -> Made:
    model = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), num_attention_heads=(2, 4), layers_per_block=1, sample_size=16, in_channels=8,
        out_channels=4, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
        projection_class_embeddings_input_dim=24, addition_time_embed_dim=8)  # fmt: skip
    return model, {"sample": random(1, 2, 8, 16, 16), "timestep": number(3), "encoder_hidden_states": random(1, 1, 8),
                   "added_time_ids": random(1, 3)}  # fmt: skip


def unet_1d() -> Made:
    model = diffusers.UNet1DModel(
        block_out_channels=(8, 8, 16), in_channels=4, out_channels=4, time_embedding_type="positional",
        use_timestep_embedding=True, out_block_type="OutConv1DBlock", flip_sin_to_cos=False, freq_shift=1.0,
        mid_block_type="MidResTemporalBlock1D", down_block_types=("DownResnetBlock1D",) * 3,
        up_block_types=("UpResnetBlock1D",) * 2, act_fn="swish")  # fmt: skip
    return model, {"sample": random(1, 4, 48), "timestep": random(1)}


def autoencoder_kl() -> Made:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
    return model, {"sample": random(1, 3, 16, 16)}


def autoencoder_vq() -> Made:
    model = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=4)  # fmt: skip
    return model, {"sample": random(1, 3, 16, 16)}


def autoencoder_hunyuan_video() -> Made:
    model = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4)  # fmt: skip
    return model, {"sample": random(1, 3, 9, 16, 16)}


def autoencoder_cogvideox() -> Made:
    model = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2)  # fmt: skip
    return model, {"sample": random(1, 3, 5, 16, 16)}


def controlnet() -> Made:
    model = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 8))  # fmt: skip
    return model, {"sample": random(1, 4, 16, 16), "timestep": number(3), "encoder_hidden_states": random(1, 5, 8),
                   "controlnet_cond": random(1, 3, 32, 32)}  # fmt: skip


QUICK = (unet_2d_condition, unet_1d, autoencoder_kl, autoencoder_hunyuan_video)
SLOW = (unet_2d, unet_spatio_temporal, autoencoder_vq, autoencoder_cogvideox, controlnet)


@pytest.mark.parametrize("plan", ["gather=3", pytest.param("ulysses=2,ring=2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW)])
def test_exact_and_split_along_rows(make: Callable[[], Made], plan: str) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    report = fastpar.verify(model.double().eval().requires_grad_(False), inputs, plan=plan)
    assert report.ok, report.diverged_at
    assert not report.fallbacks, report.fallbacks
    # 16 rows on 3 ranks, and 2 at the bottom of a deep one: sizes that do not divide cost more than they do in earnest
    assert report.attainable_share < 0.36
    assert report.flops_share < 1.45 * report.attainable_share
