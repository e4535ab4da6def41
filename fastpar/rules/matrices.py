"""Operators on matrices or along transformed dimensions: what is done at once is whole, stacks of it pass through."""

from __future__ import annotations

from fastpar.rules.factor import FactorRule, Factors, Names
from fastpar.rules.table import Call, register

_MATRIX = "a matrix is factorised or solved in one piece"
_TRANSFORM = "a Fourier transform runs along this dimension"
_PAIR = "a distance is over all of these"


def _stacked(call: Call) -> Factors:
    """Stacks of matrices, the last two dimensions of the first operand; the others are as many matrices or vectors."""
    first, *others = call.shapes
    stack = first[:-2]
    alike = all(s == first[:-1] or (len(s) == len(first) and s[:-2] == stack) for s in others)
    alike = alike and all(len(s) <= len(first) and s[: len(stack)] == stack for s in call.results)
    whole: dict[str, str] = {}

    def names(shape: tuple[int, ...], what: str) -> Names:
        out = tuple(f"b{i}" if i < len(stack) and alike else f"{what}.{i}" for i in range(len(shape)))
        whole.update({n: _MATRIX for n in out if n[0] != "b"})
        return out

    operands = tuple(names(s, f"o{k}") for k, s in enumerate(call.shapes))
    return Factors(operands, tuple(names(s, f"r{k}") for k, s in enumerate(call.results)), whole=whole)


def _transformed(call: Call) -> Factors:
    """_fft_*(x, dims, ...)"""
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    return Factors((names,), (names,), whole={names[d % len(names)]: _TRANSFORM for d in call.arg(1, "dim")})


def _distances(call: Call) -> Factors:
    """_cdist_forward(a [..., P, M], b [..., R, M]) -> [..., P, R]"""
    stack = tuple(f"b{i}" for i in range(len(call.shape) - 2))

    def operand(shape: tuple[int, ...], rows: str) -> Names:
        lead = stack[len(stack) - len(shape) + 2 :]
        sizes = call.shape[len(stack) - len(lead) : len(stack)]
        kept = tuple(n if s == size else None for n, s, size in zip(lead, shape, sizes, strict=False))
        return (*kept, rows, "m")

    a, b = call.shapes
    return Factors((operand(a, "p"), operand(b, "r")), ((*stack, "p", "r"),), whole={"m": _PAIR})


def _searchsorted(call: Call) -> Factors:
    """(boundaries [..., s], x [..., n]) -> the place of every element of x"""
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    rows: Names = (*names[:-1], "s") if len(call.shapes[0]) > 1 else ("s",)
    return Factors((rows, *[names] * (len(call.shapes) - 1)), (names,), whole={"s": "sorted along this dimension"})


register(["aten::linalg_inv_ex", "aten::_linalg_det", "aten::_linalg_slogdet", "aten::linalg_qr", "aten::_linalg_svd",
          "aten::_linalg_solve_ex", "aten::linalg_solve_triangular", "aten::linalg_cholesky_ex", "aten::_linalg_eigh",
          "aten::linalg_eig", "aten::linalg_lu_factor_ex", "aten::linalg_matrix_exp", "aten::cholesky_solve",
          "aten::triangular_solve"], FactorRule(_stacked))  # fmt: skip
register(["aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r"], FactorRule(_transformed))
register("aten::_cdist_forward", FactorRule(_distances))
register("aten::searchsorted", FactorRule(_searchsorted))
