"""Operators that create values from sizes, and random ones: always whole.

A whole value is sliced for free where it meets a split one, so there is nothing to gain
from splitting its creation; and random values must be drawn whole, with equal generator
state on all ranks, to be the values that one device would draw.
"""

from __future__ import annotations

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.rules.table import Call, Decision, Rule, register


class CreateRule(Rule):
    """Results are whole; tensor operands give only dtype, device or whole values."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        return Decision(
            tuple(Layout.whole(s) for s in call.shapes), tuple(Layout.whole(s) for s in call.results)
        )


register(
    ["aten::arange", "aten::linspace", "aten::logspace", "aten::full", "aten::zeros", "aten::ones",
     "aten::empty", "aten::empty_strided", "aten::scalar_tensor", "aten::eye", "aten::tril_indices",
     "aten::triu_indices", "aten::hann_window", "aten::rand", "aten::randn", "aten::randint",
     "aten::randperm", "aten::normal", "aten::rand_like", "aten::randn_like", "aten::lift_constant"],  # fmt: skip
    CreateRule(),
)


class NewRule(CreateRule):
    """new_zeros and its kin: the operand gives dtype and device only, so it is taken as it comes."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        return Decision(layouts, tuple(Layout.whole(s) for s in call.results))


register(
    ["aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty", "aten::new_empty_strided"],
    NewRule(),
)
