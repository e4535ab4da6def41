"""What lossy plans do to images: the demo's trained model, sampled with the same noise on one device and on N ranks.

``python -m benchmarks.quality``: 512 digits per plan, no GPU; the ranks are virtual, their programs are those of real
ones. Beside every lossy plan stand the exact ones, whose differences are the floor of everything here: float32's
rounding through 20 steps for the drift, and another draw of the noise for the Fréchet distance.

- *Drift* from the one-device sample: relative 2-norm over all images, and PSNR (peak to peak 2).
- *Fréchet distance* (Heusel et al. 2017) between Gaussians fitted to features, here of a small classifier that is
  trained on the same digits first (a minute), and how many of the images it takes for the digit that was asked for.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train_digits import digits
from fastpar.backends.simulate import PerRank
from fastpar.core.plan import Plan
from fastpar.core.record import write
from fastpar.demo.model import load_digits
from fastpar.demo.sampler import guided_inputs, initial_noise, sample, schedule_of
from fastpar.graph.capture import capture, compile_fx
from fastpar.graph.program import Program
from fastpar.run.build import build
from fastpar.run.compare import same_bits
from fastpar.run.steps import Stepping

PLANS = (
    "ulysses=4",
    "ring=4",
    "ulysses=4,fp8(v)",
    "ulysses=4,fp8(qvo)",
    "ulysses=4,fp8(qkvo)",
    "ring=4,fp8(v)",
    "ring=4,fp8(kv)",
    "ulysses=2,ring=2,fp8(qvo)",
    "gather=4,fp8(kv)",
    "gather=4,displaced(warmup=1)",
    "gather=4,displaced(warmup=4)",
    "gather=4,displaced(warmup=10)",
    "gather=4,displaced(warmup=4,gn=none)",
    "gather=4,displaced(warmup=4),steps(1:1:1:2)",
    "gather=4,displaced(warmup=4),steps(1:1:2:2)",
    "gather=4,displaced(warmup=4),steps(2:2:2:2)",
    "naive=4",
)
BATCH = 128


class Classifier(nn.Module):
    """Two convolutions and a layer of 64 features, of which the ten digits are read."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def train(seed: int = 0, epochs: int = 40) -> tuple[Classifier, float]:
    """The classifier, and its accuracy on a fifth of the digits that it was not trained on."""
    torch.manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(images))
    test, rest = order[: len(images) // 5], order[len(images) // 5 :]
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for at in rest[torch.randperm(len(rest))].split(64):
            noisy = images[at] + 0.1 * torch.randn_like(images[at])
            loss = F.cross_entropy(model(noisy), labels[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    return model, float((model(images[test]).argmax(-1) == labels[test]).float().mean())


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of features ``[count, features]``."""
    a, b = a.double(), b.double()
    one, two = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum() + one.trace() + two.trace() - 2 * cross
    return max(0.0, float(apart))  # of equal sets it is 0 up to rounding


def on_ranks(model: nn.Module, plan: str) -> tuple[nn.Module, Callable[[], None]]:
    """``model`` on the plan's virtual ranks, which raises where their bits differ; and what begins a sampling run."""
    running: list[Stepping] = []

    def backend(gm: Any, example: Sequence[Any]) -> Any:
        def finish(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
            stepping = Stepping(build(program, plan))
            running.append(stepping)

            def run(args: list[Any]) -> Sequence[Any]:
                results = stepping(list(args))
                assert all(same_bits(r[0], results[0][0]) for r in results), "ranks differ"
                return results[0]

            return run

        return compile_fx(gm, example, finish)

    def restart() -> None:
        for stepping in running:
            stepping.restart()

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=False), restart  # type: ignore[return-value]


def draw(sampler: Callable[[Tensor, int], Tensor], count: int, seed: int) -> Tensor:
    """``count`` digits 0, 1, ..., 9, 0, ...: every batch has a seed of its own, and is a sampling run."""
    labels = torch.arange(count) % 10
    starts = range(0, count, BATCH)
    return torch.cat([sampler(labels[start : start + BATCH], seed + start) for start in starts])


def sampler(model: nn.Module, plan: str) -> Callable[[Tensor, int], Tensor]:
    """What samples ``(labels, seed)`` on the plan's virtual ranks."""
    if Plan.parse(plan).steps:
        return Apart(model, plan).sample
    ranks, restart = on_ranks(model, plan)

    def drawn(labels: Tensor, seed: int) -> Tensor:
        restart()
        return sample(ranks, labels, seed)

    return drawn


class Apart:
    """``model`` on virtual ranks that step their own rows (``steps``), as ``fastpar.demo.sampler.sample`` does it."""

    def __init__(self, model: nn.Module, plan: str) -> None:
        self.model, self.plan = model, plan
        self.stepping: dict[int, tuple[Stepping, Sequence[Any], list[str]]] = {}  # by batch

    def _on_ranks(self, inputs: dict[str, Any], batch: int) -> tuple[Stepping, Sequence[Any], list[str]]:
        if batch not in self.stepping:
            [recorded] = capture(self.model, inputs).programs
            names = [i.name if i.kind == "user" else "" for i in recorded.program.inputs]
            self.stepping[batch] = Stepping(build(recorded.program, self.plan)), recorded.args, names
        return self.stepping[batch]

    @torch.no_grad()
    def sample(self, labels: Tensor, seed: int, steps: int = 20, guidance: float = 2.0) -> Tensor:
        schedule = schedule_of(steps)
        noise = initial_noise(len(labels), seed)
        stepping, args, names = self._on_ranks(guided_inputs(noise, schedule.timesteps[0], labels), len(labels))
        stepping.restart()
        views = [noise] * stepping.built.mesh.ranks
        for i, now in enumerate(schedule.timesteps):
            each = [guided_inputs(view, now, labels) for view in views]
            given = [PerRank(tuple(one[name] for one in each)) if name else arg
                     for name, arg in zip(names, args, strict=True)]  # fmt: skip
            outs = [result[0].chunk(2) for result in stepping(given)]
            views = [schedule.step(free + guidance * (asked - free), now, view).prev_sample
                     for view, (asked, free) in zip(views, outs, strict=True)]  # fmt: skip
            if stepping.ends_cycle or i == steps - 1:
                views = stepping.gather(views)
        assert all(same_bits(view, views[0]) for view in views), "ranks differ"
        return views[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=512, help="images per plan (default: %(default)s)")
    parser.add_argument("--plans", nargs="*", default=PLANS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, (classifier, accuracy) = load_digits(), train()
    real, _ = digits()
    labels = torch.arange(args.count) % 10
    alone: Callable[[Tensor, int], Tensor] = lambda labels, seed: sample(model, labels, seed)  # noqa: E731
    one = draw(alone, args.count, 0)
    features = classifier.trunk(one)

    def row(name: str, images: Tensor, seconds: float, same_noise: bool = True) -> dict[str, Any]:
        found = classifier.trunk(images)
        out: dict[str, Any] = {"plan": name}
        if same_noise:
            apart = images - one
            off = float(apart.norm() / one.norm())
            rms = float(apart.square().mean().sqrt())
            out |= {"drift": off, "psnr": round(20 * math.log10(2 / rms), 2) if rms else None}
        out |= {"frechet_to_one_device": round(frechet(found, features), 4)}
        out |= {"frechet_to_data": round(frechet(found, classifier.trunk(real)), 4)}
        out |= {"as_asked": round(float((classifier(images).argmax(-1) == labels).float().mean()), 4)}
        print({**out, "seconds": round(seconds, 1)}, flush=True)
        return out

    about = {"images": args.count, "steps": 20, "guidance": 2.0, "classifier_accuracy": round(accuracy, 4)}
    begin = time.perf_counter()
    other = draw(alone, args.count, 10**6)
    rows = [row("one device", one, 0.0), row("one device, other noise", other, time.perf_counter() - begin, False)]
    for plan in args.plans:
        begin = time.perf_counter()
        images = draw(sampler(model, plan), args.count, 0)
        rows.append(row(plan, images, time.perf_counter() - begin))
        write(args.out, {**about, "plans": rows})  # what is there is kept, if the rest takes too long


if __name__ == "__main__":
    main()
