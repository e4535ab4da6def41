"""Indexing: the indexed dimension of the table is whole, everything else passes through."""

from __future__ import annotations

from typing import Any

import torch

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.rules.factor import FactorRule, Factors, Names
from fastpar.rules.table import Call, Decision, Gather, Pos, Rule, register

_ANY_ROW = "an index may point to any row of this dimension"


def _embedding(call: Call) -> Factors:
    index = tuple(f"i{d}" for d in range(len(call.shapes[1])))
    return Factors((("v", "c"), index), ((*index, "c"),), whole={"v": _ANY_ROW})


def _gather(call: Call) -> Factors:
    d = call.arg(1, "dim") % max(1, len(call.shape))
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    table = tuple(
        "v" if i == d else n if call.shapes[0][i] == call.shape[i] else f"t{i}" for i, n in enumerate(names)
    )
    whole = {"v": _ANY_ROW, **{t: _ANY_ROW for t in table if t.startswith("t")}}
    return Factors((table, names), (names,), whole=whole)


def _index_select(call: Call) -> Factors:
    d = call.arg(1, "dim") % len(call.shape)
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    table = tuple("v" if i == d else n for i, n in enumerate(names))
    index = (names[d],) if len(call.shapes[1]) else ()
    return Factors((table, index), (names,), whole={"v": _ANY_ROW})


def _index_copy(call: Call) -> Factors:
    """(x, dim, index, source) -> x with the rows ``index`` of dimension ``dim`` those of source"""
    d = call.arg(1, "dim") % max(1, len(call.shape))
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    x = tuple("v" if i == d else n for i, n in enumerate(names))
    source = tuple("s" if i == d else n for i, n in enumerate(names)) if len(call.shapes[2]) else ()
    index = ("s",) if len(call.shapes[1]) else ()
    return Factors((x, index, source), (x,), whole={"v": _ANY_ROW, "s": _ANY_ROW})


def _bucketize(call: Call) -> Factors:
    """(x, boundaries) -> the bucket of every element of x"""
    names = tuple(f"d{i}" for i in range(len(call.shape)))
    return Factors((names, ("b",)), (names,), whole={"b": "every boundary counts for every element"})


def _is_mask(index: Any) -> bool:
    return index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _indexed(call: Call) -> set[int]:
    """Dimensions of x that the indices stand for: a mask of k dimensions takes k of them."""
    dims: set[int] = set()
    at = 0
    for index in call.args[1]:
        taken = index.meta["val"].dim() if _is_mask(index) else 1
        if index is not None:
            dims |= set(range(at, at + taken))
        at += taken
    return dims


class IndexRule(Rule):
    """x[..., i, j, ...] with tensors: indexed dimensions whole, the indices' own rows pass through."""

    def _names(self, call: Call) -> Factors:
        indices = list(call.args[1])
        given = [i for i, x in enumerate(indices) if x is not None]
        x: Names = tuple(f"v{i}" if i in given else f"d{i}" for i in range(len(call.shapes[0])))
        shapes = call.shapes[1:]
        rank = max(len(s) for s in shapes)
        common = tuple(f"i{k}" for k in range(rank))
        size = [max((s[k - rank + len(s)] for s in shapes if k - rank + len(s) >= 0), default=1)
                for k in range(rank)]  # fmt: skip
        operands: list[Names] = [x]
        for s in shapes:
            shift = rank - len(s)
            operands.append(
                tuple(common[k + shift] if s[k] == size[k + shift] else None for k in range(len(s)))
            )
        rest = [n for i, n in enumerate(x) if i not in given]
        adjacent = given == list(range(given[0], given[-1] + 1))
        at = sum(1 for i in range(len(x)) if i < given[0] and i not in given) if adjacent else 0
        result = (*rest[:at], *common, *rest[at:])
        return Factors(tuple(operands), (tuple(result),), whole={f"v{i}": _ANY_ROW for i in given})

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        if any(map(_is_mask, call.args[1])):  # the result's size depends on values
            return super().decide(call, layouts, mesh)
        return FactorRule(self._names).decide(call, layouts, mesh)

    def operands_for(self, call: Call, want: Layout) -> tuple[Layout, ...] | None:
        return None if any(map(_is_mask, call.args[1])) else FactorRule(self._names).operands_for(call, want)

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        # rows of an index tensor are rows of the result, but splitting starts at the result:
        # an index is cheap, the table's rows are what costs
        if any(map(_is_mask, call.args[1])):
            return []
        return [p for p in FactorRule(self._names).back(call, pos) if p[0] == 0]


class IndexPutRule(Rule):
    """index_put(x, indices, values): rows of other dimensions pass through, indexed ones are whole."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        given = _indexed(call)
        x, values = layouts[0].summed(), len(call.shapes) - 1
        tail = len(call.shape) - 1 - max(given)  # trailing dimensions that are not indexed
        dims, gathers = [], []
        for i, dim in enumerate(x.dims):
            free = i > max(given) and len(call.shapes[values]) >= len(call.shape) - i
            free = free and call.shapes[values][i - len(call.shape)] == call.shape[i]
            if not free and not dim.is_whole:
                gathers.append(Gather(0, _ANY_ROW))
            dims.append(dim if free else Dim.whole(dim.size))
        inputs = [Layout(tuple(dims))]
        for k, shape in enumerate(call.shapes[1:], start=1):
            layout = Layout.whole(shape)
            if k == values:
                for j in range(min(tail, len(shape))):
                    if shape[-1 - j] == call.shape[-1 - j]:
                        layout = layout.with_dim(len(shape) - 1 - j, dims[-1 - j])
            inputs.append(layout)
        return Decision(tuple(inputs), (inputs[0],), tuple(gathers))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        return [(0, pos)] if pos.dim not in _indexed(call) else []  # rows that any index may write begin here


class IndexCopyRule(FactorRule):
    """index_copy, index_add: other dimensions pass through, the indexed one is whole."""

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        d = call.arg(1, "dim") % max(1, len(call.shape))
        return [] if pos.dim == d else super().back(call, pos)  # rows that any index may write begin here


register(["aten::index_copy", "aten::index_add"], IndexCopyRule(_index_copy))
register("aten::embedding", FactorRule(_embedding))
register("aten::gather", FactorRule(_gather))
register("aten::bucketize", FactorRule(_bucketize))
register("aten::index_select", FactorRule(_index_select))
register(["aten::index", "aten::_unsafe_index"], IndexRule())
register(["aten::index_put", "aten::_unsafe_index_put"], IndexPutRule())
