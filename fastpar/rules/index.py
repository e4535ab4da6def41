"""Indexing: the indexed dimension of the table is whole, everything else passes through."""

from __future__ import annotations

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
        boolean = any(
            n.meta["val"].dtype.is_floating_point is False and n.meta["val"].element_size() == 1
            for n in call.operands[1:]
        )
        if boolean:  # a mask: the result's size depends on values
            return super().decide(call, layouts, mesh)
        return FactorRule(self._names).decide(call, layouts, mesh)

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        # rows of an index tensor are rows of the result, but splitting starts at the result:
        # an index is cheap, the table's rows are what costs
        return [p for p in FactorRule(self._names).back(call, pos) if p[0] == 0]


class IndexPutRule(Rule):
    """index_put(x, indices, values): rows of other dimensions pass through, indexed ones are whole."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        indices = list(call.args[1])
        given = {i for i, x in enumerate(indices) if x is not None}
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
        return [(0, pos)]


register("aten::embedding", FactorRule(_embedding))
register("aten::gather", FactorRule(_gather))
register("aten::index_select", FactorRule(_index_select))
register(["aten::index", "aten::_unsafe_index"], IndexRule())
register(["aten::index_put", "aten::_unsafe_index_put"], IndexPutRule())
