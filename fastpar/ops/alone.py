"""``fastpar::alone``: a change of layout answered from what the rank has itself; nothing is sent.

Rows of other ranks are zero, and a sum over ranks is the rank's own term times their number. This is
what patches that never talk do (DistriFusion's "naive patch" baseline): no function of the model, but
one of the layouts, so it is simulated and checked like every exchange. ``place`` is its form on one rank:
the boxes of ``x`` that the rank keeps (``source``), put in a tensor of zeros (``target``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import transfer
from fastpar.ops.collectives import block, decode, encode

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_LIB.define("alone(Tensor x, str src, str dst) -> Tensor", tags=_PT2)
_LIB.define("place(Tensor x, int[] shape, int[] source, int[] target, float scale) -> Tensor", tags=_PT2)


def _place(
    x: torch.Tensor, shape: Sequence[int], source: Sequence[int], target: Sequence[int], scale: float
) -> torch.Tensor:
    out = x.new_zeros(tuple(shape))
    for (_, starts, sizes), (_, places, _) in zip(decode(source), decode(target), strict=True):
        block(out, places, sizes).copy_(block(x, starts, sizes))
    return out if scale == 1.0 else out * scale


_LIB.impl("alone", lambda x, src, dst: x.clone(), "CompositeExplicitAutograd")
_LIB.impl("place", _place, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::alone", lambda x, src, dst: torch.empty_like(x), lib=_LIB)
torch.library.register_fake("fastpar::place", lambda x, shape, *rest: x.new_empty(tuple(shape)), lib=_LIB)

alone = torch.ops.fastpar.alone.default
place = torch.ops.fastpar.place.default


def placement(
    src: Layout, dst: Layout, mesh: Mesh, rank: int
) -> tuple[list[int], list[int], list[int], float]:
    """(shape, source, target, scale) of ``place`` on ``rank``."""
    t = transfer(src.summed(), dst, mesh, rank)
    boxes = [(0, box) for box in t.receives[t.me]]
    terms = [mesh.size(p.axes) for p in src.partial if p.op == "sum" and p not in dst.partial]
    scale = 1.0
    for n in terms:
        scale *= n
    return list(t.shape), encode(boxes, "src"), encode(boxes, "dst"), scale


def alone_across(xs: Sequence[torch.Tensor], src: Layout, dst: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """N-rank meaning of ``alone``."""
    return [_place(x, *placement(src, dst, mesh, rank)) for rank, x in enumerate(xs)]
