"""Indexing: what an index names on other ranks is looked up there.

An index may name any row. Reading, every rank looks up the rows that it holds, and the result is a sum over ranks;
writing, every rank writes the rows that it holds. Everything else passes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.ops.held import ALL, gather_held, held_text, read_held, scatter_held, write_held
from fastpar.rules.factor import FactorRule, Factors, Names, aligned
from fastpar.rules.table import Call, Decision, Localised, Pos, register, whole_decision

_SMALL_TABLE = "an index may name any row of this dimension, and the result is larger than the table"
_NO_SUM = "an index may name any row of this dimension, and values of this type are not added up"
_ANY_PLACE = "an index may put this row anywhere"
_COUNTED = "how many rows a mask marks before this one depends on all of it"


def _read(
    call: Call, operands: tuple[Names, ...], result: Names, whole: Mapping[str, str] | None = None
) -> Factors:
    """The factors of a lookup in operand 0: its "v..." are summed over ranks where that moves less than the table."""
    reason = None
    dtype = call.node.meta["val"].dtype
    if dtype.itemsize == 1 or dtype.is_complex:
        reason = _NO_SUM
    elif _summed_bytes(call, operands[0], result) >= call.bytes(0):
        reason = _SMALL_TABLE
    looked_up = [n for n in operands[0] if n and n[0] == "v"]
    stay = {} if reason is None else dict.fromkeys(looked_up, reason)
    return Factors(operands, (result,), {} if reason else dict.fromkeys(looked_up, "sum"), {**stay, **(whole or {})})


def _summed_bytes(call: Call, table: Names, result: Names) -> int:
    """What leaves a rank, about, to add the result up: twice its bytes, or once where it has rows to be split then."""
    own = [size for name, size in zip(result, call.shape, strict=True) if name not in table]
    return math.prod(call.shape) * call.itemsizes[0] * (2 if call.tail or max(own, default=1) == 1 else 1)


def _embedding(call: Call) -> Factors:
    index = tuple(f"i{d}" for d in range(len(call.shapes[1])))
    return _read(call, (("v", "c"), index), (*index, "c"))


def _gather(call: Call) -> Factors:
    """(x, dim, index) -> x at the index along ``dim``; with fewer rows of another dimension in it, the first"""
    d = call.arg(1, "dim") % max(1, len(call.shape))
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    table = tuple(
        "v" if i == d else n if call.shapes[0][i] == call.shape[i] else f"t{i}" for i, n in enumerate(names)
    )
    return _read(call, (table, names), names, {t: _ANY_PLACE for t in table if t.startswith("t")})


def _index_select(call: Call) -> Factors:
    d = call.arg(1, "dim") % len(call.shape)
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    table = tuple("v" if i == d else n for i, n in enumerate(names))
    return _read(call, (table, (names[d],) if len(call.shapes[1]) else ()), names)


def _is_mask(index: Any) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _indexed(call: Call) -> tuple[Names, tuple[Names, ...], Names, list[int]]:
    """Names of what is indexed, of the indices (none of them a mask), and of what they select from it; its sizes."""
    indices = list(call.args[1])
    given = [i for i, x in enumerate(indices) if x is not None]
    x: Names = tuple(f"v{i}" if i in given else f"d{i}" for i in range(len(call.shapes[0])))
    shapes = call.shapes[1 : 1 + len(given)]
    common = list(torch.broadcast_shapes(*shapes))
    out = tuple(f"i{k}" for k in range(len(common)))
    names = tuple(aligned(s, tuple(common), "i") for s in shapes)
    rest = [i for i in range(len(x)) if i not in given]
    adjacent = given == list(range(given[0], given[-1] + 1))
    at = sum(i < given[0] for i in rest) if adjacent else 0
    selected = (*(x[i] for i in rest[:at]), *out, *(x[i] for i in rest[at:]))
    sizes = [call.shapes[0][i] for i in rest]
    return x, names, selected, [*sizes[:at], *common, *sizes[at:]]


def _index(call: Call) -> Factors:
    x, indices, selected, _ = _indexed(call)
    return _read(call, (x, *indices), selected)


def _index_put(call: Call) -> Factors:
    """(x, indices, values) -> x with the values at the indices: every row stays where it is"""
    indices, values = call.args[1], call.shapes[-1]
    if any(map(_is_mask, indices)):
        return _masked_put(call)
    x, names, selected, sizes = _indexed(call)
    shift = len(selected) - len(values)
    given = tuple(n if s == size else None for n, s, size in zip(selected[shift:], values, sizes[shift:], strict=True))
    places = {n: _ANY_PLACE for n in selected if n is not None and n[0] == "i"}
    return Factors((x, *names, given), (x,), whole=places)


def _masked_put(call: Call) -> Factors:
    """A mask over some dimensions: whoever has a row has its part of the mask, and writes the same value.

    Not where each marked row has a value of its own: which one it is, the whole mask says.
    """
    indices, values = list(call.args[1]), call.shapes[-1]
    at = [i for i, index in enumerate(indices) if index is not None]
    x: Names = tuple(f"d{i}" for i in range(len(call.shape)))
    mask = x[at[0] : at[0] + len(call.shapes[1])]
    # one row stands for all that the mask marks, between the dimensions in front of the mask and those behind it
    selected = (*x[: at[0]], None, *x[at[0] + len(mask) :])[-len(values) or len(x) + 1 :]
    sizes = dict(zip(x, call.shape, strict=True))
    given = tuple(n if n is not None and sizes[n] == s else None for n, s in zip(selected, values, strict=True))
    if len(at) == 1 and all(n is not None or s == 1 for n, s in zip(given, values, strict=True)):
        return Factors((x, mask, given), (x,))
    every = tuple(tuple(f"m{i}.{k}" for k in range(len(s))) for i, s in enumerate(call.shapes[1:]))
    counted = {n: _COUNTED for names in (x, *every) for n in names if n is not None}
    return Factors((x, *every), (x,), whole=counted)


def _index_copy(call: Call) -> Factors:
    """(x, dim, index, source) -> x with the rows ``index`` of dimension ``dim`` those of source"""
    d = call.arg(1, "dim") % max(1, len(call.shape))
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    x = tuple("v" if i == d else n for i, n in enumerate(names))
    index, source = call.shapes[1:]
    whole = {"s": _ANY_PLACE}
    if len(index) != 1 or len(source) != len(call.shape) or call.kwargs.get("alpha", 1) != 1:
        whole["v"] = _ANY_PLACE
    rows = tuple("s" if n == "v" else n for n in x)
    return Factors((x, ("s",) * len(index), rows if source else ()), (x,), whole=whole)


def _scatter(call: Call) -> Factors:
    """(x, dim, index, source) -> x with elements of source at the index along ``dim``"""
    d = call.arg(1, "dim") % max(1, len(call.shape))
    x, operands, whole = [], [[] for _ in call.shapes[1:]], {}  # type: ignore[var-annotated]
    for i, size in enumerate(call.shape):
        sizes = [s[i] for s in call.shapes[1:]]
        name = f"d{i}"
        if i == d or any(s != size for s in sizes):
            name = f"s{i}"  # behind what the index has, source has more and x keeps what it was
            whole[name] = _ANY_PLACE
        x.append("v" if i == d else name)
        for operand in operands:
            operand.append(name)
    if len(operands) < 2 or not call.shape:  # a number in all places has no operator of ours
        whole["v"] = _ANY_PLACE
    return Factors((tuple(x), *map(tuple, operands)), (tuple(x),), whole=whole)


def _bucketize(call: Call) -> Factors:
    """(x, boundaries) -> the bucket of every element of x"""
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    return Factors((names, ("b",)), (names,), whole={"b": "every boundary counts for every element"})


class LookupRule(FactorRule):
    """Factors, of which those that begin with "v" are looked up; ``local`` is the call where a rank holds some of
    their rows, given as text (``fastpar.ops.held``)."""

    def __init__(self, factors: Callable[[Call], Factors], local: Callable[[Call, str], Localised]) -> None:
        super().__init__(factors)
        self.local = local

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        spec = self.factors(call)  # rows that have to be whole here begin here
        return [] if spec.results[0][pos.dim] in spec.whole else super().back(call, pos)

    def rows(self, call: Call) -> list[int]:
        """Dimensions of the result that are not the table's: one row for each that was looked up."""
        spec = self.factors(call)
        return [d for d, name in enumerate(spec.results[0]) if name not in spec.operands[0]]

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        names = self.factors(call).operands[0]
        held = [held_text(dim, mesh, rank) for n, dim in zip(names, ins[0].dims, strict=True) if n and n[0] == "v"]
        if all(text == ALL for text in held):
            return super().localise(call, ins, outs, mesh, rank)
        return self.local(call, " ".join(held))


class IndexRule(LookupRule):
    """x[..., i, j, ...] with tensors. The result of a mask has a size that depends on values: everything whole."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        if any(map(_is_mask, call.args[1])):
            return whole_decision(call, layouts, self.reason)
        return super().decide(call, layouts, mesh)

    def operands_for(self, call: Call, want: Layout) -> tuple[Layout, ...] | None:
        return None if any(map(_is_mask, call.args[1])) else super().operands_for(call, want)

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        # rows of an index tensor are rows of the result, but splitting starts at the result:
        # an index is cheap, the table's rows are what costs
        if any(map(_is_mask, call.args[1])):
            return []
        return [p for p in super().back(call, pos) if p[0] == 0]

    def rows(self, call: Call) -> list[int]:
        return [] if any(map(_is_mask, call.args[1])) else super().rows(call)


def _along(call: Call) -> list[Any]:
    """The index of an operator along one dimension as ``x[..., index]`` has it."""
    return [None] * (call.arg(1, "dim") % len(call.shapes[0])) + [call.operands[1]]


def _scatter_how(call: Call) -> str:
    reduction = call.arg(4, "reduce")
    if call.name == "aten::scatter_reduce":
        return f"{'reduce' if call.kwargs.get('include_self', True) else 'only'} {reduction}"
    how = "add" if call.name == "aten::scatter_add" else "set"
    return how if reduction is None else {"add": "reduce sum", "multiply": "reduce prod"}[reduction]


register("aten::bucketize", FactorRule(_bucketize))
register("aten::embedding", LookupRule(
    _embedding, lambda call, held: (read_held, (call.operands[0], [call.operands[1]], held), {})))
register("aten::index_select", LookupRule(
    _index_select, lambda call, held: (read_held, (call.operands[0], _along(call), held), {})))
register(["aten::index", "aten::_unsafe_index"], IndexRule(
    _index, lambda call, held: (read_held, (*call.args[:2], held), {})))
register("aten::gather", LookupRule(
    _gather, lambda call, held: (gather_held, (call.operands[0], call.arg(1, "dim"), call.operands[1], held), {})))
register(["aten::index_put", "aten::_unsafe_index_put"], LookupRule(
    _index_put, lambda call, held: (write_held, (*call.args[:3], bool(call.arg(3, "accumulate", False)), held), {})))
register(["aten::index_copy", "aten::index_add"], LookupRule(
    _index_copy, lambda call, held: (write_held, (
        call.operands[0], _along(call), call.operands[2], call.name == "aten::index_add", held), {})))
register(["aten::scatter", "aten::scatter_add", "aten::scatter_reduce"], LookupRule(
    _scatter, lambda call, held: (scatter_held, (
        call.operands[0], call.arg(1, "dim"), call.operands[1], call.operands[2], _scatter_how(call), held), {})))
