"""What a call makes of an exchange that ended in the call before (DistriFusion's displaced patches, section 4.1).

A value of which a rank has some rows and gets others is put together from its own rows of this step and the others' of
the step before. The exchange itself goes on, and what it brings is the next call's.

| operator | meaning | localised to |
|---|---|---|
| ``context(y, src, dst)`` | what a rank keeps of an exchanged value for the next call: the rows that came | ``cut`` |
| ``displaced(x, old, src, dst)`` | the value: own rows are those of ``x``, the others what was kept | ``around`` |
| ``share(x, factors)`` | a rank's own term of a sum, times its factor: an estimate of the sum | a product |
| ``plausible(moments, own)`` | moments whose variance is not negative | itself |

What is kept of a value is the rows themselves, one box after the other, where they are few beside the rank's own
(halos), and else the whole value (keys and values), which saves taking it apart. Which of both is decided by the
layouts alone, so that all programs of a plan keep the same. On one device with whole tensors nothing comes from
others, and ``displaced`` is its operand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.collectives import Exchange, assemble, block, decode, encode

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_LIB.define("context(Tensor y, str src, str dst) -> Tensor", tags=_PT2)
_LIB.define("displaced(Tensor x, Tensor old, str src, str dst) -> Tensor", tags=_PT2)
_LIB.define("share(Tensor x, float[] factors) -> Tensor", tags=_PT2)
_LIB.define("cut(Tensor y, int[] boxes) -> Tensor", tags=_PT2)
_LIB.define("around(Tensor x, Tensor old, int[] shape, int[] own, int[] others, int[] at) -> Tensor", tags=_PT2)
_LIB.define("plausible(Tensor moments, Tensor own) -> Tensor", tags=_PT2)

for _name in ("context", "displaced", "share"):
    _LIB.impl(_name, lambda x, *rest: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpar::{_name}", lambda x, *rest: torch.empty_like(x), lib=_LIB)


def _cut(y: torch.Tensor, boxes: Sequence[int]) -> torch.Tensor:
    pieces = [block(y, starts, sizes).reshape(-1) for _, starts, sizes in decode(boxes)]
    return torch.cat(pieces) if pieces else y.new_empty(0)


def _around(
    x: torch.Tensor, old: torch.Tensor, shape: Sequence[int], own: Sequence[int], others: Sequence[int],
    at: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """``at``: where in the message ``old`` the others' boxes begin; none where it is the whole value."""
    n = len(shape)
    tiles = []
    for i in range(0, len(own), 3 * n):
        source, place, size = (tuple(own[i + k * n : i + (k + 1) * n]) for k in range(3))
        tiles.append((place, size, block(x, source, size)))
    for i, (_, place, size) in enumerate(decode(others)):
        piece = old.narrow(0, at[i], math.prod(size)).view(size) if at else block(old, place, size)
        tiles.append((place, size, piece))
    if not tiles:
        return x.new_empty(tuple(shape))
    out = assemble(tiles, torch.cat)
    return out.clone(memory_format=torch.contiguous_format) if len(tiles) == 1 else out


def _plausible(moments: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    mean, square = moments.unbind(0)
    mine, squares = own.unbind(0)
    variance = (squares - mine * mine).clamp_min(0.0)
    return torch.stack([mean, torch.where(square < mean * mean, mean * mean + variance, square)])


for _name, _function in (("cut", _cut), ("around", _around), ("plausible", _plausible)):
    _LIB.impl(_name, _function, "CompositeImplicitAutograd")

context = torch.ops.fastpar.context.default
displaced = torch.ops.fastpar.displaced.default
share = torch.ops.fastpar.share.default
plausible = torch.ops.fastpar.plausible.default
cut = torch.ops.fastpar.cut.default
around = torch.ops.fastpar.around.default


def kept_apart(src: Layout, dst: Layout, mesh: Mesh, rank: int) -> Exchange | None:
    """The exchange ``src -> dst`` where ``rank`` keeps what came of it and no more; None where it keeps the value."""
    exchange = Exchange([src], [dst], mesh, rank, keep=True)
    return exchange if exchange.kept else None


def kept_shape(src: Layout, dst: Layout, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Shape of what ``rank`` keeps of the exchange for the next call."""
    apart = kept_apart(src, dst, mesh, rank)
    return dst.local_shape(mesh, rank) if apart is None else (sum(apart.receive_splits),)


def cut_boxes(exchange: Exchange) -> list[int]:
    """The rows that came, as boxes of the value, in the order of the message."""
    return encode(exchange.came, "dst")


def tiles(src: Layout, dst: Layout, mesh: Mesh, rank: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """(shape, own, others, at) of ``around`` on ``rank``."""
    exchange = Exchange([src], [dst], mesh, rank, keep=True)
    found = tiles_of(exchange, 0)
    return found if exchange.kept else (*found[:3], [])


def tiles_of(exchange: Exchange, index: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """(shape, own, others, at) of ``around`` for a value of an exchange whose message has come."""
    side = exchange.sides[index]
    own = [n for box in side.receives[side.me] for part in (box.src, box.dst, box.size) for n in part]
    ends = list(accumulate(box.numel for _, box in exchange.came))
    mine = [(box, end - box.numel) for (i, box), end in zip(exchange.came, ends, strict=True) if i == index]
    others = [n for box, _ in mine for n in encode([(0, box)], "dst")]
    return list(side.shape), own, others, [at for _, at in mine]
