"""Matrix products: rows and columns pass through, the contracted dimension is reduced."""

from __future__ import annotations

from fastpar.rules.factor import FactorRule, Factors, Names, aligned
from fastpar.rules.table import Call, register


def _mm(call: Call) -> Factors:
    return Factors((("m", "k"), ("k", "n")), (("m", "n"),), reduced={"k": "sum"})


def _bmm(call: Call) -> Factors:
    return Factors((("b", "m", "k"), ("b", "k", "n")), (("b", "m", "n"),), reduced={"k": "sum"})


def _bias(shape: tuple[int, ...], out: tuple[int, ...], names: tuple[str, ...]) -> Names:
    """Factors of a bias that broadcasts to the product."""
    offset = len(names)
    return tuple(
        names[int(n[1:]) - (len(out) - offset)] if n is not None else None for n in aligned(shape, out)
    )


# a bias would be added once per rank to partial sums
_BIAS = "a bias is added once, to the whole sum"


def _addmm(call: Call) -> Factors:
    bias = _bias(call.shapes[0], call.shape, ("m", "n"))
    return Factors((bias, ("m", "k"), ("k", "n")), (("m", "n"),), whole={"k": _BIAS})


def _baddbmm(call: Call) -> Factors:
    bias = _bias(call.shapes[0], call.shape, ("b", "m", "n"))
    return Factors((bias, ("b", "m", "k"), ("b", "k", "n")), (("b", "m", "n"),), whole={"k": _BIAS})


def _distances(call: Call) -> Factors:
    """_euclidean_dist(x [*B, m, k], y [*B, n, k]): rows against rows."""
    lead = tuple(f"b{i}" for i in range(len(call.shape) - 2))
    operands = ((*lead, "m", "k"), (*lead, "n", "k"))
    return Factors(operands, ((*lead, "m", "n"),), whole={"k": "a distance is the root of a sum over all of a row"})


def _mv(call: Call) -> Factors:
    return Factors((("m", "k"), ("k",)), (("m",),), reduced={"k": "sum"})


def _dot(call: Call) -> Factors:
    return Factors((("k",), ("k",)), ((),), reduced={"k": "sum"})


def _linear(call: Call) -> Factors:
    """aten.linear kept whole: [..., k] x [n, k] (+ [n]) -> [..., n]."""
    rows = tuple(f"m{i}" for i in range(len(call.shape) - 1))
    if len(call.shapes) == 3:
        return Factors(((*rows, "k"), ("n", "k"), ("n",)), ((*rows, "n"),), whole={"k": _BIAS})
    return Factors(((*rows, "k"), ("n", "k")), ((*rows, "n"),), reduced={"k": "sum"})


def _scaled_mm(call: Call) -> Factors:
    """fp8 product with scales per tensor, per row of A or per column of B."""
    m, n = call.shape
    names: list[Names] = [("m", "k"), ("k", "n")]
    for shape in call.shapes[2:]:
        names.append(
            tuple(
                "m" if len(shape) == 2 and i == 0 and s == m > 1
                else "n" if i == len(shape) - 1 and s == n > 1
                else None
                for i, s in enumerate(shape)
            )
        )
    return Factors(tuple(names), (("m", "n"),), whole={"k": "scales and rounding are per whole sum"})


register(["aten::mm", "aten::_int_mm"], FactorRule(_mm))
register("aten::bmm", FactorRule(_bmm))
register(["aten::addmm", "aten::_addmm_activation"], FactorRule(_addmm))
register("aten::baddbmm", FactorRule(_baddbmm))
register("aten::_euclidean_dist", FactorRule(_distances))
register("aten::mv", FactorRule(_mv))
register(["aten::dot", "aten::vdot"], FactorRule(_dot))
register("aten::linear", FactorRule(_linear))
register("aten::_scaled_mm", FactorRule(_scaled_mm))
