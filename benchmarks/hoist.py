"""What hoisting leaves out of a sampler's steps: FLOPs, bytes and collectives at real sizes, seconds at a small one.

``python -m benchmarks.hoist`` plans published configurations on fake tensors (nothing is run), and times calls of a
small PixArt on this machine's CPU with and without the pass ``hoist``, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.real_size import flux

Made = tuple[Any, dict[str, Any]]


def pixart() -> Made:
    """PixArt-alpha XL at 1024 pixels: 4096 tokens, 120 of a prompt."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=128, num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
        cross_attention_dim=1152, caption_channels=4096, patch_size=2, norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 128, 128),
        "encoder_hidden_states": torch.randn(1, 120, 4096),
        "encoder_attention_mask": torch.ones(1, 120),
        "timestep": torch.ones(1),
        "added_cond_kwargs": {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)},
    }
    return model, inputs


def wan() -> Made:
    """Wan 2.1 T2V 14B, 81 frames of 832 x 480: 32760 tokens, 512 of a prompt."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(), {
        "hidden_states": torch.randn(1, 16, 21, 60, 104),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "timestep": torch.ones(1),
    }


def hunyuan() -> Made:
    """HunyuanVideo 13B, 61 frames of 544 x 960, with a refiner of its 256 prompt tokens: 32640 tokens."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(), {
        "hidden_states": torch.randn(1, 16, 16, 68, 120),
        "encoder_hidden_states": torch.randn(1, 256, 4096),
        "encoder_attention_mask": torch.ones(1, 256),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
    }


def sdxl() -> Made:
    """The U-Net of SDXL at 1024 pixels, 77 tokens of a prompt."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(1, 4, 128, 128),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)},
    }
    return model, inputs


MODELS: dict[str, tuple[Callable[[], Made], str]] = {
    "PixArt-alpha XL": (pixart, "ulysses=8"),
    "Wan 2.1 14B": (wan, "ulysses=8"),
    "HunyuanVideo": (hunyuan, "ulysses=8"),
    "FLUX.1": (lambda: flux(None, None, 4096, 512), "ulysses=8"),
    "SDXL U-Net": (sdxl, "ulysses=1"),
}


def planned(name: str) -> dict[str, Any]:
    """What ``explain`` says of one model at its real size."""
    import fastpar

    make, plan = MODELS[name]
    torch._dynamo.reset()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            model, inputs = make()
    finally:
        torch.set_default_dtype(torch.float32)
    model = model.eval().requires_grad_(False)
    report = fastpar.explain(model, {**inputs, "return_dict": False}, plan=plan, verify_structure=False)
    once = report.hoisted
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plan": plan,
        "first_call": {
            "flops_share": report.flops_share,
            "bytes": report.bytes_per_rank,
            "collectives": sum(c.count for c in report.collectives),
        },
        "later_calls": {
            "flops_share": report.step_flops_share,
            "bytes": report.step_bytes_per_rank,
            "collectives": report.step_collectives,
        },
        "saved_of_the_rank_s_flops": once.flops_share / report.flops_share,
        "hoisted": dataclasses.asdict(once),
        "left_in_the_step": [n for n in report.notes if str(n).startswith("hoist:")],
    }


def measured(steps: int = 30, tokens: int = 300) -> dict[str, Any]:
    """CPU seconds of a call of a small PixArt on one thread, with and without ``hoist``; two prompts per step."""
    from diffusers import PixArtTransformer2DModel

    import fastpar
    from fastpar.core.plan import Plan
    from fastpar.plan.expand import pipeline_text

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        sample_size=32, num_layers=8, num_attention_heads=8, attention_head_dim=32, in_channels=4, out_channels=8,
        cross_attention_dim=256, caption_channels=512, patch_size=2, norm_type="ada_norm_single",
        norm_elementwise_affine=False, use_additional_conditions=False,
    ).eval().requires_grad_(False)  # fmt: skip
    prompts = [torch.randn(1, tokens, 512) for _ in range(2)]
    text = pipeline_text(Plan.parse("ulysses=1"))
    took: dict[str, list[float]] = {}
    runs: dict[str, Any] = {}
    for name, passes in (("with", text), ("without", text.removesuffix(",hoist"))):
        torch._dynamo.reset()
        runs[name] = torch.compile(model, backend="fastpar", options={"plan": "ulysses=1", "passes": passes})
        runs[name](torch.randn(1, 4, 32, 32), prompts[0], torch.ones(1), return_dict=False)  # compiles
        took[name] = []
    with torch.no_grad(), fastpar.generation():
        for step in range(steps + 1):
            x, t = torch.randn(1, 4, 32, 32), torch.full((1,), 1000.0 - step)
            results = {}
            for prompt in prompts:
                for name, run in runs.items():  # in turns: what else the machine does hits both
                    begin = time.thread_time()  # of this one thread: a busy machine does not count
                    (results[name],) = run(x, prompt, t, return_dict=False)
                    if step:  # the first step computes what the others use
                        took[name].append(time.thread_time() - begin)
                assert torch.equal(results["with"], results["without"])
    medians = {name: statistics.median(times) for name, times in took.items()}
    return {"model": "small PixArt, 256 tokens", "prompt_tokens": tokens, "calls": 2 * steps,
            "cpu_seconds_per_call": medians, "ratio": medians["with"] / medians["without"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"measured": measured(), "planned": []}
    small = results["measured"]
    seconds = ", ".join(f"{took:.4f} {name}" for name, took in small["cpu_seconds_per_call"].items())
    print(f"{small['model']}: CPU seconds per call {seconds}: {small['ratio']:.3f} times", flush=True)
    for name in args.only:
        found = planned(name)
        results["planned"].append(found)
        first, later, once = found["first_call"], found["later_calls"], found["hoisted"]
        print(
            f"{name}, {found['plan']}: {found['saved_of_the_rank_s_flops']:.2%} of a rank's FLOPs, "
            f"{first['bytes'] - later['bytes']:,} of {first['bytes']:,} bytes, "
            f"{once['collectives']} of {first['collectives']} collectives once; "
            f"{once['kept_bytes'] / 1e6:.1f} MB kept, {once['checked_bytes'] / 1e6:.1f} MB checked",
            flush=True,
        )
    if args.out:
        from fastpar.core.record import write

        write(args.out, results)


if __name__ == "__main__":
    main()
