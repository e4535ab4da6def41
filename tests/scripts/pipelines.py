"""diffusers' own pipelines, with their denoiser (and decoder) compiled, beside the same ones in one process.

``torchrun ... -m tests.scripts.pipelines flux:ulysses=2 sd:cfg=2``: prints what each is off by, of all that is drawn.
``sd@gather=2,displaced`` is given to ``fastpar.parallelize``, others are compiled by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import diffusers
import torch
import torch.distributed as dist

import fastpar

torch.set_num_threads(1)
STEPS = 3
Drawn = tuple[Any, str, Callable[[], Any]]  # the pipeline, its denoiser's name, what it draws


def prompt(count: int = 2, width: int = 32) -> list[torch.Tensor]:
    """Embeddings in the place of text encoders."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 7, width, generator=generator) for _ in range(count)]


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def decoder() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def flux() -> Drawn:
    """Guidance is distilled: one call per step."""
    denoiser = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), decoder().eval(), None, None, None, None, denoiser.eval()
    )
    text, pooled = prompt()
    given = dict(prompt_embeds=text, pooled_prompt_embeds=pooled[:, 0], height=32, width=32, output_type="pt")
    return pipe, "transformer", lambda: pipe(num_inference_steps=STEPS, generator=noise(), **given).images


def sd() -> Drawn:
    """Guidance is a batch of two."""
    denoiser = diffusers.UNet2DConditionModel(
        sample_size=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(8, 16),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=32,
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = diffusers.StableDiffusionPipeline(
        decoder().eval(), None, None, denoiser.eval(), scheduler, None, None, requires_safety_checker=False
    )
    text, without = prompt()
    given = dict(prompt_embeds=text, negative_prompt_embeds=without, height=48, width=64, output_type="pt")
    return pipe, "unet", lambda: pipe(num_inference_steps=STEPS, generator=noise(), **given).images


def wan() -> Drawn:
    """Guidance is two calls per step."""
    denoiser = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    images = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = diffusers.WanPipeline(
        None, None, images.eval(), diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), denoiser.eval()
    )
    text, without = prompt()
    given = dict(prompt_embeds=text, negative_prompt_embeds=without, height=32, width=48, num_frames=5)
    return pipe, "transformer", lambda: pipe(
        num_inference_steps=STEPS, generator=noise(), guidance_scale=4.0, output_type="pt", **given
    ).frames


@torch.no_grad()
def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for asked in sys.argv[1:]:
        name, by, plan = re.split("([:@])", asked, maxsplit=1)
        torch._dynamo.reset()
        torch.manual_seed(0)
        pipe, denoiser, draw = globals()[name]()
        pipe.set_progress_bar_config(disable=True)
        expected = draw()
        rows = f"gather={dist.get_world_size()}" if name != "wan" else None  # whose decoder goes frame by frame
        if by == "@":
            assert fastpar.parallelize(pipe, plan, decoder=rows) is pipe
        else:
            options = {"plan": plan}
            setattr(pipe, denoiser, torch.compile(getattr(pipe, denoiser), backend="fastpar", options=options))
            if rows:
                pipe.vae.decode = torch.compile(pipe.vae.decode, backend="fastpar", options={"plan": rows})
        drawn = [draw(), draw()]
        assert expected.std() > 1e-3 and torch.equal(*drawn)
        off = (drawn[1] - expected).abs().max() / expected.abs().max()
        print(f"{asked}: off by {float(off):.1e} on rank {dist.get_rank()}\n", end="", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
