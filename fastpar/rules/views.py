"""Views and data movement: reshape, permute, slice, concatenate, expand, repeat.

Reshapes regroup atoms (``fastpar.core.regroup``). Where a new boundary falls inside a
part, the rows are realigned to parts that it does divide (they stay split); only where
no such parts exist is the dimension gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastpar.core.layout import Atom, Dim, Layout, Seg, filling_parts
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import Misfit, cat_dims, disjoint, regroup, slice_dim
from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, Decision, Gather, Localised, Pos, Rule, register

VIEWS = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::view_copy", "aten::_reshape_copy",
         "aten::_reshape_alias")  # fmt: skip


def _replace(call: Call, index: int, name: str, value: Any, target: Any = None) -> Localised:
    target = target or call.node.target
    if len(call.args) > index:
        return target, (*call.args[:index], value, *call.args[index + 1 :]), call.kwargs
    return target, call.args, {**call.kwargs, name: value}


class ViewRule(Rule):
    """view, reshape: ``args = (x, shape)``."""

    localises_whole = True  # whole values may have been gathered into another memory order

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        (x,) = layouts
        want = x.summed()
        gathers: list[Gather] = []
        for _ in range(2 * len(want.dims) + 1):
            dims = regroup(want.dims, call.shape)
            if not isinstance(dims, Misfit):
                return Decision((want,), (Layout(dims),), tuple(gathers))
            size = want.dims[dims.dim].size
            axes = mesh.ordered(want.dims[dims.dim].axes)
            n = mesh.size(axes)
            # realigning pays where work on the rows follows; at the end they are gathered anyway
            first = not call.tail and not any(g.kind == "realign" for g in gathers)
            if first and dims.unit > 1 and size % dims.unit == 0 and 2 * size >= n * dims.unit:
                realigned = Dim.shared(size, axes, mesh, dims.unit)
                gathers.append(
                    Gather(0, f"the view cuts rows into multiples of {dims.unit}", kind="realign")
                )
                want = want.with_dim(dims.dim, realigned)
            else:
                gathers = [g for g in gathers if g.kind != "realign"]
                gathers.append(Gather(0, "the view cuts a dimension where no part ends"))
                want = want.with_dim(dims.dim, Dim.whole(size))
        raise AssertionError("a view of a whole tensor is local")

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        found = view_back(call.shapes[0], call.shape, pos)
        return [] if found is None else [(0, found)]

    def carries(self, call: Call, marked: list[set[int]]) -> set[int]:
        if math.prod(call.shape) == 0:
            return set()
        spans = _spans(call.shapes[0])
        held = [spans[d] for d in marked[0]]
        return {
            d
            for d, (low, high) in enumerate(_spans(call.shape))
            if any(low < top and bottom < high for bottom, top in held if low < high and bottom < top)
        }

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        # reshape: a view of a whole tensor need not be one of a part that arrived in another memory order
        return _replace(call, 1, "size", list(outs[0].local_shape(mesh, rank)), torch.ops.aten.reshape.default)


def _spans(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Per dimension, the span of strides that it covers in row-major order."""
    out, below = [], 1
    for size in reversed(shape):
        out.append((below, below * size))
        below *= size
    return out[::-1]


def view_back_major(shape: tuple[int, ...], view: tuple[int, ...], pos: Pos) -> Pos | None:
    """Of the dimensions of ``shape`` that together hold the factor ``pos`` of ``view``: what the outermost has of it.

    Heads x width, of which a merged dimension is made, can be cut between heads only.
    """
    low = pos.inner * math.prod(view[pos.dim + 1 :])
    high, below = low * pos.size, 1
    for dim in reversed(range(len(shape))):
        above = below * shape[dim]
        if below < high <= above:
            unit = max(below, low)
            if above % high or high % unit or unit % below or unit % low:
                return None
            return Pos(dim, above // high, high // unit, unit // below)
        below = above
    return None


def view_back(shape: tuple[int, ...], view: tuple[int, ...], pos: Pos) -> Pos | None:
    """The factor ``pos`` of ``view`` as a factor of one dimension of ``shape``, if it is one."""
    inner = pos.inner * math.prod(view[pos.dim + 1 :])
    below = 1
    for dim in reversed(range(len(shape))):
        above = below * shape[dim]
        if shape[dim] > 1 and below <= inner < above or shape[dim] == pos.size == 1 and below == inner:
            if inner % below or above % (inner * pos.size):
                return None
            return Pos(dim, above // (inner * pos.size), pos.size, inner // below)
        below = above
    return None


def factors_of(shape: tuple[int, ...], view: tuple[int, ...], pos: Pos) -> list[tuple[int, int]]:
    """What the factor ``pos`` of ``view`` has of each dimension of ``shape``: how much of it is above, and the size."""
    low = pos.inner * math.prod(view[pos.dim + 1 :])
    high = low * pos.size
    ends = [(max(low, bottom), min(high, top)) for bottom, top in _spans(shape)]
    return [(high // top, top // bottom) for bottom, top in ends
            if bottom < top and top % bottom == 0 and high % top == 0]  # fmt: skip


class ExpandRule(Rule):
    """expand: existing dimensions pass, new and broadcast ones are whole."""

    def _map(self, call: Call) -> list[int | None]:
        """Input dimension of each result dimension (None for new and broadcast ones)."""
        shape, out = call.shapes[0], call.shape
        shift = len(out) - len(shape)
        return [
            i - shift if i >= shift and shape[i - shift] == out[i] else None for i in range(len(out))
        ]

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        (x,) = layouts
        # a split dimension of one row that broadcasts lives on one rank only
        source = self._map(call)
        want, gathers = x.summed(), []
        for d, dim in enumerate(x.dims):
            if not dim.is_whole and d not in source:
                want = want.with_dim(d, Dim.whole(dim.size))
                gathers.append(Gather(0, "one row is broadcast to every rank"))
        dims = tuple(
            want.dims[s] if s is not None else Dim.whole(n) for s, n in zip(source, call.shape, strict=True)
        )
        return Decision((want,), (Layout(dims),), tuple(gathers))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        source = self._map(call)[pos.dim]
        return [] if source is None else [(0, Pos(source, pos.outer, pos.size, pos.inner))]

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        return _replace(call, 1, "size", list(outs[0].local_shape(mesh, rank)))


class RepeatRule(Rule):
    """repeat: r copies of a split dimension are the product of r and it, so it stays split."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        want = layouts[0].summed()
        repeats = call.arg(1, "repeats")
        shift = len(repeats) - len(want.dims)
        dims = [Dim.whole(r) for r in repeats[:shift]]
        for r, dim in zip(repeats[shift:], want.dims, strict=True):
            dims.append(Dim.of([Atom((Seg(int(r)),)), *dim.atoms]))
        return Decision((want,), (Layout(tuple(dims)),))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        shift = len(call.shape) - len(call.shapes[0])
        d = pos.dim - shift
        if d < 0:
            return []
        size = call.shapes[0][d]
        if size % (pos.size * pos.inner):
            return []
        return [(0, Pos(d, size // (pos.size * pos.inner), pos.size, pos.inner))]


class SliceRule(Rule):
    """slice: ``args = (x, dim, start, end, step)``; each rank keeps what it has of the rows."""

    def _range(self, call: Call) -> tuple[int, int, int, int]:
        shape = call.shapes[0]
        dim = call.arg(1, "dim", 0) % len(shape)
        start, end = call.arg(2, "start"), call.arg(3, "end")
        start, stop, step = slice(start, end, call.arg(4, "step", 1)).indices(shape[dim])
        return dim, start, max(start, stop), step

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        want = layouts[0].summed()
        d, start, stop, step = self._range(call)
        gathers: list[Gather] = []
        before = want.dims[d]
        dim = slice_dim(before, start, stop, step)
        if dim is None or (step > 1 and not _one_slice(before, start, stop, step, mesh)):
            axes = mesh.ordered(before.axes)
            reason = "a slice through merged dimensions" if dim is None else "every so many rows, across two segments"
            even = Dim.whole(before.size) if call.tail else Dim.shared(before.size, axes, mesh)
            gathers.append(Gather(0, reason, kind="gather" if call.tail else "realign"))
            want = want.with_dim(d, even)
            dim = slice_dim(even, start, stop, step)
            assert dim is not None, "one segment is sliced locally"
        return Decision((want,), (want.with_dim(d, dim),), tuple(gathers))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        d, start, stop, step = self._range(call)
        if pos.dim != d:
            return [(0, pos)]
        if pos.outer == pos.inner == 1 and step == 1:
            # the sliced dimension holds these rows among others: they are split together
            return [(0, Pos(d, 1, call.shapes[0][d], 1))]
        return []

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        d, start, stop, step = self._range(call)
        kept = _kept(ins[0].dims[d], start, stop, step, mesh, rank)
        low, high = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (0, 0)
        return call.node.target, (call.args[0], d, low, high, step), {}


def _kept(dim: Dim, start: int, stop: int, step: int, mesh: Mesh, rank: int) -> np.ndarray:
    """Local indices of the rows ``start:stop:step`` on ``rank``."""
    rows = dim.rows(mesh, rank)
    return np.flatnonzero((rows >= start) & (rows < stop) & ((rows - start) % step == 0))


def _one_slice(dim: Dim, start: int, stop: int, step: int, mesh: Mesh) -> bool:
    """True where every rank's rows ``start:stop:step`` are a slice with that step of what it holds.

    Within a segment they are; where a rank goes from one to the next, the step may be another.
    """
    return all(
        bool((np.diff(_kept(dim, start, stop, step, mesh, rank)) == step).all()) for rank in range(mesh.ranks)
    )


class CatRule(Rule):
    """cat: ranks concatenate what they have; a whole operand beside a split one is sliced, free."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        d = call.arg(1, "dim", 0) % len(call.shape)
        used = [i for i, s in enumerate(call.shapes) if len(s) == len(call.shape)]
        layouts = tuple(x.summed() for x in layouts)
        gathers: list[Gather] = []
        dims: list[Dim] = []
        along: dict[int, Dim] = {}
        for k in range(len(call.shape)):
            ballot: dict[Dim, int] = {}
            for i in used:
                if not layouts[i].dims[k].is_whole:
                    ballot[layouts[i].dims[k]] = ballot.get(layouts[i].dims[k], 0) + call.bytes(i)
            best = max(ballot, key=lambda x: ballot[x]) if ballot else None
            if k != d:
                dims.append(best or Dim.whole(call.shape[k]))
                continue
            along = {i: layouts[i].dims[d] for i in used}
            if best is not None:
                axes = mesh.ordered(best.axes)
                # every row on one rank: a segment that stayed whole would be counted twice
                cut = [i for i, x in along.items() if x.axes != best.axes or not disjoint(x) or len(x.atoms) > 1]
                held = _held([along[i] for i in used if i not in cut], axes, mesh)
                for i in cut:
                    size = call.shapes[i][d]
                    if len(along[i].atoms) > 1:
                        gathers.append(Gather(i, "a concatenation behind a merged dimension", "realign"))
                    parts = filling_parts(size, mesh.shares(axes), held)
                    along[i] = Dim.split(size, axes, parts)
                    held = [h + part for h, part in zip(held, parts, strict=True)]
            dims.append(cat_dims([along[i] for i in used]) or Dim.whole(call.shape[d]))
        # one mesh axis splits one dimension: the concatenated one gives way to no other
        for k in range(len(dims)):
            if k != d and dims[k].axes & dims[d].axes:
                dims[k] = Dim.whole(call.shape[k])
            for j in range(k):
                if d not in (j, k) and dims[k].axes & dims[j].axes:
                    dims[k] = Dim.whole(call.shape[k])
        inputs = []
        for i, shape in enumerate(call.shapes):
            if i not in used:  # legacy: an empty 1-D tensor among the operands
                inputs.append(Layout.whole(shape))
                continue
            inputs.append(Layout((*dims[:d], along[i], *dims[d + 1 :])))
            for have, want in zip(layouts[i].dims, inputs[i].dims, strict=True):
                if want.is_whole and not have.is_whole:
                    gathers.append(Gather(i, "two dimensions of one operator are split over the same axis"))
        return Decision(tuple(inputs), (Layout(tuple(dims)),), tuple(gathers))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        d = call.arg(1, "dim", 0) % len(call.shape)
        used = [i for i, s in enumerate(call.shapes) if len(s) == len(call.shape)]
        if pos.dim != d:
            return [(i, pos) for i in used]
        if pos.outer == pos.inner == 1:
            return [(i, Pos(d, 1, call.shapes[i][d], 1)) for i in used if call.shapes[i][d] > 0]
        return []


def _held(dims: Sequence[Dim], axes: tuple[str, ...], mesh: Mesh) -> list[int]:
    """Rows of ``dims``, split over these axes only, at every coordinate along them."""
    at = {mesh.coordinate(rank, axes): rank for rank in range(mesh.ranks)}
    return [sum(dim.local(mesh, at[c]) for dim in dims) for c in range(mesh.size(axes))]


def _permute(call: Call) -> Factors:
    names = tuple(f"d{i}" for i in range(len(call.shapes[0])))
    if call.name.startswith("aten::permute"):
        order = [p % len(names) for p in call.arg(1, "dims")]
    elif call.name in ("aten::t", "aten::t_copy", "aten::numpy_T"):
        order = list(reversed(range(len(names))))
    elif call.name.startswith("aten::movedim"):
        raise AssertionError("movedim is decomposed at capture")
    else:
        a, b = call.args[1] % len(names), call.args[2] % len(names)
        order = list(range(len(names)))
        order[a], order[b] = order[b], order[a]
    return Factors((names,), (tuple(names[p] for p in order),))


def _unsqueeze(call: Call) -> Factors:
    names = [f"d{i}" for i in range(len(call.shapes[0]))]
    at = call.arg(1, "dim") % (len(names) + 1)
    return Factors((tuple(names),), ((*names[:at], None, *names[at:]),))


def _squeeze(call: Call) -> Factors:
    shape = call.shapes[0]
    dims = call.arg(1, "dim", None)
    wanted = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(shape) for d in wanted if shape[d] == 1} if shape else set()
    names = tuple(f"d{i}" for i in range(len(shape)))
    whole = {names[i]: "one row that every rank needs" for i in gone}
    return Factors((names,), (tuple(n for i, n in enumerate(names) if i not in gone),), whole=whole)


def reversed_dim(dim: Dim) -> Dim:
    """What the ranks hold of ``dim`` counted from its other end, each keeping the rows that it has."""

    def turned(seg: Seg) -> Seg:
        starts = [seg.size - start - part for start, part in zip(seg.starts(), seg.parts, strict=True)]
        return Seg(seg.size, seg.axes, seg.parts, tuple(starts)) if seg.axes else seg

    return Dim.of(Atom(tuple(map(turned, reversed(atom.segs)))) for atom in dim.atoms)


class FlipRule(Rule):
    """flip: every rank turns round what it has, which is then in the place of another rank's rows."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        have = layouts[0].summed()
        dims = {d % len(call.shape) for d in call.arg(1, "dims")}
        out = Layout(tuple(reversed_dim(x) if d in dims else x for d, x in enumerate(have.dims)))
        return Decision((have,), (out,), ())

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        return [(0, pos)]


def _dims_whole(reason: str, argument: int, name: str) -> FactorRule:
    """Same shape or with one dimension dropped; the named dimensions must be whole."""

    def factors(call: Call) -> Factors:
        shape = call.shapes[0]
        given = call.arg(argument, name, 0)
        dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)} if shape else set()
        names = tuple(f"d{i}" for i in range(len(shape)))
        kept = names if len(call.shape) == len(shape) else tuple(
            n for i, n in enumerate(names) if i not in dims
        )
        whole = {names[d]: reason for d in dims}
        return Factors((names,), (kept,) * len(call.results), whole=whole, turns=False)  # see sharding/expand_rows.py

    return FactorRule(factors)


register(VIEWS, ViewRule())
register(["aten::expand", "aten::expand_copy"], ExpandRule())
register("aten::repeat", RepeatRule())
register(["aten::slice", "aten::slice_copy"], SliceRule())
register("aten::cat", CatRule())
register(
    ["aten::permute", "aten::permute_copy", "aten::t", "aten::t_copy", "aten::transpose",
     "aten::transpose_copy", "aten::numpy_T"],  # fmt: skip
    FactorRule(_permute),
)
register(["aten::unsqueeze", "aten::unsqueeze_copy"], FactorRule(_unsqueeze))
register(["aten::squeeze", "aten::squeeze_copy"], FactorRule(_squeeze))
register(["aten::select", "aten::select_copy"], _dims_whole("one row that every rank needs", 1, "dim"))
register("aten::flip", FlipRule())
register("aten::roll", _dims_whole("rows are rolled across ranks", 2, "dims"))
