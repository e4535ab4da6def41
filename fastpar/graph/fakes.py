"""Fake tensors that stand for values: the masks and numbers among the inputs of a model that has no memory.

A model on fake tensors is planned without being run. Where it asks a mask how many tokens count
(:mod:`~fastpar.graph.sizes`), the mask's values are needed all the same, and are cheap to have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_VALUE = "_fastpar_value"


def fake_of(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of ``mode`` that stands for ``value``; a fake one as it is."""
    if isinstance(value, FakeTensor):
        return value
    fake = mode.from_tensor(value, static_shapes=True)
    setattr(fake, _VALUE, value)
    return fake


def values_of(given: Sequence[Any]) -> list[Any]:
    """``given`` with the values that its fake tensors stand for; as it is where one of them stands for none."""
    found = [getattr(x, _VALUE, None) if isinstance(x, FakeTensor) else x for x in given]
    missing = any(v is None and x is not None for v, x in zip(found, given, strict=True))
    return list(given) if missing else found


def mode_of(given: Iterable[Any]) -> FakeTensorMode | None:
    """The mode of the first fake tensor among ``given``, if there is one."""
    return next((x.fake_mode for x in given if isinstance(x, FakeTensor)), None)
