"""What a compiled model gave, held against eager in the same dtype, with the bound that ``verify`` has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils import _pytree as pytree

from fastpar.core.errors import OptionError
from fastpar.graph.capture import compile_fx
from fastpar.graph.program import Program
from fastpar.graph.promote import promote, promote_args
from fastpar.graph.unbroken import unbroken
from fastpar.run.compare import FLOAT64_TOLERANCE, difference


@dataclass(frozen=True)
class Held:
    """The worst output of all calls that were looked at, all relative to its largest value.

    ``error`` is the distance to eager in ``dtype``. ``exact`` is that to eager in float64, ``eager`` how far eager in
    ``dtype`` is from there, and ``allowed`` what ``exact`` is held against: twice ``eager`` and one rounding.
    """

    ok: bool
    error: float
    exact: float
    eager: float
    allowed: float
    dtype: str


def held(
    model: Callable[..., Any], calls: Sequence[tuple[tuple[tuple[Any, ...], dict[str, Any]], Sequence[torch.Tensor]]],
    lossy: bool = False,
) -> Held:  # fmt: skip
    """Hold ``calls``, pairs of arguments and outputs, against ``model``. What a ``lossy`` plan gives must be finite.

    Raises OptionError where there is no memory for float64.
    """
    double, worst = in_float64(model), None
    with torch.no_grad():
        for (args, kwargs), outputs in calls:
            eager = tensors_of(model(*args, **kwargs))
            exact = tensors_of(_in_memory(double, args, kwargs))
            if len(outputs) != len(eager):
                return Held(False, float("inf"), float("inf"), 0.0, 0.0, "different outputs")
            for mine, plain, reference in zip(outputs, eager, exact, strict=True):
                one = _one(mine, plain, reference, lossy)
                if worst is None or (not one.ok, one.exact - one.allowed) > (not worst.ok, worst.exact - worst.allowed):
                    worst = one
    return worst if worst is not None else Held(True, 0.0, 0.0, 0.0, 0.0, "no outputs")


def _one(mine: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor, lossy: bool) -> Held:
    off, own = difference(mine, reference)[1], difference(plain, reference)[1]
    allowed = 0.0
    if plain.is_floating_point():
        allowed = max(2 * own + torch.finfo(plain.dtype).eps, FLOAT64_TOLERANCE)
    ok = off < float("inf") if lossy else off <= allowed
    return Held(ok, difference(mine, plain)[1], off, own, allowed, str(plain.dtype).removeprefix("torch."))


def in_float64(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` computed in float64, its own casts included: a graph of it at a time, in its own structure."""

    @unbroken
    def backend(gm: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
        def finish(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
            promoted = promote(program)
            return lambda args: promoted.gm(*promote_args(args))

        return compile_fx(gm, example, finish)

    return torch.compile(model, backend=backend, dynamic=False)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a model's result, in order; what comes late from other ranks is waited for."""
    found = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return [t.wait() if isinstance(t, AsyncCollectiveTensor) else t for t in found]


def _in_memory(double: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return double(*args, **kwargs)
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"the check runs the model in float64 as well, for which there is no memory: {error}; leave it out with "
            "--no-check"
        ) from error
