"""Convolution, group norm, pads and pooling.

A convolution over split rows reads a *window* of its input: the rows that the rank's own
output rows need, its neighbours' halo rows included. Windows are a layout like any other
(segments with offsets), so the halo exchange is a redistribute, of any width, over as many
ranks as it takes, with parts of any size. Output row o belongs to the rank that holds the input
row o * stride. Zero padding is written out first (``aten.constant_pad_nd``; only the first and
the last rank add rows), so that every window is a plain range of the padded rows.

Patch embeddings never come here: capture turns a convolution whose kernel is its stride into
a matrix product over tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from fastpar.core.layout import Atom, Dim, Layout, Partial, Seg
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import disjoint, split_atom
from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, Decision, Gather, Localised, Pos, Rule, register, rows_before, whole_decision

_WINDOW = "a window reaches over the rows of other ranks"
_CHANNELS = "channels are contracted"


class ConvolutionRule(Rule):
    """convolution(x [N, C, *S], weight, bias, stride, padding, dilation, transposed, outpad, groups)"""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        x = layouts[0].summed()
        dims, outs, gathers = [x.dims[0]], [x.dims[0]], []
        taken = set(x.dims[0].axes)
        channels, filters = self._channels(call, layouts, taken)
        depthwise = _depthwise(call)
        if not depthwise:
            channels = self._contracted(call, layouts, taken | filters.axes, mesh)
        taken |= filters.axes | channels.axes
        if channels.is_whole and not x.dims[1].is_whole:
            gathers.append(Gather(0, _CHANNELS))
        dims.append(channels)
        outs.append(filters)
        for d in range(2, len(call.shape)):
            dim = x.dims[d]
            found = None if dim.is_whole or dim.axes & taken else self.windows(call, dim, d)
            if found is None:
                if not dim.is_whole:
                    gathers.append(Gather(0, self._why_not(call, dim, d)))
                dims.append(Dim.whole(dim.size))
                outs.append(Dim.whole(call.shape[d]))
            else:
                taken |= dim.axes
                dims.append(found[0])
                outs.append(found[1])
        weight = Layout.whole(call.shapes[1])
        weight = weight if filters.is_whole else weight.with_dim(0, filters)
        partial: tuple[Partial, ...] = ()
        if not depthwise and not channels.is_whole:
            weight = weight.with_dim(1, channels)
            partial = (Partial("sum", mesh.ordered(channels.axes)),)
        inputs = [Layout(tuple(dims)), weight]
        if len(layouts) > 2:
            inputs.append(Layout((filters,)))
        return Decision(tuple(inputs), (Layout(tuple(outs), partial),), tuple(gathers))

    def _contracted(self, call: Call, layouts: tuple[Layout, ...], taken: set[str] | frozenset[str], mesh: Mesh) -> Dim:
        """Layout of input channels that are summed over: split, the result is partial (a bias is added afterwards)."""
        whole = Dim.whole(call.shapes[0][1])
        if not contracts(call) or len(layouts) > 2:
            return whole
        dim = next((d for d in (layouts[0].dims[1], layouts[1].dims[1]) if not d.is_whole), whole)
        if dim.axes & taken:
            return whole
        axes = mesh.ordered(dim.axes)
        return dim if disjoint(dim) else Dim.shared(dim.size, axes, mesh)

    def _channels(self, call: Call, layouts: tuple[Layout, ...], taken: set[str]) -> tuple[Dim, Dim]:
        """Layouts of input channels and filters: split together where the convolution is depthwise."""
        filters = layouts[1].dims[0]
        if call.arg(6, "transposed"):  # its weight is [C, filters / groups, ...]
            return Dim.whole(call.shapes[0][1]), Dim.whole(call.shape[1])
        if _depthwise(call):
            dim = layouts[0].dims[1] if not layouts[0].dims[1].is_whole else filters
            if not dim.axes & taken:
                return dim, dim
        if filters.axes & taken or call.arg(8, "groups") != 1:
            filters = Dim.whole(filters.size)
        return Dim.whole(call.shapes[0][1]), filters

    def _geometry(self, call: Call, d: int) -> tuple[int, int, int]:
        """(stride, padding, reach) of dimension ``d``: an output row reads ``reach`` input rows."""

        def at(index: int, name: str) -> int:
            given = call.arg(index, name)
            return int(given[d - 2] if len(given) > 1 else given[0])

        return at(3, "stride"), at(4, "padding"), at(5, "dilation") * (call.shapes[1][d] - 1) + 1

    def padding(self, call: Call, layout: Layout) -> list[int]:
        """Zero rows to add on each side of every dimension that is split (0 elsewhere): see ``decide``."""
        out = [0] * len(call.shape)
        for d in range(2, len(call.shape)):
            if not layout.dims[d].is_whole and not call.arg(6, "transposed"):
                out[d] = self._geometry(call, d)[1]
        return out

    def windows(self, call: Call, dim: Dim, d: int) -> tuple[Dim, Dim] | None:
        """What each rank reads of ``dim`` and which output rows it then has; None where it must be whole.

        A dimension that is windows already stays as it is.
        """
        stride, padding, reach = self._geometry(call, d)
        if call.arg(6, "transposed") or padding:
            return None
        if stride == reach == 1 and disjoint(dim):
            return dim, dim  # no row looks at another, whatever was merged
        atom = dim.single
        if atom is None or not all(s.axes == atom.segs[0].axes for s in atom.segs):
            return None
        axes = atom.segs[0].axes
        if len(atom.segs) == 1 and atom.segs[0].offsets:
            seg = atom.segs[0]
            counts = tuple((p - reach) // stride + 1 if p >= reach else 0 for p in seg.parts)
            return (dim, Dim.split(call.shape[d], axes, counts)) if sum(counts) == call.shape[d] else None
        ends, total = [], 0
        for c in range(len(atom.segs[0].parts)):  # rows follow each other over ranks, whatever the segments
            total += sum(s.parts[c] for s in atom.segs)
            ends.append(total)
        # output row o is computed where the row is that it stands for: behind the padding in front, so
        # that "same" and causal convolutions keep the parts they were given; else its window's centre
        front = atom.segs[0]
        padding = front.size if len(atom.segs) > 1 and front.parts[0] == front.size else reach // 2
        anchor = min(padding, reach - 1)
        cuts = [0, *(min(call.shape[d], max(0, -(-(end - anchor) // stride))) for end in ends[:-1]), call.shape[d]]
        counts = tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))
        starts = tuple(min(a * stride, dim.size) if n else 0 for a, n in zip(cuts, counts, strict=False))
        lengths = tuple((n - 1) * stride + reach if n else 0 for n in counts)
        window = Dim.of([Atom((Seg(dim.size, axes, lengths, starts),))])
        return window, Dim.split(call.shape[d], axes, counts)

    def _why_not(self, call: Call, dim: Dim, d: int) -> str:
        if call.arg(6, "transposed"):
            return "a transposed convolution over split rows"
        return "rows and columns are split over the same axis" if dim.single else "a window over merged dimensions"

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        if pos.dim == 0:
            return [(0, pos)]
        if pos.dim == 1 and (_depthwise(call) or contracts(call)):
            filters = Pos(0, pos.outer, pos.size, pos.inner)
            held = [(i, filters) for i in range(1, len(call.shapes))]
            return [(0, pos), *held] if _depthwise(call) else held
        if pos.dim > 1:
            return [(0, p) for p in rows_before(pos, call.shape[pos.dim], call.shapes[0][pos.dim])]
        return []

    def carries(self, call: Call, marked: list[set[int]]) -> set[int]:
        return {d for d in marked[0] if d != 1}

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        groups = call.arg(8, "groups")
        if groups > 1 and not ins[1].dims[0].is_whole:
            groups = ins[1].local_shape(mesh, rank)[0]
        shape = outs[0].local_shape(mesh, rank)
        if 0 in shape or 0 in ins[0].local_shape(mesh, rank):  # a kernel has nothing to run on
            return torch.ops.aten.new_zeros.default, (call.args[0], list(shape)), {}
        return call.node.target, (*call.args[:8], groups), {}


def contracts(call: Call) -> bool:
    """Whether a convolution sums over all input channels, with filters in front in its weight."""
    return call.arg(8, "groups") == 1 and not call.arg(6, "transposed")


def _depthwise(call: Call) -> bool:
    """One filter per channel. With a single channel it is an ordinary convolution just as well."""
    return not call.arg(6, "transposed") and call.arg(8, "groups") == call.shapes[0][1] == call.shape[1]


class PadRule(Rule):
    """constant_pad_nd: the first rank adds the rows in front, the last one those behind."""

    def _pads(self, call: Call) -> list[tuple[int, int]]:
        pad = list(call.arg(1, "pad"))
        pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
        return [(0, 0)] * (len(call.shape) - len(pairs)) + pairs

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        want, dims, gathers = layouts[0].summed(), [], []
        for d, (before, after) in enumerate(self._pads(call)):
            dim = padded(want.dims[d], before, after)
            if dim is None:
                gathers.append(Gather(0, "padding of merged dimensions"))
                want = want.with_dim(d, Dim.whole(want.dims[d].size))
                dim = Dim.whole(call.shape[d])
            dims.append(dim)
        return Decision((want,), (Layout(tuple(dims)),), tuple(gathers))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        return [(0, p) for p in rows_before(pos, call.shape[pos.dim], call.shapes[0][pos.dim])]

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        pads: list[int] = []
        for (before, after), dim in zip(self._pads(call), ins[0].dims, strict=True):
            if not dim.is_whole:
                axes = mesh.ordered(dim.axes)
                at, last = mesh.coordinate(rank, axes), mesh.size(axes) - 1
                before, after = (before if at == 0 else 0), (after if at == last else 0)
            pads = [before, after, *pads]
        return call.node.target, (call.args[0], pads, *call.args[2:]), call.kwargs


def padded(dim: Dim, before: int, after: int) -> Dim | None:
    """``dim`` with rows added in front on the first rank and behind on the last; None where not local."""
    if dim.is_whole:
        return Dim.whole(dim.size + before + after)
    if before == after == 0:
        return dim
    atom = dim.single
    if atom is None or before < 0 or after < 0 or any(s.offsets or not s.axes for s in atom.segs):
        return None
    axes = atom.segs[0].axes
    if any(s.axes != axes for s in atom.segs):
        return None
    rest = (0,) * (len(atom.segs[0].parts) - 1)
    return Dim.of([Atom((Seg(before, axes, (before, *rest)), *atom.segs, Seg(after, axes, (*rest, after))))])


def _group_norm(call: Call) -> Factors:
    """native_group_norm(x [N, C, *S], weight, bias, N, C, HxW, groups, eps) -> (y, mean, rstd)"""
    names = ("n", *(f"d{i}" for i in range(1, len(call.shapes[0]))))
    whole = {n: "statistics run over channels and rows" for n in names[1:]} | {"g": ""}
    operands = (names,) + (("d1",),) * (len(call.shapes) - 1)
    return Factors(operands, (names,) + (("n", "g"),) * (len(call.results) - 1), whole=whole)


class GroupNormRule(FactorRule):
    """Channels stay split where every rank has whole groups; its arguments name the batch, which is local."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        groups = self.groups(call, layouts[0], mesh)
        if groups is None:
            return super().decide(call, layouts, mesh)
        x = layouts[0].summed()
        statistics = Layout((x.dims[0], groups))
        return Decision(
            (x, *(Layout((x.dims[1],)) for _ in layouts[1:])), (x, *[statistics] * (len(call.results) - 1))
        )

    def groups(self, call: Call, layout: Layout, mesh: Mesh) -> Dim | None:
        """Layout of the groups where only channels (and the batch) are split, whole groups to every rank."""
        channels, count = layout.dims[1], call.arg(6, "group")
        atom = channels.single
        if channels.is_whole or atom is None or any(not d.is_whole for d in layout.dims[2:]):
            return None
        halves = split_atom(atom, count)
        if halves is None or any(channels.local(mesh, r) == 0 for r in range(mesh.ranks)):
            return None
        return Dim.of([halves[0]])

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        count = call.arg(6, "group")
        if pos.dim == 1 and pos.outer == 1 and pos.extent == call.shape[1] and pos.size % count == 0:
            pos = Pos(1, 1, count, call.shape[1] // count)  # channels go in whole groups
        return super().back(call, pos)

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        args = list(call.args)
        args[3], args[4] = outs[0].local_shape(mesh, rank)[:2]
        if len(outs) > 1:
            args[6] = outs[1].local_shape(mesh, rank)[1]
        return call.node.target, tuple(args), call.kwargs


class WindowRule(FactorRule):
    """Keeps all leading dimensions; the last ``spatial`` ones are whole and may change size.

    ``rows``: these can be split nevertheless, since the operator is then written out (``sharding/expand_spatial.py``,
    ``expand_resample.py``).
    """

    def __init__(self, spatial: int, rows: bool = False) -> None:
        self.rows = rows

        def factors(call: Call) -> Factors:
            lead = tuple(f"d{i}" for i in range(len(call.shape) - spatial))
            inside = tuple(f"s{i}" for i in range(spatial))
            outside = tuple(f"o{i}" for i in range(spatial))
            whole = dict.fromkeys((*inside, *outside), _WINDOW)
            return Factors(((*lead, *inside),), ((*lead, *outside),) * len(call.results), whole=whole)

        super().__init__(factors)

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        if self.rows and pos.dim > 1 and len(call.shape) == len(call.shapes[0]):
            return [(0, p) for p in rows_before(pos, call.shape[pos.dim], call.shapes[0][pos.dim])]
        return super().back(call, pos)

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        found = super().decide(call, layouts, mesh)
        if len(call.results) > 1 and any(0 in found.outputs[0].local_shape(mesh, r) for r in range(mesh.ranks)):
            return whole_decision(call, layouts, "a rank without channels has nothing to pool, and no indices")
        return found

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        shape = outs[0].local_shape(mesh, rank)
        if 0 in shape:  # kernels take no channels at all for a mistake
            return torch.ops.aten.new_zeros.default, (call.args[0], list(shape)), {}
        return super().localise(call, ins, outs, mesh, rank)


def pad_arguments(pads: list[int]) -> list[Any]:
    """``pads`` rows on both sides of each dimension, as constant_pad_nd takes them (last dimension first)."""
    return [p for n in reversed(pads) for p in (n, n)]


CONVOLUTION = ConvolutionRule()
register("aten::convolution", CONVOLUTION)
register("aten::native_group_norm", GroupNormRule(_group_norm))
register("aten::constant_pad_nd", PadRule())
for _n in (1, 2, 3):
    register(
        [f"aten::avg_pool{_n}d", f"aten::_adaptive_avg_pool{_n}d", f"aten::adaptive_avg_pool{_n}d",
         f"aten::max_pool{_n}d_with_indices", f"aten::replication_pad{_n}d", f"aten::reflection_pad{_n}d"],  # fmt: skip
        WindowRule(_n, rows=True),
    )
