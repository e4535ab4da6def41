"""A sampler of first order on virtual ranks, each with latents of its own, as ranks have them under a plan with
``steps``; and STADI written out by hand, patch by patch, for the little U-Net of ``tests.test_displaced``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpar
from fastpar.backends.simulate import PerRank
from fastpar.run.build import build
from fastpar.run.meeting import cycle, members
from fastpar.run.steps import Stepping


def time(t: float, batch: int = 1) -> Tensor:
    return torch.full((batch, 1), t).double()


def stepped(x: Tensor, velocity: Tensor, now: float, following: float) -> Tensor:
    """Euler's step."""
    return x + (following - now) * velocity


def alone(model: Any, x: Tensor, times: Sequence[float], further: Sequence[Tensor] = ()) -> Tensor:
    """What one device samples."""
    for now, following in zip(times, times[1:], strict=False):
        x = stepped(x, model(x, time(now, len(x)), *further), now, following)
    return x


def virtually(model: Any, plan: str, x: Tensor, times: Sequence[float], further: Sequence[Tensor] = ()) -> list[Tensor]:
    """What every one of the plan's ranks has at the end."""
    recorded = fastpar.capture(model, (x, time(times[0], len(x)), *further)).programs[0]
    built = build(recorded.program, plan)
    stepping = Stepping(built)
    views = [x] * built.mesh.ranks
    for now, following in zip(times, times[1:], strict=False):
        given = iter([PerRank(tuple(views)), time(now, len(x)), *further])
        args = [next(given) if i.kind == "user" else arg
                for i, arg in zip(recorded.program.inputs, recorded.args, strict=True)]  # fmt: skip
        views = [stepped(v, out[0], now, following) for v, out in zip(views, stepping(args), strict=True)]
        if stepping.ends_cycle or following == times[-1]:
            views = stepping.gather(views)
    return views


def by_hand(
    model: Any, x: Tensor, times: Sequence[float], parts: Sequence[int], strides: Sequence[int], warmup: int, gn: str,
    groups: int,
) -> Tensor:  # fmt: skip
    """STADI: behind the warm-up patch i runs the model in every ``strides[i]``-th step, and takes of every other patch
    what that had in its last run, as far as both have run the model at the same step since."""
    cuts = [0]
    for part in parts:
        cuts.append(cuts[-1] + part)
    patches, weights = range(len(parts)), [part / sum(parts) for part in parts]
    views = [x] * len(parts)
    published: dict[str, list[Any]] = {}  # of every patch, what it had in its last run
    seen: list[dict[str, list[Any]]] = [{} for _ in patches]  # and what each patch knows of that
    outputs: list[Any] = [None] * len(parts)

    def run(t: float, waits: bool) -> dict[str, list[Any]]:
        had: dict[str, list[Any]] = {}

        def around(name: str, own: list[Tensor]) -> list[Tensor]:
            had[name] = own
            others = [own if waits else seen[i][name] for i in patches]
            return [torch.cat([own[j] if j == i else others[i][j] for j in patches], 2) for i in patches]

        def convolved(layer: Any, whole: list[Tensor]) -> list[Tensor]:
            return [layer(one)[:, :, a:b] for one, a, b in zip(whole, cuts, cuts[1:], strict=False)]

        h = [p + model.time(time(t))[:, :, None, None] for p in convolved(model.inward, views)]
        grouped = [p.unflatten(1, (groups, -1)) for p in h]
        means = had["means"] = [torch.stack([g.mean((2, 3, 4)), g.square().mean((2, 3, 4))]) for g in grouped]
        normed = []
        for i, g in enumerate(grouped):
            terms = means if waits else [means[j] if j == i else seen[i]["means"][j] for j in patches]
            m = sum(w * term for w, term in zip(weights, terms, strict=True))
            if not waits and gn == "separate":
                m = means[i]
            elif not waits and gn == "corrected":
                before = published["means"][i]
                m = m + weights[i] * (before - means[i]) + means[i] - before
            variance = m[1] - m[0].square()
            variance = torch.where(variance < 0, means[i][1] - means[i][0].square(), variance)
            g = (g - m[0][:, :, None, None, None]) / (variance[:, :, None, None, None] + 1e-5).sqrt()
            normed.append(F.silu(g.flatten(1, 2)))
        h = convolved(model.middle, around("middle", normed))
        q, k, v = zip(*(model.qkv(p.permute(0, 2, 3, 1)).unflatten(3, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5) for p in h),
                      strict=True)  # fmt: skip
        attended = []
        for query, keys, values, count in zip(q, around("k", list(k)), around("v", list(v)), parts, strict=True):
            y = F.scaled_dot_product_attention(query.flatten(2, 3), keys.flatten(2, 3), values.flatten(2, 3))
            attended.append(y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (count, -1)))
        out = convolved(model.outward, around("out", [a + b for a, b in zip(h, attended, strict=True)]))
        had["y"] = around("y", out)
        had["y"], had["whole"] = out, had["y"]
        return had

    for number, (now, following) in enumerate(zip(times, times[1:], strict=False)):
        turn = number - warmup
        step = turn % cycle(strides)
        who = members(strides, step) if turn >= 0 else tuple(patches)
        for i in who if turn >= 0 else ():
            for name, had in published.items():
                of = seen[i].setdefault(name, list(had))
                seen[i][name] = [had[j] if j in who else of[j] for j in patches]
        had = run(now, turn < 0)
        for i in who:
            outputs[i] = had["whole"][i]
            for name, values in had.items():
                published.setdefault(name, list(values))[i] = values[i]
        views = [stepped(v, out, now, following) for v, out in zip(views, outputs, strict=True)]
        if turn >= 0 and (step == cycle(strides) - 1 or following == times[-1]):
            whole = torch.cat([v[:, :, a:b] for v, a, b in zip(views, cuts, cuts[1:], strict=False)], 2)
            views = [whole] * len(parts)
    return views[0]
