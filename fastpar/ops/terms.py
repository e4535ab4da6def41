"""``fastpar::terms``: the terms of a reduction over ranks, as rows of one more dimension in front.

What the ranks hold of a partial value are its terms, so rank i has row i, and nothing moves. An exchange that changes
the split from that dimension to others, and a reduction along it, are then a reduce-scatter: for parts of any size,
of any dimensions, each added up by the rank that keeps it, always in the same order.

On one rank with a whole tensor the value is its own only term; further ones are zeros of a sum, and repeat an extreme.
"""

from __future__ import annotations

import torch

from fastpar.core.layout import Partial

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define("terms(Tensor x, str partial, int count) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _terms(x: torch.Tensor, partial: str, count: int) -> torch.Tensor:
    one = x.unsqueeze(0)
    if Partial.parse(partial).op != "sum":
        return one.repeat(count, *[1] * x.dim())
    return torch.cat([one, x.new_zeros((count - 1, *x.shape))])


_LIB.impl("terms", _terms, "CompositeExplicitAutograd")
torch.library.register_fake("fastpar::terms", lambda x, partial, count: x.new_empty((count, *x.shape)), lib=_LIB)

terms = torch.ops.fastpar.terms.default
