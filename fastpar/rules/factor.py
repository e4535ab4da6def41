"""Factor rules: an operator as an einsum-like map between dimensions.

Each operand and result dimension is named by the *factor* it carries (Shardy's
op-sharding rule). A factor passes through, is reduced (split, it leaves a partial
value), or must be whole. Everything a rule says follows from that map: what happens
forward, what rows come from where backward, and that arguments need no localising.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastpar.core.layout import Dim, Layout, Partial
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import disjoint
from fastpar.rules.table import Call, Decision, Gather, Pos, Rule

Names = tuple[str | None, ...]


@dataclass(frozen=True)
class Factors:
    """Factor of each dimension: None is a dimension of one row that broadcasts.

    ``reduced`` maps a factor to its reduction (sum, max, min); ``whole`` maps a factor
    that cannot be split to the reason. ``turns`` is whether another may be split in its place.
    """

    operands: tuple[Names, ...]
    results: tuple[Names, ...]
    reduced: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    turns: bool = True


class FactorRule(Rule):
    """A rule given by a function from a call to its factors."""

    def __init__(self, factors: Callable[[Call], Factors]) -> None:
        self.factors = factors

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        spec = self.factors(call)
        name = spec.results[0][pos.dim]
        out = []
        for i, names in enumerate(spec.operands):
            for d, other in enumerate(names):
                if name is not None and other == name and call.shapes[i][d] == call.shape[pos.dim]:
                    out.append((i, Pos(d, pos.outer, pos.size, pos.inner)))
        return out

    def operands_for(self, call: Call, want: Layout) -> tuple[Layout, ...] | None:
        spec = self.factors(call)
        if len(spec.results) != 1:
            return None
        dims = dict(zip(spec.results[0], want.dims, strict=True))
        return tuple(
            Layout(tuple(dims.get(n, Dim.whole(s)) if n else Dim.whole(s) for n, s in zip(names, shape, strict=True)))
            for names, shape in zip(spec.operands, call.shapes, strict=True)
        )

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        spec = self.factors(call)
        if all(x.is_whole for x in layouts):
            return Decision(layouts, tuple(Layout.whole(s) for s in call.results))
        chosen, reasons = self._choose(call, spec, layouts, mesh)
        if spec.turns and not call.tail:
            chosen.update(self._turned(call, spec, layouts, mesh, chosen, reasons))
        inputs, gathers = [], []
        for i, names in enumerate(spec.operands):
            dims = tuple(
                chosen.get(n, Dim.whole(s)) if n is not None else Dim.whole(s)
                for n, s in zip(names, call.shapes[i], strict=True)
            )
            inputs.append(Layout(dims))
            for n, have, want in zip(names, layouts[i].dims, dims, strict=True):
                if n in reasons and not have.is_whole and have != want:
                    elsewhere = have.axes <= inputs[-1].split_axes  # still split, along another dimension
                    gathers.append(Gather(i, reasons[n], "realign" if elsewhere else "gather"))
        over: dict[str, set[str]] = {}
        for name, op in spec.reduced.items():
            dim = chosen.get(name)
            if dim is not None and not dim.is_whole:
                over.setdefault(op, set()).update(dim.axes)
        partial = [Partial(op, mesh.ordered(axes)) for op, axes in over.items()]
        outputs = tuple(
            Layout(
                tuple(
                    chosen.get(n, Dim.whole(s)) if n is not None else Dim.whole(s)
                    for n, s in zip(names, shape, strict=True)
                ),
                tuple(partial),
            )
            for names, shape in zip(spec.results, call.results, strict=True)
        )
        return Decision(tuple(inputs), outputs, tuple(gathers))

    def _choose(
        self, call: Call, spec: Factors, layouts: tuple[Layout, ...], mesh: Mesh
    ) -> tuple[dict[str, Dim], dict[str | None, str]]:
        """One layout per factor. Whole meets split: the whole one is sliced, free. Split meets
        another split: the operand with fewer bytes moves. One mesh axis serves one factor."""
        votes: dict[str, dict[Dim, int]] = {}
        for i, names in enumerate(spec.operands):
            for name, dim in zip(names, layouts[i].dims, strict=True):
                if name is not None and not dim.is_whole:
                    ballot = votes.setdefault(name, {})
                    ballot[dim] = ballot.get(dim, 0) + call.bytes(i)
        chosen: dict[str, Dim] = {}
        reasons: dict[str | None, str] = {}
        for name, ballot in votes.items():
            if name in spec.whole:
                reasons[name] = spec.whole[name]
                continue
            dim = max(ballot, key=lambda d: ballot[d])
            op = spec.reduced.get(name)
            if op is not None:
                if not disjoint(dim):  # a row held twice would be counted twice
                    axes = mesh.ordered(dim.axes)
                    dim = Dim.shared(dim.size, axes, mesh)
                if op != "sum" and any(dim.local(mesh, r) == 0 for r in range(mesh.ranks)):
                    reasons[name] = f"a rank without rows has no {op}"
                    continue
            chosen[name] = dim
        weight = {n: sum(votes[n].values()) for n in chosen}
        for name in sorted(chosen, key=lambda n: -weight[n]):
            if name not in chosen:
                continue
            for other in list(chosen):
                shared = other != name and chosen[other].axes & chosen[name].axes
                if shared and not _one_block(spec, layouts, (name, other)):
                    if (weight[other], name) <= (weight[name], other):
                        del chosen[other]
                        reasons[other] = "two dimensions of one operator are split over the same mesh axis"
        return chosen, reasons

    def _turned(
        self,
        call: Call,
        spec: Factors,
        layouts: tuple[Layout, ...],
        mesh: Mesh,
        chosen: Mapping[str, Dim],
        reasons: Mapping[str | None, str],
    ) -> dict[str, Dim]:
        """Factors to split in the place of those that have to be whole: all of a transform's rows, some channels each.

        Where turning an operand so and its results back moves fewer bytes than gathering it: on N ranks an N-th of
        both, not all of it. The factor has to be in all results, and in all operands that were gathered otherwise.
        """
        turned: dict[str, Dim] = {}
        for name in (n for n in spec.whole if n in reasons):
            dims = {i: layouts[i].dims[names.index(name)] for i, names in enumerate(spec.operands) if name in names}
            split = [i for i, dim in dims.items() if not dim.is_whole]
            held = frozenset(x for i in split for x in dims[i].axes)
            moved = sum(call.bytes(i) for i in split)
            back = call.itemsizes[split[0]] * sum(map(math.prod, call.used()))
            ranks = mesh.size(mesh.ordered(held))
            taken = any(held & dim.axes for dim in (*chosen.values(), *turned.values()))
            if taken or moved + back >= ranks * moved:
                continue
            in_all = set.intersection(*map(set, (*spec.results, *(spec.operands[i] for i in split))))
            in_all -= {None, *spec.whole, *spec.reduced, *chosen, *turned}
            sizes = dict(zip(spec.operands[split[0]], call.shapes[split[0]], strict=True))
            free = [str(n) for n in in_all if sizes[n] >= ranks]
            if free:  # one that divides, the largest of those
                best = min(free, key=lambda n: (sizes[n] % ranks > 0, -sizes[n], n))
                turned[best] = Dim.shared(sizes[best], mesh.ordered(held), mesh)
        return turned


def _one_block(spec: Factors, layouts: tuple[Layout, ...], names: tuple[str, str]) -> bool:
    """True where all operands have both factors, each laid out the same: a rank's rows of the one and of the other
    are a block of the value already (heads of a stage's rows), and nothing is left to choose."""
    found = set()
    for operand, layout in zip(spec.operands, layouts, strict=True):
        if any(name in operand for name in names):
            found.add(tuple(layout.dims[operand.index(n)] if n in operand else None for n in names))
    return len(found) == 1 and None not in found.pop() and not any(name in spec.reduced for name in names)


def aligned(shape: tuple[int, ...], out: tuple[int, ...], prefix: str = "d") -> Names:
    """Factor names of an operand that broadcasts to ``out`` (aligned at the right)."""
    shift = len(out) - len(shape)
    return tuple(
        f"{prefix}{i + shift}" if s == out[i + shift] else None for i, s in enumerate(shape)
    )
