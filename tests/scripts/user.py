"""A user's script, started by torch's launcher: it compiles with a backend's name and imports nothing of fastpar.

    python -m torch.distributed.run --nproc-per-node=2 tests/scripts/user.py FOLDER TASK...

Every task is a function of this file. What it returns, or its error, is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

EAGER: list[str] = []
"""One entry for every time that a model ran as Python and not as compiled code."""
MESSAGES: list[str] = []
"""What the backend logged, on rank 0."""


class Block(nn.Module):
    """Attention over prompt and tokens, then a feed-forward, both modulated by the time."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.approximate = heads, "none"
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        y = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:])), approximate=self.approximate))


class Denoiser(nn.Module):
    """A small FLUX: images ``[B, C, H, W]`` in patches of 2 x 2, joint attention with a prompt ``[B, T, width]``."""

    def __init__(self, width: int = 24, heads: int = 3, channels: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 2, 2)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, channels * 4)
        self.register_buffer("frequencies", torch.exp(-torch.arange(width // 2) / width), persistent=False)

    def forward(self, image: Tensor, prompt: Tensor, step: int | Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            EAGER.append(type(self).__name__)
        angles = step * self.frequencies[None]
        time = torch.cat([angles.cos(), angles.sin()], dim=-1)
        x = self.patch(image)
        rows, columns = x.shape[2:]
        x = torch.cat([prompt, x.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x, time)
        x = self.head(x[:, prompt.shape[1] :]).unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def denoiser(**config: int) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(**config).eval().requires_grad_(False)


def inputs(height: int = 14, width: int = 22, step: int | Tensor = 500, seed: int = 0) -> tuple[Any, ...]:
    """77 tokens, and 7 of a prompt."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, height, width, generator=rng), torch.randn(2, 7, 24, generator=rng), step


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """Compiled anew, as in a new process. Without options the plan comes from FASTPAR_PLAN."""
    torch._dynamo.reset()
    return torch.compile(model, backend="fastpar", **({"options": options} if options else {}))


def differences(model: nn.Module, fast: Callable[..., Tensor], *calls: tuple[Any, ...]) -> dict[str, Any]:
    """The compiled model against the eager one over ``calls``, and how it ran."""
    worst, digests, compiles, ran_eagerly = 0.0, [], [], 0
    messages = len(MESSAGES)
    for args in calls:
        expected = model(*args)
        EAGER.clear()
        before = counters["stats"]["unique_graphs"]
        result = fast(*args)
        compiles.append(counters["stats"]["unique_graphs"] - before)
        ran_eagerly += len(EAGER)
        worst = max(worst, float((result - expected).abs().max() / expected.abs().max()))
        digests.append(hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest())
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, digests)
    return {
        "error": worst,
        "same_bits": all(d == every[0] for d in every),
        "ran_eagerly": ran_eagerly,
        "compiles": compiles,
        "messages": MESSAGES[messages:],
        "distinct": len(set(digests)),
    }


# -- tasks ----------------------------------------------------------------------------------------


def prompts() -> dict[str, Any]:
    """Another image and prompt; the plan is taken from the environment."""
    model = denoiser()
    return differences(model, compiled(model), inputs(), inputs(seed=1))


def gather() -> dict[str, Any]:
    model = denoiser()
    plan = f"gather={dist.get_world_size()}"
    return differences(model, compiled(model, plan=plan), inputs(), inputs(seed=1))


def speeds() -> dict[str, Any]:
    """The last rank is the fastest: three times as many rows as the others."""
    model, n = denoiser(), dist.get_world_size()
    plan = f"gather={n},speeds({':'.join(['1'] * (n - 1) + ['3'])})"
    return differences(model, compiled(model, plan=plan), inputs(), inputs(seed=1))


def windows() -> dict[str, Any]:
    """Convolutions between mirrored rows, pools and interpolation."""
    torch.manual_seed(0)
    down = [nn.ReflectionPad2d(1), nn.Conv2d(2, 8, 3), nn.SiLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)]
    up = [nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2, 1, ceil_mode=True), nn.Conv2d(8, 2, 3)]
    model = nn.Sequential(*down, *up).eval().requires_grad_(False)
    calls = [(torch.randn(1, 2, 14, 22, generator=torch.Generator().manual_seed(seed)),) for seed in (0, 1)]
    return differences(model, compiled(model), *calls)


def resolutions() -> dict[str, Any]:
    """Twenty resolutions, each twice."""
    model = denoiser(depth=1)
    sizes = [(2 * h, 2 * w) for h in (3, 4, 5, 6, 7) for w in (5, 7, 8, 9)]
    return differences(model, compiled(model), *(inputs(h, w) for h, w in sizes for _ in range(2)))


def steps() -> dict[str, Any]:
    """Fifty integer time steps as Python numbers, down to 1 and 0, then the same as tensors."""
    model = denoiser(depth=1)
    numbers = [999 - 20 * i for i in range(48)] + [1, 0]
    calls = [inputs(step=n) for n in numbers] + [inputs(step=torch.tensor(n)) for n in numbers]
    return differences(model, compiled(model), *calls)


def without_rows() -> dict[str, Any]:
    """A module that has nothing to split runs whole on every rank."""

    class Scale(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cos() * 2

    model = Scale()
    return differences(model, compiled(model), (torch.arange(6.0),))


def diffusers_model() -> dict[str, Any]:
    """diffusers' own DiT, unmodified."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    config = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 2, "num_layers": 2, "sample_size": 14}
    model = DiTTransformer2DModel(**config, num_embeds_ada_norm=10).eval().requires_grad_(False)
    fast = compiled(model)

    def call(seed: int) -> tuple[Any, ...]:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(2, 2, 14, 14, generator=rng), torch.tensor([9, 3]), torch.tensor([1, 7 - seed])

    def plain(m: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda x, t, labels: m(x, timestep=t, class_labels=labels, return_dict=False)[0]

    return differences(plain(model), plain(fast), call(0), call(1))  # type: ignore[arg-type]


def verify_and_dump() -> dict[str, Any]:
    """Every call is also run whole and compared; the graph after every pass lies in a folder per rank."""
    model = denoiser(depth=1)
    folder = Path(sys.argv[1], "dump")
    found = differences(model, compiled(model, verify=True, dump=str(folder)), inputs(), inputs(seed=1))
    mine = folder / f"rank{dist.get_rank()}"
    return {**found, "files": sorted(str(p.relative_to(mine)) for p in mine.rglob("*.*"))}


def inductor() -> dict[str, Any]:
    model = denoiser()
    plan = f"ulysses={dist.get_world_size()}"
    return differences(model, compiled(model, plan=plan, lowering="inductor"), inputs(), inputs(seed=1))


def other_shapes() -> None:
    fast = compiled(denoiser(depth=1))
    fast(*inputs(height=14 + 2 * dist.get_rank()))


def other_plans() -> None:
    name = "gather" if dist.get_rank() else "ulysses"
    compiled(denoiser(depth=1), plan=f"{name}={dist.get_world_size()}")(*inputs())


def other_code() -> None:
    """As after a deployment that reached one machine only."""
    model = denoiser(depth=1)
    if dist.get_rank():
        model.blocks[0].approximate = "tanh"  # type: ignore[assignment]
    compiled(model)(*inputs())


def other_noise() -> None:
    """Noise of a generator that is seeded with the rank, as it is where nobody seeds it."""
    compiled(denoiser(depth=1))(*inputs(seed=dist.get_rank()))


def other_weights() -> None:
    model = denoiser(depth=1)
    if dist.get_rank():
        next(model.parameters()).mul_(1.01)
    compiled(model)(*inputs())


def rounded_inputs() -> dict[str, Any]:
    """As a text encoder on another device would give them."""
    model, given = denoiser(), list(inputs())
    given[0] = given[0] * (1 + 1e-6 * dist.get_rank())
    return differences(model, compiled(model), tuple(given))


def fails_on_one_rank() -> None:
    fast = compiled(denoiser(depth=1), **({"plan": "ulises=2"} if dist.get_rank() else {}))
    fast(*inputs())


def after() -> dict[str, Any]:
    """Ranks that all raised can go on together."""
    return prompts()


def absent() -> None:
    """One rank never calls the model."""
    if dist.get_rank() == 0:
        with environment(FASTPAR_TIMEOUT="2"):
            compiled(denoiser(depth=1))(*inputs())


def stale() -> None:
    """One rank meets a new shape, the others run what they have. What raises ends the process, and the launch."""
    fast = compiled(denoiser(depth=1))
    fast(*inputs())
    with environment(FASTPAR_TIMEOUT="3"):
        try:
            fast(*inputs(height=14 + 4 * (dist.get_rank() == 1)))
        except Exception as error:
            print(f"rank {dist.get_rank()}: {describe(error)}", flush=True)
            os._exit(1)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def describe(error: BaseException) -> str:
    """The first line of what the backend raised, which Dynamo wraps."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {str(inner).splitlines()[0]}"


class Collect(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        MESSAGES.append(record.getMessage())


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("fastpar").setLevel(logging.INFO)
    logging.getLogger("fastpar").addHandler(Collect())
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results: dict[str, Any] = {}
    for name in sys.argv[2:]:
        dist.barrier()
        try:
            results[name] = globals()[name]()
        except Exception as error:
            results[name] = {"raised": describe(error)}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
