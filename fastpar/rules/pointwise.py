"""Pointwise operators: every dimension passes through, operands broadcast.

torch's own ``pointwise`` tag covers most of them; the rest are listed.
"""

from __future__ import annotations

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.rules.factor import FactorRule, Factors, aligned
from fastpar.rules.table import Call, Decision, register, register_pointwise


def _pointwise(call: Call) -> Factors:
    out = call.shape
    return Factors(tuple(aligned(s, out) for s in call.shapes), (aligned(out, out),))


class PointwiseRule(FactorRule):
    """Scaling a partial sum is linear, so it stays partial; everything else wants it summed."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        linear = call.name in ("aten::mul", "aten::div", "aten::neg") and len(layouts) == 1
        if linear and layouts[0].partial and all(p.op == "sum" for p in layouts[0].partial):
            return Decision(layouts, layouts)
        return super().decide(call, layouts, mesh)


RULE = register_pointwise(PointwiseRule(_pointwise))

register(
    [
        "aten::_to_copy",
        "aten::alias",
        "aten::clone",
        "aten::complex",
        "aten::contiguous",
        "aten::copy",
        "aten::detach",
        "aten::detach_copy",
        "aten::empty_like",
        "aten::fill",
        "aten::full_like",
        "aten::lift",
        "aten::lift_fresh",
        "aten::lift_fresh_copy",
        "aten::masked_fill",
        "aten::ones_like",
        "aten::resolve_conj",
        "aten::resolve_neg",
        "aten::zeros_like",
        "aten::_conj_physical",
        "aten::_conj",
        "aten::conj",
        "aten::imag",
        "aten::real",
        "aten::heaviside",
        "aten::_fake_quantize_per_tensor_affine_cachemask",
        "prims::convert_element_type",
        "prims::device_put",
    ],
    RULE,
)


def _batch_norm(call: Call) -> Factors:
    """(x [n, c, ...], weight?, bias?, mean, var) -> x scaled and shifted, and what training would save: nothing"""
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    saved = tuple(tuple(f"saved{k}" for _ in s) for k, s in enumerate(call.results[1:]))
    return Factors((names, *[("d1",)] * (len(call.shapes) - 1)), (names, *saved))


register(["aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update"], FactorRule(_batch_norm))


def _as_real(call: Call) -> Factors:
    names = aligned(call.shapes[0], call.shapes[0])
    return Factors((names,), ((*names, "pair"),))


def _as_complex(call: Call) -> Factors:
    names = aligned(call.shape, call.shape)
    return Factors(
        ((*names, "pair"),), (names,), whole={"pair": "real and imaginary part belong to one number"}
    )


register(["aten::view_as_real", "aten::view_as_real_copy"], FactorRule(_as_real))
register(["aten::view_as_complex", "aten::view_as_complex_copy"], FactorRule(_as_complex))
