"""``fastpar::resample``: ``F.interpolate`` kept whole.

Left alone, nearest interpolation reaches ATen as index arithmetic (``arange``,
``mul``, ``_unsafe_index``) and bilinear as some 40 operators, in which a
sharding rule would have to recognise the resampling again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define(
    "resample(Tensor x, int[]? size, float[]? scales, str mode, bool? align_corners=None, "
    "bool antialias=False, bool? recompute=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def output_size(spatial: Sequence[int], size: Sequence[int] | None, scales: Sequence[float] | None) -> list[int]:
    """Spatial sizes of the result: ``size``, or the floor of each input size times its scale.

    Raises ``ValueError`` unless exactly one of both is given, with one number per dimension.
    """
    given = size if size is not None else scales
    if given is None or (size is not None and scales is not None):
        raise ValueError(f"resample takes exactly one of size and scales, got {size} and {scales}")
    if len(given) != len(spatial):
        raise ValueError(f"resample got {len(given)} sizes or scales for {len(spatial)} spatial dimensions")
    if size is not None:
        return list(size)
    assert scales is not None
    return [int(n * s) for n, s in zip(spatial, scales, strict=True)]


def _resample(
    x: torch.Tensor,
    size: Sequence[int] | None,
    scales: Sequence[float] | None,
    mode: str,
    align_corners: bool | None = None,
    antialias: bool = False,
    recompute: bool | None = None,
) -> torch.Tensor:
    shape = [*x.shape[:2], *output_size(x.shape[2:], size, scales)]
    if 0 in shape:
        return x.new_empty(shape)  # the kernels refuse empty tensors
    out = F.interpolate(
        x,
        size=list(size) if size is not None else None,
        scale_factor=list(scales) if scales is not None else None,
        mode=mode,
        align_corners=align_corners,
        recompute_scale_factor=recompute,
        antialias=antialias,
    )
    out = out.contiguous()
    return out.clone() if out.data_ptr() == x.data_ptr() else out


def _resample_fake(
    x: torch.Tensor,
    size: Sequence[int] | None,
    scales: Sequence[float] | None,
    mode: str,
    align_corners: bool | None = None,
    antialias: bool = False,
    recompute: bool | None = None,
) -> torch.Tensor:
    return x.new_empty([*x.shape[:2], *output_size(x.shape[2:], size, scales)])


_LIB.impl("resample", _resample, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::resample", _resample_fake, lib=_LIB)

resample = torch.ops.fastpar.resample.default


UPSAMPLE_OPS: dict[str, tuple[str, bool]] = {
    **{f"upsample_nearest{n}d": ("nearest", False) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": ("nearest-exact", False) for n in (1, 2, 3)},
    "upsample_linear1d": ("linear", True),
    "upsample_bilinear2d": ("bilinear", True),
    "upsample_bicubic2d": ("bicubic", True),
    "upsample_trilinear3d": ("trilinear", True),
    "_upsample_bilinear2d_aa": ("bilinear", True),
    "_upsample_bicubic2d_aa": ("bicubic", True),
}
"""Operators under ``F.interpolate``: name -> mode, and whether it has ``align_corners``."""


def from_upsample(name: str, shape: Sequence[int], x: Any, size: Any, *rest: Any) -> tuple[Any, ...] | None:
    """Arguments of ``resample`` for a positional call of one of ``UPSAMPLE_OPS`` on ``shape``.

    None where there is no counterpart: a size together with scales that are not the ratio of the sizes.
    """
    mode, corners = UPSAMPLE_OPS[name]
    align = bool(rest[0]) if corners else None
    scales = list(rest[1:] if corners else rest)
    if len(scales) == 1 and isinstance(scales[0], (list, tuple)):
        scales = list(scales[0])
    scales = [s for s in scales if s is not None]
    if size is None:
        return x, None, scales, mode, align, name.endswith("_aa")
    if scales and [n * s for n, s in zip(shape[2:], scales, strict=True)] != list(size):
        return None
    return x, list(size), None, mode, align, name.endswith("_aa")


def from_interpolate(
    x: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    spatial: int,
) -> tuple[Any, ...]:
    """Arguments of ``resample`` for those of ``F.interpolate`` on ``spatial`` spatial dimensions."""

    def per_dim(value: Any, kind: type) -> list[Any] | None:
        if value is None:
            return None
        values = value if isinstance(value, (list, tuple)) else [value] * spatial
        return [kind(v) for v in values]

    return (
        x,
        per_dim(size, int),
        per_dim(scale_factor, float),
        mode,
        align_corners,
        bool(antialias),
        recompute_scale_factor,
    )
