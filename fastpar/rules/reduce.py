"""Reductions, norms, softmax and scans.

A sum over split rows is a partial value; a mean is that sum divided by the global count;
what normalises or scans along a dimension needs it whole.
"""

from __future__ import annotations

from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, register


def _names(call: Call) -> tuple[str, ...]:
    return tuple(f"d{i}" for i in range(len(call.shapes[0])))


def reduced_dims(call: Call) -> set[int]:
    """Dimensions that a reduction (``dim`` second) runs over."""
    shape = call.shapes[0]
    dims = call.arg(1, "dim", None)
    if not isinstance(dims, (int, list, tuple)) or isinstance(dims, bool) or dims == []:
        return set(range(len(shape)))
    return {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)} if shape else set()


def reduction(op: str | None, reason: str = "") -> FactorRule:
    """Reduces ``dim``: partial with ``op``, or whole with ``reason`` where ``op`` is None."""

    def factors(call: Call) -> Factors:
        names, dims = _names(call), reduced_dims(call)
        kept = tuple(
            None if i in dims else n
            for i, n in enumerate(names)
            if i not in dims or len(call.shape) == len(names)
        )
        gone = {names[d] for d in dims}
        if op is None:
            return Factors((names,), (kept,) * len(call.results), whole=dict.fromkeys(gone, reason))
        return Factors((names,), (kept,), reduced=dict.fromkeys(gone, op))

    return FactorRule(factors)


def along(argument: int, name: str, reason: str, default: int = -1) -> FactorRule:
    """Keeps the shape (one result or several) and needs dimension ``dim`` whole."""

    def factors(call: Call) -> Factors:
        names = _names(call)
        dim = call.arg(argument, name, default)
        whole = {names[dim % len(names)]: reason} if names else {}
        return Factors((names,), (names,) * len(call.results), whole=whole)

    return FactorRule(factors)


def _layer_norm(call: Call) -> Factors:
    """(x, normalized_shape, weight?, bias?, eps) -> (y, mean, rstd)"""
    names = _names(call)
    n = len(call.arg(1, "normalized_shape"))
    rows, columns = names[:-n], names[-n:]
    whole = dict.fromkeys(columns, "normalised along this dimension")
    results = [names] + [(*rows, *(None,) * n)] * (len(call.results) - 1)
    return Factors((names,) + (columns,) * (len(call.shapes) - 1), tuple(results), whole=whole)


def _moments(call: Call) -> Factors:
    """moments(x, dims): [2, *x with 1 along dims], a sum."""
    names, dims = _names(call), set(call.args[1])
    kept = tuple(None if i in dims else n for i, n in enumerate(names))
    return Factors((names,), ((None, *kept),), reduced={names[d]: "sum" for d in dims})


register("fastpar::moments", FactorRule(_moments))
register(["aten::sum", "aten::nansum"], reduction("sum"))
register("aten::mean", reduction(None, "a mean over split rows is written out as a sum"))
register("aten::amax", reduction("max"))
register("aten::amin", reduction("min"))
register(
    ["aten::var", "aten::std", "aten::var_mean", "aten::std_mean", "aten::prod", "aten::any", "aten::all",
     "aten::logsumexp", "aten::argmax", "aten::argmin", "aten::max", "aten::min", "aten::norm",
     "aten::median", "aten::count_nonzero"],  # fmt: skip
    reduction(None, "reduced in one piece along this dimension"),
)
register(["aten::_softmax", "aten::_log_softmax", "aten::softmax", "aten::_safe_softmax"],
         along(1, "dim", "softmax runs along this dimension"))  # fmt: skip
register(["aten::cumsum", "aten::cumprod", "aten::logcumsumexp", "aten::cummax", "aten::cummin"],
         along(1, "dim", "a scan runs along this dimension"))  # fmt: skip
register("aten::sort", along(1, "dim", "sorted along this dimension"))
register("aten::argsort", along(1, "dim", "sorted along this dimension"))
register(["aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm"], FactorRule(_layer_norm))


def _topk(call: Call) -> Factors:
    names = _names(call)
    d = call.arg(2, "dim", -1) % len(names)
    kept = tuple("top" if i == d else n for i, n in enumerate(names))
    whole = {names[d]: "the largest of all rows", "top": "the largest of all rows"}
    return Factors((names,), (kept, kept), whole=whole)


register("aten::topk", FactorRule(_topk))


def _vector_norm(call: Call) -> Factors:
    names = _names(call)
    dims = call.arg(2, "dim", None)
    gone = set(range(len(names))) if dims is None else {
        d % len(names) for d in ([dims] if isinstance(dims, int) else dims)
    }
    kept = tuple(
        None if i in gone else n
        for i, n in enumerate(names)
        if i not in gone or len(call.shape) == len(names)
    )
    return Factors((names,), (kept,), whole={names[d]: "a norm along this dimension" for d in gone})


register("aten::linalg_vector_norm", FactorRule(_vector_norm))
