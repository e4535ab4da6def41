"""``fastpar::band``: a map along one dimension in which every row is made of few neighbouring ones.

Interpolation between rows, averages over windows of any stride, padding and rounding, and adaptive averages are maps
``y[o] = sum_j w[o, j] x[at[o] + j]``, one dimension after the other. Written like that, a rank that has some of the
output rows needs a window of input rows, whatever the sizes are. Weights are those that torch's own kernel uses: it is
asked, with rows that are far enough apart to tell what each of them adds (``table``). Maxima over windows are of the
same rows as averages.

``kind`` names the map: ``nearest``, ``nearest-exact``, ``linear``, ``cubic`` (then ``corners`` for ``align_corners``,
``antialias``, ``by S`` for a scale factor that is given), ``adaptive``, or ``average K S P`` and ``maximum K S P`` for
kernel, stride and padding (then ``ceil`` for ``ceil_mode``, ``inside`` where padding does not count). ``before`` and
``after`` are the sizes of the whole dimension. ``rows`` says which rows of the result are wanted, from its first number
to its last; in between, in a program for all ranks, is where a rank's rows end. ``x`` begins with row ``first``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define(
    "band(Tensor x, int dim, str kind, int before, int after, int[] rows, int first=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_REACH = {"nearest": 1, "nearest-exact": 1, "linear": 2, "cubic": 4}
_WINDOWS = ("average", "maximum")
_MODES = {"linear": "bilinear", "cubic": "bicubic"}  # those that exist for two dimensions


@dataclass(frozen=True)
class Table:
    """Row o of the result is the sum over j of ``weights[o][j]`` times row ``at[o] + j``; these lie about row
    ``centre[o]``."""

    at: tuple[int, ...]
    centre: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def width(self) -> int:
        """Rows that every row is made of."""
        return len(self.weights[0])


@lru_cache(maxsize=512)
def table(kind: str, before: int, after: int, wide: bool) -> Table:
    """Rows and weights of a map, as the kernel for float64 (``wide``) or float32 has them."""
    with unset_fake_temporarily(), torch.no_grad():
        reach = min(_reach(kind, before, after), before)
        period = 2 * reach + 1
        index = torch.arange(before, dtype=torch.float64 if wide else torch.float32)
        combs = (index.long() % period == torch.arange(period)[:, None]).to(index.dtype)
        found = _apply(kind, torch.cat([combs, index[None], torch.ones_like(index)[None]])[None], after)[0].double()
        total = torch.where(found[-1] == 0, 1.0, found[-1])
        centre = found[-2] / total
        start = centre.round().long() - reach
        place = start + torch.arange(period)[:, None]  # [period, after]
        weights = found[:-2].gather(0, place % period)
        weights = torch.where((place >= 0) & (place < before), weights, 0.0)
        some = weights != 0
        first = torch.where(some.any(0), some.int().argmax(0), reach)
        last = period - 1 - some.flip(0).int().argmax(0)
        width = max(1, int(torch.where(some.any(0), last - first, 0).max()) + 1)
        at = (start + first).clamp(0, before - width)
        shift = (at - start) + torch.arange(width)[:, None]
        inside = (shift >= 0) & (shift < period)
        weights = torch.where(inside, weights.gather(0, shift.clamp(0, period - 1)), 0.0)
        centre = (centre + 0.5).long().clamp(0, before - 1)
        return Table(tuple(at.tolist()), tuple(centre.tolist()), tuple(map(tuple, weights.T.tolist())))


def _reach(kind: str, before: int, after: int) -> int:
    """Rows between which all that one row is made of lies, at the most."""
    name, *more = kind.split()
    if name in _WINDOWS:
        return int(more[0])
    if name == "adaptive":
        return -(-before // max(after, 1)) + 1
    reach = _REACH[name]
    return 2 + -(-reach * max(before, after) // max(after, 1)) if "antialias" in more else reach


def _apply(kind: str, x: torch.Tensor, after: int) -> torch.Tensor:
    """torch's operator on ``[1, C, before]``."""
    name, *more = kind.split()
    if name == "adaptive":
        return F.adaptive_avg_pool1d(x, after)
    if name in _WINDOWS:
        kernel, stride, padding = map(int, more[:3])
        return F.avg_pool1d(x, kernel, stride, padding, "ceil" in more, "inside" not in more)
    scale = float(more[more.index("by") + 1]) if "by" in more else None
    if name not in _MODES:
        return F.interpolate(x, size=after if scale is None else None, scale_factor=scale, mode=name)
    # Along the last dimension: torch 2.13 smooths wrongly along another one where the last one has a single element.
    return F.interpolate(
        x[:, :, None],
        size=(1, after) if scale is None else None,
        scale_factor=None if scale is None else (1.0, scale),
        mode=_MODES[name],
        align_corners="corners" in more,
        antialias="antialias" in more,
    )[:, :, 0]


@lru_cache(maxsize=512)
def _tensors(
    kind: str, before: int, after: int, start: int, stop: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """First places ``[rows]`` and weights ``[width, rows]``, kept on the device."""
    found = table(kind, before, after, dtype == torch.float64)
    with torch.inference_mode(False), unset_fake_temporarily():
        at = torch.tensor(found.at[start:stop], dtype=torch.int64)
        return at.to(device), torch.tensor(found.weights[start:stop], dtype=dtype).T.contiguous().to(device)


def _band(
    x: torch.Tensor, dim: int, kind: str, before: int, after: int, rows: Sequence[int], first: int = 0
) -> torch.Tensor:
    if rows[0] == rows[-1]:
        return _band_fake(x, dim, kind, before, after, rows)
    kernel = torch.float64 if x.dtype == torch.float64 else torch.float32
    at, weights = _tensors(kind, before, after, rows[0], rows[-1], kernel, x.device)
    largest = kind.startswith("maximum")
    dtype = x.dtype if largest else kernel
    lowest = -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min
    shape = [-1] + [1] * (x.dim() - 1 - dim % x.dim())
    out = None
    for j, weight in enumerate(weights):
        term, weight = x.index_select(dim, at + (j - first)).to(dtype), weight.view(shape)
        # what is no part of a row may be infinite
        term = (term if largest else term * weight).masked_fill(weight == 0, lowest if largest else 0.0)
        out = term if out is None else torch.maximum(out, term) if largest else out + term
    assert out is not None, "a table has at least one weight per row"
    return out.to(x.dtype).contiguous()


def _band_fake(x: Any, dim: int, kind: str, before: int, after: int, rows: Sequence[int], first: int = 0) -> Any:
    shape = list(x.shape)
    shape[dim] = rows[-1] - rows[0]
    return x.new_empty(shape)


_LIB.impl("band", _band, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::band", _band_fake, lib=_LIB)

band = torch.ops.fastpar.band.default
