"""Nearest-neighbour up-sampling of split rows by nearly a whole factor: rows repeated, and few of them left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.rules import Call
from fastpar.rules.resample import runs

Written = Callable[..., Any]
aten = torch.ops.aten


def nearest(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """Repetition keeps rows where they are, and so does taking slices of them."""
    kept = {}
    for d, dim in enumerate(layouts[0].summed().dims[2:], 2):
        if dim.is_whole or call.shape[d] % call.shapes[0][d] == 0:
            continue
        found = runs(call, d)
        if found is None:
            return None
        kept[d] = found
    if not kept:
        return None

    def written(x: torch.Tensor, size: Any, *rest: Any, **more: Any) -> torch.Tensor:
        wide = [-(-n // x.shape[d]) * x.shape[d] if d in kept else n for d, n in enumerate(size, 2)]
        x = torch.ops.fastpar.resample.default(x, wide, *rest, **more)
        for d, ranges in kept.items():
            x = aten.cat.default([aten.slice.Tensor(x, d, a, b) for a, b in ranges], d)
        return x

    return written


TABLE: dict[str, Callable[[Call, Sequence[Layout], Mesh], Written | None]] = {"fastpar::resample": nearest}
