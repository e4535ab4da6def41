"""Train the small class-conditional DiT of ``fastpar demo`` on scikit-learn's handwritten digits.

    python benchmarks/train_digits.py                  # about 12 minutes on one CPU thread
    python benchmarks/train_digits.py --iterations 10  # a fixed length: the run is then reproducible

The 1,797 images of 8x8 are bundled with scikit-learn, so nothing is downloaded. The model is diffusers'
``DiTTransformer2DModel`` itself: the demo must show an unmodified model, not one written for it. It learns
the velocity (Salimans and Ho 2022) of a cosine schedule, with the label dropped for 10% of the samples, which
is what classifier-free guidance needs.

Written: the averaged weights as safetensors (configuration and settings in its metadata) and, beside it under
the same name, the configuration as diffusers' JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "fastpar" / "demo" / "digits.safetensors"

CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "dropout": 0.0,
    "sample_size": 16,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,  # label 10 is the null label
}
SETTINGS: dict[str, Any] = {
    "schedule": "squaredcos_cap_v2",
    "prediction": "v_prediction",
    "train_timesteps": 1000,
    "null_label": 10,
    "label_drop": 0.1,
    "batch": 64,
    "lr": 2e-3,  # the setting that matters most: 1e-3 is clearly worse
    "betas": [0.9, 0.99],
    "weight_decay": 0.01,
    "warmup": 200,
    "clip": 1.0,
    "ema": 0.998,
}


def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 16, 16]`` in about -1..1 (bicubic overshoots a little) and labels ``[1797]``."""
    bunch: Any = load_digits()
    small = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)) / 8 - 1
    images = F.interpolate(small[:, None], size=(16, 16), mode="bicubic", align_corners=False)
    return images, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def build() -> Any:
    """The untrained model, with every modulation and the output at zero, so that blocks start as identity."""
    model: Any = DiTTransformer2DModel(**CONFIG)
    for block in model.transformer_blocks:
        _zero(block.norm1.linear)
    _zero(model.proj_out_1)
    _zero(model.proj_out_2)
    # Training mode would drop labels in every block on its own, whereas guidance needs a sample without any
    # label: labels are dropped below instead, once per sample, and the model stays in evaluation mode.
    return model.eval()


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def batches(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches for ever; the last, smaller one of an epoch is left out."""
    while True:
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) // size * size].split(size):
            yield images[index], labels[index]


def learning_rate(iteration: int, progress: float) -> float:
    """Linear warm-up over ``warmup`` iterations times a cosine over ``progress`` in 0..1."""
    warm = min(1.0, (iteration + 1) / SETTINGS["warmup"])
    return float(SETTINGS["lr"] * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(minutes: float, iterations: int | None, seed: int) -> tuple[Any, dict[str, Any]]:
    """Train until ``minutes`` are over, or for ``iterations`` where that is given.

    Returns the averaged model and what was measured: iterations, seconds and the last running loss.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(SETTINGS["ema"]))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=SETTINGS["lr"],
        betas=tuple(SETTINGS["betas"]),
        weight_decay=SETTINGS["weight_decay"],
    )
    schedule: Any = DDPMScheduler(
        num_train_timesteps=SETTINGS["train_timesteps"],
        beta_schedule=SETTINGS["schedule"],
        prediction_type=SETTINGS["prediction"],
    )
    loader = batches(*digits(), size=SETTINGS["batch"], generator=generator)
    start, iteration, running, progress = time.monotonic(), 0, math.nan, 0.0
    while progress < 1:
        images, labels = next(loader)
        noise = torch.randn(images.shape, generator=generator)
        times = torch.randint(0, SETTINGS["train_timesteps"], (len(images),), generator=generator)
        dropped = torch.rand(len(labels), generator=generator) < SETTINGS["label_drop"]
        labels = labels.masked_fill(dropped, SETTINGS["null_label"])

        noisy = schedule.add_noise(images, noise, times)
        velocity = schedule.get_velocity(images, noise, times)
        loss = F.mse_loss(model(noisy, timestep=times, class_labels=labels).sample, velocity)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["clip"])
        optimizer.step()
        average.update_parameters(model)

        iteration += 1
        running = loss.item() if math.isnan(running) else 0.99 * running + 0.01 * loss.item()
        elapsed = time.monotonic() - start
        progress = iteration / iterations if iterations else elapsed / (60 * minutes)
        if iteration % 20 == 0 or progress >= 1:
            rate = iteration / elapsed
            done = f"{100 * min(1.0, progress):5.1f}%"
            print(f"\r{done}  iteration {iteration}  loss {running:.4f}  {rate:.1f} it/s", end="", flush=True)
    print()
    measured = {
        "iterations": iteration,
        "seconds": round(time.monotonic() - start),
        "loss": round(running, 5),
    }
    return average.module, measured


def save(model: Any, out: Path, measured: dict[str, Any]) -> None:
    """Write ``out`` (safetensors) and the configuration beside it (``.json``)."""
    config = model.to_json_string()
    metadata = {
        "config": config,
        "training": json.dumps({**SETTINGS, **measured}),
        "data": "sklearn digits, 16x16",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out, metadata=metadata)
    out.chmod(0o644)  # safetensors leaves it readable by its owner alone
    out.with_suffix(".json").write_text(config, encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, {measured['iterations']} iterations")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="training time (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=None, help="train this many iterations instead")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the safetensors file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, order and noise (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, measured = train(args.minutes, args.iterations, args.seed)
    save(model, args.out, {**measured, "seed": args.seed})


if __name__ == "__main__":
    main()
