"""Spatial operators over split rows, written as those that have halos: convolutions, rows put in front and behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.rules import Call

aten = torch.ops.aten
Written = Callable[..., Any]


def _split(layout: Layout, leading: int) -> bool:
    """Whether a dimension behind the leading ones is split."""
    return any(not d.is_whole for d in layout.summed().dims[leading:])


def per_dim(given: Sequence[int], spatial: int) -> list[int]:
    """One number for every spatial dimension, where one stands for all."""
    return list(given) * spatial if len(given) == 1 else list(given)


def transposed(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """A transposed convolution of stride s as s interleaved ordinary ones (sub-pixel convolution, Shi et al. 2016).

    Output row u = q s + r, counted before padding is cut away, is the sum over j of x[q - j] w[r + j s]: for each of
    the s phases r a convolution with every s-th tap. All phases are one convolution with s times the channels, whose
    rows are then put between each other, which is a view. A kernel that is no multiple of s is filled up with zeros.
    """
    spatial = len(call.shape) - 2
    if not _split(layouts[0], 2) or any(n != 1 for n in call.arg(5, "dilation")):
        return None
    groups = int(call.arg(8, "groups"))

    def written(x: Tensor, w: Tensor, b: Any, stride: Any, padding: Any, dilation: Any, flipped: bool, outside: Any,
                count: int) -> Tensor:  # fmt: skip
        strides, pads, more = (per_dim(g, spatial) for g in (stride, padding, outside))
        kernel = list(w.shape[2:])
        taps = [-(-k // s) for k, s in zip(kernel, strides, strict=True)]
        filled = [n for t, s, k in zip(taps[::-1], strides[::-1], kernel[::-1], strict=True) for n in (0, t * s - k)]
        w = aten.constant_pad_nd.default(w, filled, 0) if any(filled) else w
        inside, each = x.shape[1] // groups, w.shape[1]
        # [groups, in, out, taps and phases in turn] -> [groups, out, phases, in, taps], the taps backwards
        w = w.reshape(groups, inside, each, *(n for pair in zip(taps, strides, strict=True) for n in pair))
        at = range(3, 3 + 2 * spatial)
        w = w.permute(0, 2, *at[1::2], 1, *at[::2]).flip(list(range(3 + spatial, 3 + 2 * spatial)))
        w = w.reshape(groups * each * math.prod(strides), inside, *taps)
        around = [n for t in taps[::-1] for n in (t - 1, t - 1)]
        x = aten.constant_pad_nd.default(x, around, 0) if any(around) else x
        ones, none = [1] * spatial, [0] * spatial
        y = aten.convolution.default(x, w, None, ones, none, ones, False, none, groups)
        rows = list(y.shape[2:])
        y = y.reshape(y.shape[0], groups * each, *strides, *rows)
        between = [d for i in range(spatial) for d in (2 + spatial + i, 2 + i)]
        rows = [n * s for n, s in zip(rows, strides, strict=True)]
        y = y.permute(0, 1, *between).reshape(y.shape[0], groups * each, *rows)
        for d, (p, size) in enumerate(zip(pads, call.shape[2:], strict=True), 2):
            short = p + size - y.shape[d]
            if short > 0:  # output padding that reaches behind the last tap
                y = aten.constant_pad_nd.default(y, [0, 0] * (len(call.shape) - 1 - d) + [0, short], 0)
            y = aten.slice.Tensor(y, d, p, p + size)
        return y if b is None else y + b.reshape([1, -1] + [1] * spatial)

    return written


def mirrored(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """The first rows in front and the last ones behind, turned round (not the outermost ones)."""
    layout = layouts[0].summed()
    pads = list(call.arg(1, "padding"))
    if not _split(layout, len(call.shape) - len(pads) // 2) or any(p < 0 for p in pads):
        return None

    def written(x: Tensor, padding: Any) -> Tensor:
        for i in range(len(pads) // 2):
            d, (before, after) = x.dim() - 1 - i, padding[2 * i : 2 * i + 2]
            size, pieces = x.shape[d], [x]
            if before:
                pieces.insert(0, aten.flip.default(aten.slice.Tensor(x, d, 1, before + 1), [d]))
            if after:
                pieces.append(aten.flip.default(aten.slice.Tensor(x, d, size - 1 - after, size - 1), [d]))
            x = aten.cat.default(pieces, d) if len(pieces) > 1 else x
        return x

    return written


def replicated(call: Call, layouts: Sequence[Layout], mesh: Mesh) -> Written | None:
    """The first row in front and the last one behind, as often as asked: they are where their neighbours are."""
    layout = layouts[0].summed()
    pads = list(call.arg(1, "padding"))
    lead = len(call.shape) - len(pads) // 2
    if not _split(layout, lead) or any(p < 0 for p in pads):
        return None

    def written(x: Tensor, padding: Any) -> Tensor:
        for i in range(len(pads) // 2):
            d, (before, after) = x.dim() - 1 - i, padding[2 * i : 2 * i + 2]
            if before or after:
                first, last = aten.slice.Tensor(x, d, 0, 1), aten.slice.Tensor(x, d, x.shape[d] - 1, x.shape[d])
                x = aten.cat.default([*[first] * before, x, *[last] * after], d)
        return x

    return written


TABLE: dict[str, Callable[[Call, Sequence[Layout], Mesh], Written | None]] = {
    **{f"aten::replication_pad{n}d": replicated for n in (1, 2, 3)},
    **{f"aten::reflection_pad{n}d": mirrored for n in (1, 2, 3)},
}
