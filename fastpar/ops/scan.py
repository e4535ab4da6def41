"""Scans in pieces: what a running sum over split rows is made of (Blelloch's scan, one level deep).

``sizes`` cuts dimension ``dim`` into pieces, in order. On N ranks each has its own pieces, and a localised call
names only those.

| operator | result |
|---|---|
| ``scan_parts(x, dim, sizes)`` | running sums that start anew with each piece |
| ``part_ends(x, dim, sizes)`` | the last row of each piece, zero where it is empty: ``dim`` has one row per piece |
| ``part_expand(x, dim, sizes)`` | the inverse shape: row i as often as piece i has rows |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LIB = torch.library.Library("fastpar", "FRAGMENT")
for _name in ("scan_parts", "part_ends", "part_expand"):
    _LIB.define(f"{_name}(Tensor x, int dim, int[] sizes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _scan(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    return torch.cat([piece.cumsum(dim, dtype=x.dtype) for piece in x.split(list(sizes), dim)], dim)


def _ends(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    empty = torch.zeros_like(x.narrow(dim, 0, 1)) if x.shape[dim] else _shaped(x, dim, 1).zero_()
    pieces = x.split(list(sizes), dim)
    return torch.cat([p.narrow(dim, p.shape[dim] - 1, 1) if p.shape[dim] else empty for p in pieces], dim)


def _expand(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    return x.repeat_interleave(torch.tensor(list(sizes), device=x.device), dim, output_size=sum(sizes))


def _shaped(x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    return x.new_empty([size if d == dim else s for d, s in enumerate(x.shape)])


_LIB.impl("scan_parts", _scan, "CompositeExplicitAutograd")
_LIB.impl("part_ends", _ends, "CompositeExplicitAutograd")
_LIB.impl("part_expand", _expand, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::scan_parts", lambda x, dim, sizes: torch.empty_like(x), lib=_LIB)
torch.library.register_fake("fastpar::part_ends", lambda x, dim, sizes: _shaped(x, dim, len(sizes)), lib=_LIB)
torch.library.register_fake("fastpar::part_expand", lambda x, dim, sizes: _shaped(x, dim, sum(sizes)), lib=_LIB)

scan_parts = torch.ops.fastpar.scan_parts.default
part_ends = torch.ops.fastpar.part_ends.default
part_expand = torch.ops.fastpar.part_expand.default
