"""The function that a plan with ``fp8`` computes: the model with what travels rounded, on one device.

On whole tensors every communication is the identity, so a sharded or lowered program run by itself is that function.
It does not depend on who has which rows, and so is what the ranks are held against, as tightly as those of an exact
plan against eager. Where it is from eager's function is the plan's own error, and has no other cause than rounding:
with ``quantize`` and ``dequantize`` left out, the same program gives what eager gives, which is checked too, as is
every rounded tensor against the bound of its number format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastpar.graph.program import Program
from fastpar.ops.quantize import dequantize, error_bound, quantize
from fastpar.run.compare import difference


def rounds(program: Program) -> bool:
    """Whether the program rounds anything on its way (the pass ``quantize``)."""
    return any(node.target is quantize for node in program.graph.nodes)


@dataclass
class Rounded:
    """Outputs of a program that rounds, on one device; ``unrounded`` are those without rounding.

    ``worst`` is the largest error of a number in a rounded tensor over what e4m3 allows it: above 1, something is
    wrong with the conversion. ``values`` has what each captured operator gave, by its name.
    """

    outputs: tuple[Any, ...]
    unrounded: tuple[Any, ...]
    worst: float
    values: dict[str, Any] = field(default_factory=dict)

    def strayed(self, exact: Sequence[Any], tolerance: Sequence[float]) -> list[str]:
        """What is wrong besides rounding: sentences, none where all is well. One tolerance per output, relative."""
        found = []
        for i, (mine, true, allowed) in enumerate(zip(self.unrounded, exact, tolerance, strict=True)):
            if isinstance(true, torch.Tensor) and not (off := difference(mine, true)[1]) <= allowed:
                found.append(f"output {i}: without rounding, the plan's program is off by {off:.1e} (relative)")
        if not self.worst <= 1:
            found.append(f"a rounded value is off by {self.worst:.2f} times what e4m3 allows")
        return found


def rounded(program: Program, args: Sequence[Any]) -> Rounded:
    """Run a sharded or lowered ``program`` on whole tensors, with rounding and without."""
    with torch.no_grad():
        run, count = _Whole(program.gm, True), len(program.results)
        outputs, unrounded = run.run(*args)[:count], _Whole(program.gm, False).run(*args)[:count]
        return Rounded(tuple(outputs), tuple(unrounded), run.worst, run.values)


class _Whole(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, rounding: bool) -> None:
        super().__init__(gm)
        self.rounding, self.worst = rounding, 0.0
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if "origin" in n.meta:
            self.values[n.meta["origin"]] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self.rounding and target in (quantize, dequantize):
            return args[0]
        if target is torch.ops.aten.view.default:  # strides are those of the ranks' shares, not of whole tensors
            target = torch.ops.aten.reshape.default
        value = super().call_function(target, args, kwargs)
        if target is quantize and args[0].numel():
            x = args[0]
            apart = (dequantize(value, x.dtype).double() - x.double()).abs()
            finite = torch.isfinite(x)
            if torch.equal(finite, torch.isfinite(apart)):
                share = (apart / error_bound(x))[finite]
                self.worst = max(self.worst, float(share.max()) if share.numel() else 0.0)
            else:
                self.worst = float("inf")
        return value
