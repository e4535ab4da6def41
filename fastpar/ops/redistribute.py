"""``fastpar::redistribute``: a value changes its layout (stage *sharded*).

Abstract: it names the two layouts and leaves the messages to ``lower``. On one rank,
with whole tensors, it is the identity, which keeps every dumped program runnable.
``across`` is its meaning on N ranks, written independently of the transfer algebra
(assemble the global tensor, then take rows), so that one checks the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define("redistribute(Tensor x, str src, str dst) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.impl("redistribute", lambda x, src, dst: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::redistribute", lambda x, src, dst: torch.empty_like(x), lib=_LIB)

redistribute = torch.ops.fastpar.redistribute.default


def assemble(locals_: Sequence[torch.Tensor], layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """Global value as every rank would reconstruct it: reduced over partial axes, rows put in place.

    Ranks that differ only along axes that ``layout`` does not use reconstruct it from their own
    replica, so a replica that went astray shows.
    """
    for entry in layout.partial:
        groups = [mesh.group(r, entry.axes) for r in range(mesh.ranks)]
        locals_ = [reduce(_REDUCE[entry.op], [locals_[m] for m in group]) for group in groups]
    axes = mesh.ordered(layout.axes)
    split = mesh.ordered(layout.split_axes)
    out: list[torch.Tensor | None] = [None] * mesh.ranks
    for rank in range(mesh.ranks):
        first = mesh.group(rank, axes)[0]
        if out[first] is not None:
            out[rank] = out[first]
            continue
        whole = locals_[rank].new_empty(layout.shape)
        for member in mesh.group(first, split):
            index = [torch.from_numpy(d.rows(mesh, member).copy()).to(whole.device) for d in layout.dims]
            whole[torch.meshgrid(*index, indexing="ij") if index else ...] = locals_[member]
        out[rank] = out[first] = whole
    return [x for x in out if x is not None]


def take(whole: torch.Tensor, layout: Layout, mesh: Mesh, rank: int) -> torch.Tensor:
    """The rows of ``whole`` that ``rank`` holds under ``layout`` (nothing partial)."""
    for d, dim in enumerate(layout.dims):
        if not dim.is_whole:
            rows = torch.from_numpy(dim.rows(mesh, rank).copy()).to(whole.device)
            whole = whole.index_select(d, rows)
    return whole


def across(
    locals_: Sequence[torch.Tensor], src: Layout, dst: Layout, mesh: Mesh
) -> list[torch.Tensor]:
    """What the N ranks hold afterwards."""
    whole = assemble(locals_, src, mesh)
    return [take(whole[rank], dst, mesh, rank).contiguous() for rank in range(mesh.ranks)]


_REDUCE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
