"""What is computed for a message is computed in the message's order: a traced program with fewer passes over memory.

A message to N peers cuts a dimension in N and puts the cut in front (``fastpar.ops.folded``):

    q [S, H, D] -> [S, N, H/N, D] -> [N, S, H/N, D], a copy

Inductor does not fuse that copy with a chain that it has already decided to write (norm, modulation and rotary
embedding are more operators than it inlines), since the two go over memory in different orders. So the cut moves up the
chain, operator by operator, as far as nothing else needs what is computed: to what products give, mostly, of which it
is a view. The chain then has the message's shape and order from its first operator to its last, and is one kernel that
writes the message. No operator is computed twice, and none is changed but in its order of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten, prims = torch.ops.aten, torch.ops.prims
_UNARY = (prims.convert_element_type.default, prims.device_put.default, aten.clone.default)
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
               aten.var_mean.correction)  # fmt: skip


def in_message_order(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Moves cuts of a traced graph up, in place."""
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is aten.permute.default and (cut := _cut(node)) is not None:
            moved = _Moved(mode, node, *cut).write()
            if moved is not None:
                node.replace_all_uses_with(moved)
    graph.eliminate_dead_code()


def _cut(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(value, dimension, parts) where ``node`` cuts a dimension, puts the cut in front, and all of it is copied."""
    view, order = node.args
    if not isinstance(view, fx.Node) or view.target is not aten.view.default or len(view.users) != 1:
        return None
    if not all(user.target is aten.clone.default for user in node.users):
        return None
    value, d = view.args[0], order[0]  # type: ignore[index]
    had, has = list(value.meta["val"].shape), list(view.meta["val"].shape)  # type: ignore[union-attr]
    front = [d, *(i for i in range(len(has)) if i != d)]
    if list(order) != front or len(has) != len(had) + 1 or d >= len(had):  # type: ignore[arg-type]
        return None
    if had[:d] != has[:d] or had[d + 1 :] != has[d + 2 :] or has[d] * has[d + 1] != had[d] or has[d] == 1:
        return None
    return value, d, has[d]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Step:
    """An operator that computes the same on a cut: where its tensors have the dimension (None: they are the same for
    all parts), and how it is written of cut ones."""

    needs: tuple[tuple[fx.Node, int | None], ...]
    write: Callable[[Sequence[Any]], tuple[Any, ...]]  # arguments, of cut tensors in the order of ``needs``


class _Moved:
    """One cut on its way up."""

    def __init__(self, mode: FakeTensorMode, node: fx.Node, top: fx.Node, dim: int, parts: int) -> None:
        self.graph, self.mode, self.node = node.graph, mode, node
        self.top, self.dim, self.parts = top, dim, parts
        self.steps: dict[fx.Node, _Step] = {}
        self.dims: dict[fx.Node, int] = {}
        self.done: dict[tuple[fx.Node, int], fx.Node] = {}
        self._find()

    def _find(self) -> None:
        """The operators that the cut passes: all that is computed of them goes into the message."""
        wanted: dict[fx.Node, set[int | None]] = {self.top: {self.dim}}
        below: set[fx.Node] = {self.node.args[0]}  # type: ignore[arg-type]
        for node in reversed(list(self.graph.nodes)):
            dims = wanted.get(node)
            if dims is None or len(dims) != 1 or not below.issuperset(node.users):
                continue
            (d,) = dims
            step = _step(node, d, self.parts) if d is not None else None
            if step is None:
                continue
            self.steps[node], self.dims[node] = step, d  # type: ignore[assignment]
            below.add(node)
            for x, dim in step.needs:
                wanted.setdefault(x, set()).add(dim)

    def write(self) -> fx.Node | None:
        """The cut value, or None where nothing is gained: the value itself is a view or used elsewhere."""
        if not any(_computes(node) for node in self.steps):
            return None
        try:
            return self._cut(self.top, self.dim)
        except RuntimeError:  # a view that the new order in memory does not allow
            return None

    def _cut(self, node: fx.Node, d: int) -> fx.Node:
        if (node, d) not in self.done:
            step = self.steps.get(node) if self.dims.get(node) == d else None
            if step is not None:
                cut = [x if dim is None else self._cut(x, dim) for x, dim in step.needs]
                self.done[node, d] = self._emit(node, node.target, step.write(cut), node.kwargs)
            else:
                shape = list(_shape(node))
                view = [*shape[:d], self.parts, shape[d] // self.parts, *shape[d + 1 :]]
                split = self._emit(node, aten.view.default, (node, view))
                order = [d, *(i for i in range(len(view)) if i != d)]
                self.done[node, d] = self._emit(node, aten.permute.default, (split, order))
        return self.done[node, d]

    def _emit(self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        with self.mode:
            value = target(*fx.map_arg(args, lambda n: n.meta["val"]), **(kwargs or {}))
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs or {})
        new.meta = {**like.meta, "val": value}
        return new


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _computes(node: fx.Node) -> bool:
    return _is_pointwise(node) or node.target in _REDUCTIONS or node.target is aten.cat.default


def _is_pointwise(node: fx.Node) -> bool:
    if node.target in _UNARY:
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _step(node: fx.Node, d: int, parts: int) -> _Step | None:
    """``node``, whose dimension ``d`` is cut, as a step; None where it does not compute the same on a cut."""
    args: Any = node.args
    if node.op != "call_function" or not args:
        return None
    if isinstance(node.meta.get("val"), torch.Tensor) and _is_pointwise(node):
        return _pointwise(node, d)
    if node.target is getitem:
        return _Step(((args[0], d),), lambda xs: (xs[0], args[1])) if args[0].target in _REDUCTIONS else None
    if node.target in _REDUCTIONS:
        return _reduction(node, d)
    if node.target is aten.cat.default:
        c = (args[1] if len(args) > 1 else 0) % len(_shape(node))
        return _Step(tuple((x, d) for x in args[0]), lambda xs: (list(xs), c + 1)) if c != d else None
    if node.target is aten.permute.default:
        order = [p % len(args[1]) for p in args[1]]
        return _Step(((args[0], order[d]),), lambda xs: (xs[0], [0, *(p + 1 for p in order)]))
    if node.target is aten.unsqueeze.default:
        at = args[1] % len(_shape(node))
        return _Step(((args[0], d - (at < d)),), lambda xs: (xs[0], at + 1))
    if node.target is aten.squeeze.dim:
        at = args[1] % len(_shape(args[0]))
        return _Step(((args[0], d + (at <= d)),), lambda xs: (xs[0], at + 1)) if _shape(args[0])[at] == 1 else None
    if node.target is aten.select.int:
        at = args[1] % len(_shape(args[0]))
        return _Step(((args[0], d + (at <= d)),), lambda xs: (xs[0], at + 1, args[2]))
    if node.target is aten.slice.Tensor:
        at = (args[1] if len(args) > 1 else 0) % len(_shape(node))
        return _Step(((args[0], d),), lambda xs: (xs[0], at + 1, *args[2:])) if at != d else None
    if node.target is aten.view.default:
        return _view(node, d, parts)
    return None


def _pointwise(node: fx.Node, d: int) -> _Step | None:
    """Of operands that are the same along ``d``, every part takes all there is."""
    rank, size = len(_shape(node)), _shape(node)[d]
    tensors = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
    given = {x for x in node.args if isinstance(x, fx.Node)}
    if len(tensors) != len(node.all_input_nodes) or not given.issuperset(tensors):  # tensors in lists, or by name
        return None
    needs: list[tuple[fx.Node, int | None]] = []
    for x in tensors:
        own = d - (rank - len(_shape(x)))
        if own >= 0 and _shape(x)[own] == size:
            if len(_shape(x)) != rank:
                return None  # the cut would have to stand in front of dimensions that it does not have
            needs.append((x, own))
        else:
            needs.append((x, None))
    if all(dim is None for _, dim in needs):
        return None

    def write(cut: Sequence[Any]) -> tuple[Any, ...]:
        new = dict(zip(tensors, cut, strict=True))
        return tuple(new[a] if isinstance(a, fx.Node) else a for a in node.args)

    return _Step(tuple(needs), write)


def _reduction(node: fx.Node, d: int) -> _Step | None:
    args: Any = node.args
    rank = len(_shape(args[0]))
    if len(args) < 2 or args[1] is None:
        return None
    reduced = sorted(i % rank for i in ([args[1]] if isinstance(args[1], int) else args[1]))
    kept = len(args) > 2 and bool(args[2]) or bool(node.kwargs.get("keepdim"))
    if not reduced:
        return None
    own = d if kept else [i for i in range(rank) if i not in reduced][d]  # what is reduced has no dimension to cut
    return _Step(((args[0], own),), lambda xs: (xs[0], [i + 1 for i in reduced], *args[2:]))


def _view(node: fx.Node, d: int, parts: int) -> _Step | None:
    """Where the dimension is one of the operand's too, what lies before and behind it is regrouped as it was."""
    x: Any = node.args[0]
    had, has = _shape(x), _shape(node)
    before = math.prod(has[:d])
    own = next((i for i in range(len(had)) if had[i] == has[d] and math.prod(had[:i]) == before), None)
    if own is None:
        return None
    return _Step(((x, own),), lambda xs: (xs[0], [parts, *has[:d], has[d] // parts, *has[d + 1 :]]))
