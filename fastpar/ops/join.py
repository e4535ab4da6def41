"""``fastpar::join``: what a rank holds in several values becomes one, nothing moves.

The values hold different rows, along one dimension, of the same tensor: heads of an output that came from
different ranks at different times. In which order they belong depends on the rank, so the layouts say it, and
``localise`` writes a concatenation. On one rank with whole tensors every value is the whole one already.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define("join(Tensor[] xs, str[] srcs, str dst, int dim) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.impl("join", lambda xs, srcs, dst, dim: xs[0].clone(), "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::join", lambda xs, srcs, dst, dim: torch.empty_like(xs[0]), lib=_LIB)

join = torch.ops.fastpar.join.default


def join_order(srcs: Sequence[Layout], dst: Layout, dim: int, mesh: Mesh, rank: int) -> list[int]:
    """Which of the values stand one after the other along ``dim`` to give ``dst`` on ``rank``; those without rows
    are left out, unless none has any. Raises ValueError where they do not give it."""
    held = [src.dims[dim].rows(mesh, rank) for src in srcs]
    order = sorted((i for i, rows in enumerate(held) if len(rows)), key=lambda i: int(held[i][0]))
    rows = np.concatenate([held[i] for i in order]) if order else np.zeros(0, dtype=np.int64)
    fits = np.array_equal(rows, dst.dims[dim].rows(mesh, rank))
    for src in srcs:
        for d, (have, want) in enumerate(zip(src.dims, dst.dims, strict=True)):
            fits &= d == dim or np.array_equal(have.rows(mesh, rank), want.rows(mesh, rank))
    if not fits:
        raise ValueError(f"rank {rank}: {', '.join(map(str, srcs))} along {dim} do not make up {dst}")
    return order or [0]


def join_across(
    xs: Sequence[Sequence[torch.Tensor]], srcs: Sequence[Layout], dst: Layout, dim: int, mesh: Mesh
) -> list[torch.Tensor]:
    """N-rank meaning: ``xs[value][rank]`` to one result per rank."""
    orders = [join_order(srcs, dst, dim, mesh, rank) for rank in range(mesh.ranks)]
    return [torch.cat([xs[i][rank] for i in order], dim) for rank, order in enumerate(orders)]
