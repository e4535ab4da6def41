"""The rule table and the vocabulary that all rules share.

A rule answers three questions about one operator, never about a model:

* ``decide``: given the layouts its tensor operands come in, which layouts does it want
  them in, and what layout does its result then have?
* ``back``: which rows of which operands are these rows of the result? (read backward, to
  find what to split)
* ``localise``: what are its arguments on one rank? (sizes in arguments are global until then)

An operator without a rule wants everything whole; that is reported, never silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh


@dataclass(frozen=True)
class Pos:
    """A factor inside a tensor dimension: its ``size`` rows, ``outer`` above and ``inner`` below it.

    ``start`` is how many rows stand before all of these in the dimension: not 0 for a segment of it only.
    """

    dim: int
    outer: int
    size: int
    inner: int
    start: int = 0

    @property
    def extent(self) -> int:
        """Rows of the dimension that the factor covers."""
        return self.outer * self.size * self.inner


def rows_before(pos: Pos, after: int, before: int) -> list[Pos]:
    """The rows that ``pos`` was made from, where windows, pads or repetition made ``after`` rows of ``before``.

    Where their numbers differ, only a whole dimension can be followed: its rows are those of the whole dimension.
    """
    if before == after:
        return [pos]
    alone = (pos.outer, pos.size, pos.inner, pos.start) == (1, after, 1, 0)
    return [Pos(pos.dim, 1, before, 1)] if alone and before > 1 else []


@dataclass(frozen=True)
class Gather:
    """A communication that an operator forced and no plan asked for."""

    operand: int
    reason: str
    kind: str = "gather"  # or "realign": the rows stay split, in other parts


@dataclass(frozen=True)
class Decision:
    """Layouts that an operator wants for its tensor operands, and those of its results."""

    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    gathers: tuple[Gather, ...] = ()


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


@dataclass(frozen=True)
class Call:
    """A node of a program seen by a rule: its operator, arguments, and global shapes."""

    node: fx.Node
    name: str  # schema name, e.g. "aten::view"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[fx.Node, ...]  # tensor operands in argument order, repeats included
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]
    itemsizes: tuple[int, ...] = field(default=())
    tail: bool = False  # nothing heavy follows: a gather here is the output's

    @staticmethod
    def of(node: fx.Node, tail: bool = False) -> Call:
        target = node.target
        schema = getattr(target, "_schema", None)
        name = schema.name if schema is not None else getattr(target, "__name__", str(target))
        operands = tensor_operands(node)
        values = [n.meta["val"] for n in operands]
        return Call(
            node,
            name,
            tuple(node.args),
            dict(node.kwargs),
            operands,
            tuple(tuple(int(s) for s in v.shape) for v in values),
            tuple(tuple(int(s) for s in v.shape) for v in _tensors(node.meta.get("val"))),
            tuple(v.element_size() for v in values),
            tail,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of the only (or first) result."""
        return self.results[0]

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if len(self.args) > index:
            return self.args[index]
        return self.kwargs.get(name, default)

    def used(self) -> tuple[tuple[int, ...], ...]:
        """Global shapes of those results that something reads."""
        taken = {user.args[1] for user in self.node.users if getattr(user.target, "__name__", "") == "getitem"}
        return tuple(s for i, s in enumerate(self.results) if i in taken) if taken else self.results

    def bytes(self, operand: int) -> int:
        return math.prod(self.shapes[operand]) * self.itemsizes[operand]


def tensor_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The node's tensor operands in argument order, repeats included."""
    return tuple(
        n
        for n in pytree.tree_leaves((node.args, node.kwargs))
        if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)
    )


def is_view(node: fx.Node) -> bool:
    """Whether the operator only looks at its operand in another way, or takes one of several results."""
    if node.target in (getitem, torch.ops.aten._unsafe_view.default):
        return True
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


Localised = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Rule:
    """Default behaviour: everything whole, rows not followed, arguments as they are."""

    reason = "no rule for this operator"
    localises_whole = False  # True where a node over whole values only is written anew, too

    def decide(self, call: Call, layouts: tuple[Layout, ...], mesh: Mesh) -> Decision:
        return whole_decision(call, layouts, self.reason)

    def back(self, call: Call, pos: Pos) -> list[tuple[int, Pos]]:
        return []

    def operands_for(self, call: Call, want: Layout) -> tuple[Layout, ...] | None:
        """Layouts of whole operands cut so that the (only) result comes as ``want``; None: not to be said.

        It is ``back`` for all dimensions at once, and a guess: what ``decide`` makes of it counts.
        """
        operands = [Layout.whole(s) for s in call.shapes]
        for d, dim in enumerate(want.dims):
            if dim.is_whole:
                continue
            found = self.back(call, Pos(d, 1, dim.size, 1))
            if not found or len(want.dims) != len(call.shape):
                return None
            for i, pos in found:
                if pos.start or call.shapes[i][pos.dim] != dim.size:
                    return None
                operands[i] = operands[i].with_dim(pos.dim, dim)
        return tuple(operands)

    def carries(self, call: Call, marked: list[set[int]]) -> set[int]:
        """Dimensions of the result that hold rows of the operands' ``marked`` dimensions."""
        out = set()
        for d, size in enumerate(call.shape):
            if size > 1 and any(p.dim in marked[i] for i, p in self.back(call, Pos(d, 1, size, 1))):
                out.add(d)
        return out

    def localise(
        self, call: Call, ins: tuple[Layout, ...], outs: tuple[Layout, ...], mesh: Mesh, rank: int
    ) -> Localised:
        """(target, args, kwargs) on ``rank``; arguments still hold the graph's nodes."""
        return call.node.target, call.args, call.kwargs


def whole_decision(call: Call, layouts: tuple[Layout, ...], reason: str) -> Decision:
    """Everything whole: gathers every operand that is not."""
    gathers = tuple(Gather(i, reason) for i, x in enumerate(layouts) if not x.is_whole)
    return Decision(
        tuple(Layout.whole(s) for s in call.shapes), tuple(Layout.whole(s) for s in call.results), gathers
    )


_TABLE: dict[str, Rule] = {}
_DEFAULT = Rule()
_POINTWISE: list[Rule] = []


def register(names: str | Iterable[str], rule: Rule) -> Rule:
    """Enter ``rule`` for operators by schema name ("aten::view")."""
    for name in [names] if isinstance(names, str) else names:
        if name in _TABLE:
            raise ValueError(f"{name} has a rule already")
        _TABLE[name] = rule
    return rule


def register_pointwise(rule: Rule) -> Rule:
    """The rule of every operator that torch tags as pointwise and that has no entry of its own."""
    _POINTWISE.append(rule)
    return rule


def rule_for(call: Call) -> Rule:
    """The rule of the call's operator; the default rule (all whole, reported) where there is none."""
    rule = _TABLE.get(call.name)
    if rule is not None:
        return rule
    tags = getattr(call.node.target, "tags", ())
    if torch.Tag.pointwise in tags and len(call.results) == 1:
        return _POINTWISE[0]
    return _DEFAULT


def has_rule(call: Call) -> bool:
    """False where nothing but the default rule, which wants everything whole, is there for the operator."""
    return rule_for(call) is not _DEFAULT


def known(name: str) -> bool:
    """True where an operator has an entry of its own."""
    return name in _TABLE


def registered() -> tuple[str, ...]:
    """Names of all operators with an entry, sorted."""
    return tuple(sorted(_TABLE))


DecideFn = Callable[[Call, tuple[Layout, ...], Mesh], Decision]


def whole_dims(shape: Iterable[int]) -> tuple[Dim, ...]:
    return tuple(Dim.whole(int(s)) for s in shape)
