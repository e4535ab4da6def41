"""Messages that travel between two calls, for ranks that do not run the model at the same time (STADI's step strides).

An exchange is taken apart: what a rank sends is a result of one call, what came for it is an input of the next one,
and between them stands a program of exchanges alone (``fastpar.passes.stride``).

| operator | meaning | localised to |
|---|---|---|
| ``outgoing(xs, srcs, dsts)`` | the message of ``all_to_all(xs, srcs, dsts)``, without what a rank keeps | ``pack`` |
| ``late(xs, srcs, dsts, came)`` | its results: the rank's rows of ``xs`` now, the others' from ``came`` | ``around`` |

A message is one dimension, of bytes where the values differ in dtype; over the mesh it is split in parts of as many
numbers as each rank sends or gets. On one device with whole tensors nothing travels, and ``late`` gives ``xs``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.collectives import Exchange, dtypes_of, layouts_of

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_LIB.define("outgoing(Tensor[] xs, str[] srcs, str[] dsts) -> Tensor", tags=_PT2)
_LIB.define("late(Tensor[] xs, str[] srcs, str[] dsts, Tensor came) -> Tensor[]", tags=_PT2)

_LIB.impl("outgoing", lambda xs, *rest: xs[0].new_empty(0), "CompositeExplicitAutograd")
_LIB.impl("late", lambda xs, *rest: [x.clone() for x in xs], "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::outgoing", lambda xs, *rest: xs[0].new_empty(0), lib=_LIB)
torch.library.register_fake("fastpar::late", lambda xs, *rest: [torch.empty_like(x) for x in xs], lib=_LIB)

outgoing = torch.ops.fastpar.outgoing.default
late = torch.ops.fastpar.late.default


def side(node: fx.Node, mesh: Mesh, rank: int) -> Exchange:
    """What ``rank`` sends and gets of the exchange that ``outgoing`` or ``late`` is a part of."""
    return Exchange(*layouts_of(node), mesh, rank, dtypes_of(node), apart=True)


def message_layout(sizes: Sequence[int], mesh: Mesh) -> Layout:
    """Of messages of so many numbers, one per rank."""
    return Layout((Dim.split(sum(sizes), mesh.names, tuple(sizes)),))


def message_like(node: fx.Node, sizes: Sequence[int]) -> torch.Tensor:
    """A fake value for the messages of the exchange that ``node`` is a part of."""
    values = [x.meta["val"] for x in node.args[0]]  # type: ignore[union-attr]
    mixed = len({v.dtype for v in values}) > 1
    with values[0].fake_mode:
        made: torch.Tensor = values[0].new_empty(sum(sizes), dtype=torch.uint8 if mixed else None)
    return made
