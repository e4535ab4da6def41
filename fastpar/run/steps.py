"""Steps of a sampling run on virtual ranks: what displaced plans carry from one to the next, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastpar.backends.simulate import PerRank, carried, run_local
from fastpar.ops.moments import moments
from fastpar.run.build import Built
from fastpar.run.compare import difference

APART = 0.01  # how far the step before is for ``sensitivity``, of the inputs' root mean square
_SEED = 0


def settles(built: Built) -> bool:
    """Whether a displaced program computes the model's function once the inputs stay the same: unless it has norms
    that look at the own rows only."""
    displaced = built.plan.displaced
    own = displaced is not None and displaced.gn in ("separate", "none")
    return not (own and any(node.target is moments for node in built.lowered.graph.nodes))


class Stepping:
    """Calls of one program in a row, on all ranks: the first ones, and those that take what the last one kept."""

    def __init__(self, built: Built) -> None:
        ranks = range(built.mesh.ranks)
        displaced = built.plan.displaced
        self.steady = [built.localise(r) for r in ranks]
        self.first = [built.first.localise(r) for r in ranks] if built.first is not None else self.steady
        self.warmup = 0 if displaced is None else max(1, displaced.warmup)
        self.restart()

    def restart(self) -> None:
        """Another sampling run begins."""
        self.calls = 0
        self.kept: list[PerRank] = []

    def __call__(self, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Outputs of every rank."""
        steady = self.calls >= self.warmup
        programs = self.steady if steady else self.first
        results = run_local(programs, [*args, *self.kept] if steady else args)
        if programs[0].carries:
            self.kept = carried(programs[0], results)
        self.calls += 1
        return [r[: len(programs[0].results)] for r in results]


def sensitivity(built: Built, args: Sequence[Any], exact: Sequence[Any]) -> list[str]:
    """What the outputs are off by where the step before had other inputs, beside what that moves eager's."""
    assert built.first is not None
    varying = built.lowered.gm.meta.get("varying", ())
    generator = torch.Generator().manual_seed(_SEED)

    def moved(value: Any, name: str) -> Any:
        if name not in varying or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        return value + APART * noise * value.double().square().mean().sqrt().to(value)

    before = [moved(a, i.name) for a, i in zip(args, built.captured.inputs, strict=True)]
    ranks = range(built.mesh.ranks)
    with torch.no_grad():
        eager = built.captured.gm(*before)
        first, steady = ([b.localise(r) for r in ranks] for b in (built.first, built))
        results = run_local(steady, [*args, *carried(first[0], run_local(first, before))])
    pairs = [(difference(results[0][i], x)[1], difference(eager[i], x)[1])
             for i, x in enumerate(exact) if isinstance(x, torch.Tensor) and x.is_floating_point()]  # fmt: skip
    if not pairs:
        return []
    off, apart = max(pairs)
    return [f"displaced: after a step whose sample was {APART:.0%} apart, which moves eager's outputs by {apart:.1e}, "
            f"outputs are off by {off:.1e} (relative)"]  # fmt: skip
