"""What it means that two runs agree: the float64 reference, the measure of a difference, equal bits."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fastpar.graph.capture import Captured, Inputs, Recorded, call_arguments, capture
from fastpar.graph.program import Program
from fastpar.graph.promote import promote, promote_args

FLOAT64_TOLERANCE = 1e-9
"""Largest relative difference of a float64 run: far above rounding, far below any wrong term."""


def float64_reference(recorded: Recorded) -> tuple[Program, list[Any], tuple[Any, ...]]:
    """The graph in float64, its arguments and outputs; kept, for one capture serves many plans."""
    if recorded.promoted is None:
        promoted, args = promote(recorded.program), promote_args(recorded.args)
        with torch.no_grad():
            recorded.promoted = (promoted, args, tuple(promoted.gm(*args)))
    return recorded.promoted


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(torch.nan_to_num(a) if a.is_floating_point() else a,
                       torch.nan_to_num(b) if b.is_floating_point() else b)  # fmt: skip


def difference(value: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and that over the largest absolute reference value."""
    if value.shape != reference.shape:
        return float("inf"), float("inf")
    if value.numel() == 0:
        return 0.0, 0.0
    if not (value.is_floating_point() or value.is_complex()):
        same = torch.equal(value, reference.to(value.dtype))
        return (0.0, 0.0) if same else (float("inf"), float("inf"))
    wide = torch.complex128 if value.is_complex() else torch.float64
    value, reference = value.to(wide), reference.to(wide)
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(value)):
        return float("inf"), float("inf")
    apart = (value - reference)[finite].abs()
    if apart.numel() == 0:
        return 0.0, 0.0
    absolute, scale = float(apart.max()), float(reference[finite].abs().max())
    return absolute, absolute / scale if scale else absolute


def capture_and_compare(model: Any, inputs: Inputs) -> tuple[Captured, str | None]:
    """The captured model, and where its outputs are not those of the model run plainly: None if they are.

    Capture keeps the operators, but not the order of every sum (a patch convolution becomes a
    product), so this is held against the narrowest float that a graph computes in. Buffers that
    the plain run changes are put back before the capture.
    """
    args, kwargs = call_arguments(inputs)
    kept = {}
    if isinstance(model, torch.nn.Module):
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fake = any(isinstance(t, FakeTensor) for t in pytree.tree_leaves((args, kwargs, list(kept.values()))))
    plain: list[Any] = []
    if not fake:
        given = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        with torch.no_grad():
            plain = pytree.tree_leaves(model(*given[0], **given[1]))
        if isinstance(model, torch.nn.Module):
            for name, buffer in model.named_buffers():
                buffer.data.copy_(kept[name])
    captured = capture(model, (lambda: kwargs) if kwargs and not args else (lambda: args))
    mine = pytree.tree_leaves(captured.outputs)
    if not fake and len(plain) != len(mine):
        return captured, f"the captured graphs give {len(mine)} outputs, the model itself {len(plain)}"
    floats = {
        v.dtype
        for r in captured.programs
        for n in r.program.graph.nodes
        if isinstance(v := n.meta.get("val"), torch.Tensor) and v.is_floating_point()
    }
    narrowest = max((torch.finfo(d).eps for d in floats), default=0.0)
    bound = max(FLOAT64_TOLERANCE, 256 * narrowest if narrowest > 1e-12 else 0.0)
    for i, (a, b) in enumerate(zip(mine, plain, strict=False)):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            off = difference(a, b)[1]
            if not off <= bound:
                return captured, f"capture: output {i} differs from the model's own by {off:.1e}, more than {bound:.0e}"
    return captured, None
