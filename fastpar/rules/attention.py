"""Attention (``fastpar::attention``): batch, heads and query rows pass through.

Split query rows against whole keys are local. Split keys stay split here: attention over
split keys is what the ``attention-*`` passes give a schedule to (gather, all-to-all, ring),
so the rule only makes queries and keys agree. Width is contracted and stays whole.
"""

from __future__ import annotations

from fastpar.core.layout import Atom, Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import disjoint
from fastpar.rules.factor import FactorRule, Factors
from fastpar.rules.table import Call, Decision, Gather, Pos, Rule, register

_WIDTH = "every score sums over the whole width"


class AttentionRule(Rule):
    """attention(q [*lead, S, E], k [*lead, T, E], v [*lead, T, Ev], mask?, causal, scale, gqa)"""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        if all(x.is_whole for x in layouts):
            return Decision(layouts, (Layout.whole(call.shape),))
        q, k, v = (x.summed() for x in layouts[:3])
        lead = len(call.shape) - 2
        gathers: list[Gather] = []
        rows, keys = q.dims[-2], k.dims[-2]
        if v.dims[-2] != keys:
            keys = keys if not keys.is_whole else v.dims[-2]
        if not disjoint(keys):
            axes = mesh.ordered(keys.axes)
            keys = Dim.shared(keys.size, axes, mesh)
        heads: list[Dim] = []
        taken: set[str] = set()
        for d in range(lead):
            dim = self._lead(call, (q, k, v), d, mesh)
            if dim.axes & taken:
                dim = Dim.whole(dim.size)
            taken |= dim.axes
            heads.append(dim)
        if keys.axes & taken:
            keys = Dim.whole(keys.size)
        if rows.axes & taken:
            rows = Dim.whole(rows.size)
        if rows.is_whole and not keys.is_whole:
            # queries are split wherever keys are: slicing them is free and balances the work
            axes = mesh.ordered(keys.axes)
            rows = Dim.shared(rows.size, axes, mesh)
        inputs = [
            Layout((*heads, rows, Dim.whole(call.shapes[0][-1]))),
            Layout((*self._kv_lead(call, 1, heads), keys, Dim.whole(call.shapes[1][-1]))),
            Layout((*self._kv_lead(call, 2, heads), keys, Dim.whole(call.shapes[2][-1]))),
        ]
        for i, (have, want) in enumerate(zip(layouts[:3], inputs, strict=True)):
            for d, (a, b) in enumerate(zip(have.dims, want.dims, strict=True)):
                if not a.is_whole and b.is_whole:
                    width = d == len(have.dims) - 1
                    gathers.append(Gather(i, _WIDTH if width else "split over the same axis as the heads"))
        if len(layouts) > 3:
            inputs.append(mask_layout(call.shapes[3], heads, rows))
        result = Layout((*heads, rows, Dim.whole(call.shape[-1])))
        return Decision(tuple(inputs), (result,), tuple(gathers))

    def _lead(self, call: Call, qkv: tuple[Layout, ...], d: int, mesh: Mesh) -> Dim:
        """Layout of leading dimension ``d``: the first split one that all operands can follow."""
        size = call.shape[d]
        for i, x in enumerate(qkv):
            if len(x.dims) != len(call.shape) or x.dims[d].is_whole:
                continue
            if x.dims[d].size == size and all(s[d] in (1, size) for s in call.shapes[:3]):
                return x.dims[d]
            group = size // call.shapes[1][d]  # grouped heads: keys' heads are split, queries follow
            atom = x.dims[d].single
            if i > 0 and atom is not None and group * x.dims[d].size == size:
                return Dim.of([atom.scaled(group)])
            if i == 0 and atom is not None and group > 1:
                if _whole_groups(atom, group):
                    return x.dims[d]
                return Dim.shared(size, mesh.ordered(atom.axes), mesh, group)
        return Dim.whole(size)

    def _kv_lead(self, call: Call, operand: int, heads: list[Dim]) -> tuple[Dim, ...]:
        shape = call.shapes[operand]
        return tuple(kv_head_dim(dim, shape[d]) for d, dim in enumerate(heads[len(heads) - len(shape) + 2 :]))

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        rank = len(call.shape)
        if pos.dim == rank - 2:
            return [(0, pos)]
        if pos.dim == rank - 1:
            return [(2, pos)]
        found = []
        for i in range(3):
            size = call.shapes[i][pos.dim] if len(call.shapes[i]) == rank else 1
            if size == call.shape[pos.dim]:
                found.append((i, pos))
            elif 1 < size < pos.extent == call.shape[pos.dim] and pos.outer == 1:  # grouped heads
                found.append((i, Pos(pos.dim, 1, size, 1)))
        return found


class BlockRule(Rule):
    """attention_lse(q, k, v, mask?, scale, gqa) -> (out, lse [*lead, S]): keys are the block at hand."""

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        q = layouts[0]
        return Decision(layouts, (q.with_dim(len(q.dims) - 1, Dim.whole(call.shape[-1])), Layout(q.dims[:-1])))


def _merge(call: Call) -> Factors:
    """merge(out, lse, block, block_lse) -> (out, lse)"""
    rows = tuple(f"d{i}" for i in range(len(call.shapes[1])))
    names = ((*rows, "e"), rows)
    return Factors((*names, *names), names)


def _whole_groups(atom: Atom, group: int) -> bool:
    """Whether no rank has a part of the ``group`` query heads that share one of the keys'."""
    return len(atom.segs) == 1 and not atom.segs[0].offsets and all(part % group == 0 for part in atom.segs[0].parts)


def kv_head_dim(dim: Dim, size: int) -> Dim:
    """Layout of a leading dimension of k or v that goes with ``dim`` of q (grouped or broadcast heads)."""
    if dim.size == size:  # one row too, which a rank may have and the others not: of a batch, say
        return dim
    if dim.is_whole or size == 1:
        return Dim.whole(size)
    atom = dim.single
    assert atom is not None and len(atom.segs) == 1, "grouped heads are split as one segment"
    group, seg = dim.size // size, atom.segs[0]
    return Dim.split(size, seg.axes, tuple(p // group for p in seg.parts))


def mask_layout(shape: tuple[int, ...], heads: list[Dim] | tuple[Dim, ...], rows: Dim) -> Layout:
    """Layout of a mask that broadcasts to [*heads, rows, keys]: it goes with heads and rows, keys whole."""
    full = [*heads, rows, None]
    dims = []
    for size, dim in zip(shape, full[len(full) - len(shape) :], strict=True):
        dims.append(dim if dim is not None and dim.size == size > 1 else Dim.whole(size))
    return Layout(tuple(dims))


register("fastpar::attention", AttentionRule())
register("fastpar::attention_lse", BlockRule())
register("fastpar::merge", FactorRule(_merge))
