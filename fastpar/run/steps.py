"""Steps of a sampling run on virtual ranks: what displaced plans carry from one to the next, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastpar.backends.simulate import PerRank, carried, run_local
from fastpar.graph.check import check_order
from fastpar.graph.program import Program
from fastpar.ops.moments import moments
from fastpar.ops.redistribute import across, take
from fastpar.passes.displace import AXIS
from fastpar.run.build import Built
from fastpar.run.compare import difference
from fastpar.run.meeting import Members, cycle, here_of, meeting, members, rows_like

APART = 0.01  # how far the step before is for ``sensitivity``, of the inputs' root mean square
_SEED = 0


def settles(built: Built) -> bool:
    """Whether a displaced program computes the model's function once the inputs stay the same: unless it has norms
    that look at the own rows only."""
    displaced = built.plan.displaced
    own = displaced is not None and displaced.gn in ("separate", "none")
    return not (own and any(node.target is moments for node in built.lowered.graph.nodes))


class Stepping:
    """Calls of one program in a row, on all ranks: the first ones, and those that take what the last one kept.

    With strides per rank, a rank that is not to run the model has its last outputs again.
    """

    def __init__(self, built: Built) -> None:
        ranks = range(built.mesh.ranks)
        displaced = built.plan.displaced
        self.steady = [built.localise(r) for r in ranks]
        self.first = [built.first.localise(r) for r in ranks] if built.first is not None else self.steady
        self.warmup = 0 if displaced is None else max(1, displaced.warmup)
        self.built, self.strides = built, built.plan.steps
        self.meetings: dict[Members, list[Program]] = {}
        self.restart()

    def restart(self) -> None:
        """Another sampling run begins."""
        self.calls = 0
        self.kept: list[PerRank] = []
        self.came: list[PerRank] | None = None
        self.results: list[tuple[Any, ...]] = []

    def __call__(self, args: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Outputs of every rank. An argument of which each rank has its own is a ``PerRank``."""
        turn = self.calls - self.warmup
        self.calls += 1
        if turn >= 0 and self.strides and not members(self.strides, turn % cycle(self.strides)):
            return self._of_the_caller(self.results)
        programs = self.steady if turn >= 0 else self.first
        given = [*args]
        if turn >= 0 and self.strides:
            given += self._met(turn)
        elif turn >= 0:
            given += self.kept
        results = run_local(programs, given)
        if turn >= 0 and self.strides:
            who = members(self.strides, turn % cycle(self.strides))
            results = [new if here_of(r, self.built.mesh) in who else old
                       for r, (new, old) in enumerate(zip(results, self.results, strict=True))]  # fmt: skip
        self.results = results
        if programs[0].carries:
            self.kept = carried(programs[0], results)
        return self._of_the_caller(results)

    def _of_the_caller(self, results: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [r[: len(self.steady[0].results)] for r in results]

    def _met(self, turn: int) -> list[PerRank]:
        """What came for every rank of those that run the model now, and the terms of its own last call."""
        who = members(self.strides, turn % cycle(self.strides))
        mesh = self.built.mesh
        if who not in self.meetings:
            self.meetings[who] = [meeting(self.built.lowered, mesh, r, who) for r in range(mesh.ranks)]
            check_order([p for r, p in enumerate(self.meetings[who]) if here_of(r, mesh) in who])
        count = len(self.meetings[who][0].placeholders) // 2
        nothing = [PerRank((torch.empty(0),) * mesh.ranks)] * count
        came = run_local(self.meetings[who], [*self.kept[:count], *(self.came or nothing)])
        self.came = [PerRank(values) for values in zip(*came, strict=True)]
        return [*self.came, *self.kept[count:]]

    @property
    def ends_cycle(self) -> bool:
        """Whether all ranks have come to the same step with the last call."""
        turns = self.calls - self.warmup
        return bool(self.strides) and turns > 0 and turns % cycle(self.strides) == 0

    def gather(self, latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All ranks' latents, each rank's own rows in their place, on every rank."""
        if not self.strides or AXIS not in self.built.mesh.names:
            return list(latents)
        src, dst = rows_like(self.built.lowered.gm.meta["rows"], latents[0].shape)
        mesh = self.built.mesh
        own = [take(x, src, mesh, rank).contiguous() for rank, x in enumerate(latents)]
        return list(across(own, src, dst, mesh))


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
    stepping = Stepping(built)
    stepping.warmup = 1
    with torch.no_grad():
        eager = built.captured.gm(*before)
        stepping(before)
        results = stepping(args)
    pairs = [(difference(results[0][i], x)[1], difference(eager[i], x)[1])
             for i, x in enumerate(exact) if isinstance(x, torch.Tensor) and x.is_floating_point()]  # fmt: skip
    if not pairs:
        return []
    off, apart = max(pairs)
    return [f"displaced: after a step whose sample was {APART:.0%} apart, which moves eager's outputs by {apart:.1e}, "
            f"outputs are off by {off:.1e} (relative)"]  # fmt: skip
