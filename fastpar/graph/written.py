"""Attention that a model writes out, read from a functional ATen graph.

A written-out attention is a product of queries and keys, anything of what follows, a softmax over the keys, casts and
views, and a product with the values. Between the first product and the softmax may stand

- numbers, and tensors that are the same for all keys or for all queries (a temperature per head), as factors;
- additive masks and biases of any shape, other products among them (relative positions);
- ``where`` and ``masked_fill`` with a mask and what is written over the scores;
- casts between floats, and views and permutations, which may part or merge batch, heads, rows and keys.

:func:`read` finds out which dimension is which (``fastpar.graph.axes``), :mod:`fastpar.graph.scores` writes
``fastpar::attention`` for it. Not taken, and left as they are:

- scores or probabilities that something else uses too, a model that returns its attention map for one;
- anything done to the probabilities but casts and views: dropout in training, a head mask, a softmax over more columns
  than there are keys (attention sinks);
- keys that only depend on weights (a router, a codebook, a memory), which need no plan: their rows are split as those
  of any linear layer;
- a softmax over channels, rows or parts of a dimension, so also linear attention; attention between channels, whose
  scores sum over tokens;
- scores made by other operators than matrix products, or changed by others than those above (a soft cap).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fastpar.graph.axes import Axis, Dims, dims_of, leaves, permuted, viewed
from fastpar.rules import Pos
from fastpar.sharding.candidates import Walk

aten = torch.ops.aten

_LAYERS = {aten.mm.default, aten.addmm.default}
_MATRICES = {aten.mm.default, aten.bmm.default}
PRODUCTS = {*_LAYERS, *_MATRICES, aten.baddbmm.default}
VIEWS = {aten.view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
         aten.expand.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.slice.Tensor,
         aten.permute.default}  # fmt: skip
_SUMS = {aten.add.Tensor: 1, aten.add.Scalar: 1, aten.sub.Tensor: -1, aten.sub.Scalar: -1}
_FACTORS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
_ELEMENTWISE = {*_SUMS, *_FACTORS, *_FILLS, aten.where.self, aten.neg.default, aten._to_copy.default}


class Unlike(Exception):  # noqa: N818 - it says why something is no attention, which is no error
    """Why a softmax between two products is not taken."""


@dataclass(frozen=True)
class Times:
    """The scores times ``by`` (a number, or a tensor that broadcasts to them), or over it."""

    by: Any
    dims: Dims
    over: bool = False


@dataclass(frozen=True)
class Plus:
    """``by`` times ``what`` added to the scores; ``dtype`` is theirs from here on."""

    what: Any
    dims: Dims
    dtype: torch.dtype
    by: float = 1


@dataclass(frozen=True)
class Fill:
    """``value`` in place of the scores where ``mask`` is ``when``."""

    mask: fx.Node
    value: Any
    dims: Dims
    when: bool = True


Step = Times | Plus | Fill


@dataclass(frozen=True)
class Operand:
    """A matrix per batch: ``node``, of whose dimensions ``dims`` are the axes, and which of them are whose."""

    node: fx.Node
    dims: Dims
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    width: tuple[Axis, ...]
    sizes: tuple[int, int]  # rows, width


@dataclass(frozen=True)
class Written:
    """A written-out attention: ``q``, ``k``, ``v``, whose rows are queries or keys, what is done to the scores, and the
    product with the values, of which ``turned`` says that it is ``[*batch, width, rows]``."""

    softmax: fx.Node
    product: fx.Node
    turned: bool
    q: Operand
    k: Operand
    v: Operand
    rows: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    steps: tuple[Step, ...]
    sizes: tuple[int, int]  # rows, keys
    dtypes: tuple[torch.dtype, ...]  # of scores and probabilities


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def number(value: Any) -> float | None:
    """A number, or the one that a constant node is everywhere; None for anything else."""
    if not isinstance(value, fx.Node):
        return float(value) if isinstance(value, (int, float)) else None
    if value.target in (aten.full.default, aten.scalar_tensor.default):
        return number(value.args[-1])
    if value.target in (aten.lift_fresh_copy.default, aten._to_copy.default, aten.expand.default, *VIEWS):
        return number(value.args[0])
    if value.op == "get_attr":
        constant = getattr(value.graph.owning_module, str(value.target), None)
        if isinstance(constant, FakeTensor):
            constant = constant.constant
        if isinstance(constant, torch.Tensor) and constant.numel() == 1:
            with unset_fake_temporarily():
                return float(constant)
    return None


class Reader:
    """Reads the softmaxes of one graph. ``weights`` are the inputs that are parameters or buffers."""

    def __init__(self, graph: fx.Graph, weights: Collection[fx.Node]) -> None:
        self.walk = Walk()
        self.varying: set[fx.Node] = set()
        for node in graph.nodes:
            given = node.op == "placeholder" and node not in weights
            if given or any(n in self.varying for n in node.all_input_nodes):
                self.varying.add(node)

    def read(self, softmax: fx.Node) -> Written | None:
        """The attention around ``softmax``; None where it is none. Raises :class:`Unlike` where it nearly is one."""
        onward = _onward(softmax)
        if onward is None:
            return None
        near: Unlike | None = None
        for path in _paths(softmax.args[0], 0):
            try:
                found = self._read(softmax, path, onward)
            except Unlike as error:
                near = near or error
            else:
                if found is not None:
                    return found
        if near is not None:
            raise near
        return None

    def _read(self, softmax: fx.Node, path: list[fx.Node], onward: list[fx.Node]) -> Written | None:
        scores, product = path[0], onward[-1]
        left, right = scores.args[-2:]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        if scores.target in _LAYERS and not {left, right} <= self.varying:
            return None
        *batch, rows, columns = dims = dims_of(shape_of(scores))
        steps, dims = _steps(path, dims)

        dim = softmax.args[1] % max(len(dims), 1)  # type: ignore[operator]
        over, ends = leaves(dims[dim]), (leaves(rows), leaves(columns))
        if not over:
            ones = [shape_of(scores)[-2] == 1, shape_of(scores)[-1] == 1]
            if not any(ones):
                return None
            swapped = not ones[1]
        elif over in ends:
            swapped = over == ends[0]
        else:
            return None
        keys, rows = (rows, columns) if swapped else (columns, rows)
        q, k = (right, left) if swapped else (left, right)
        if self._other(k, swapped):
            return None

        for node in onward[:-1]:
            dims = _followed(dims, node)
        for node in (*path, softmax, *onward[:-1]):
            if len(node.users) > 1:
                raise Unlike(f"its {'scores' if node in path else 'probabilities'} are used by more than one operator")
        at = list(product.args).index([softmax, *onward][-2])
        value = product.args[1 - at]
        assert isinstance(value, fx.Node)
        if value is product.args[at]:
            return None
        contracted, kept = (dims[-1], dims[-2]) if at == 0 else (dims[-2], dims[-1])
        lead = leaves(axis for dim in dims[:-2] for axis in dim)
        if leaves(contracted) != leaves(keys) or leaves(kept) != leaves(rows):
            raise Unlike("the product with the values does not sum over just the keys, in their order")
        if set(lead) != set(leaves(axis for dim in batch for axis in dim)):
            raise Unlike("the two products do not have the same batch")
        height, breadth = shape_of(scores)[-2:]
        every = tuple(axis for dim in batch for axis in dim)
        return Written(
            softmax, product, at == 1,
            q=_operand(q, swapped, every, rows), k=_operand(k, not swapped, every, keys),
            v=_operand(value, at == 1, tuple(lead), keys),
            rows=rows, keys=keys, steps=tuple(steps),
            sizes=(breadth, height) if swapped else (height, breadth),
            dtypes=tuple(n.meta["val"].dtype for n in (*path, softmax, *onward[:-1])),
        )  # fmt: skip

    def _other(self, k: fx.Node, swapped: bool) -> bool:
        """Whether the keys are weights, or channels that are compared over tokens."""
        if k not in self.varying:
            return True
        rank = len(shape_of(k))
        keys, width = (rank - 2, rank - 1) if swapped else (rank - 1, rank - 2)
        return self._of_weights(k, keys) and not self._of_weights(k, width)

    def _of_weights(self, node: fx.Node, dim: int) -> bool:
        """Whether a dimension is one that weights have, as the columns of a linear layer are."""
        rows = shape_of(node)[dim]
        seeds = self.walk.seeds(node, Pos(dim, 1, rows, 1)) if rows > 1 else frozenset()
        found = [
            self._of_weights(seed.node.args[0], seed.pos.dim)  # type: ignore[arg-type]
            if seed.node.target is aten.slice.Tensor and seed.node.args[1] == seed.pos.dim  # one of q, k and v together
            else seed.node not in self.varying
            for seed in seeds
        ]
        return bool(found) and all(found)


def _paths(node: Any, depth: int) -> Iterator[list[fx.Node]]:
    """Ways from a product to ``node``, both included, along which all scores stay."""
    if not isinstance(node, fx.Node) or depth > 64 or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    if node.target in PRODUCTS:
        yield [node]
    elif node.target in VIEWS or node.target in _ELEMENTWISE:
        operands = node.args[1:] if node.target is aten.where.self else node.args[:2]
        for operand in operands:
            if isinstance(operand, fx.Node) and operand.meta["val"].numel() == node.meta["val"].numel():
                for path in _paths(operand, depth + 1):
                    yield [*path, node]


def _steps(path: list[fx.Node], dims: Dims) -> tuple[list[Step], Dims]:
    scores = path[0]
    steps: list[Step] = []
    if scores.target in (aten.baddbmm.default, aten.addmm.default):
        steps.append(Times(scores.kwargs.get("alpha", 1), dims))
        if scores.kwargs.get("beta", 1) != 0:
            steps.append(Plus(scores.args[0], dims, scores.meta["val"].dtype, float(scores.kwargs.get("beta", 1))))  # type: ignore[arg-type]
    for source, node in zip(path, path[1:], strict=False):
        dims = _followed(dims, node)
        if node.target not in VIEWS:
            steps += _step(source, node, dims)
    return steps, dims


def _followed(dims: Dims, node: fx.Node) -> Dims:
    if node.target is aten.permute.default:
        return permuted(dims, node.args[1])  # type: ignore[arg-type]
    after = viewed(dims, shape_of(node))
    if after is None:
        raise Unlike("a view mixes the batch, rows and keys of the scores")
    return after


def _step(source: fx.Node, node: fx.Node, dims: Dims) -> list[Step]:
    target, args, dtype = node.target, node.args, node.meta["val"].dtype
    if not dtype.is_floating_point or sum(a is source for a in args) != 1:
        raise Unlike("scores meet themselves, or are no floats")
    if target is aten._to_copy.default:
        return []
    if target is aten.neg.default:
        return [Times(-1, dims)]
    first = args[0] is source
    if target in _FACTORS:
        over = target in (aten.div.Tensor, aten.div.Scalar)
        if node.kwargs or (over and not first):
            raise Unlike(f"scores are divided in another way ({target})")
        return [Times(args[1] if first else args[0], dims, over)]
    if target in _SUMS:
        sign = _SUMS[target] * float(node.kwargs.get("alpha", 1) if len(args) < 3 else args[2])  # type: ignore[arg-type]
        return [Plus(args[1], dims, dtype, sign)] if first else [Times(sign, dims), Plus(args[0], dims, dtype)]
    if target in _FILLS and first:
        return [Fill(args[1], args[2], dims)]  # type: ignore[arg-type]
    if target is aten.where.self and args[0] is not source:
        kept = args[1] is source
        return [Fill(args[0], args[2] if kept else args[1], dims, not kept)]  # type: ignore[arg-type]
    raise Unlike(f"scores go through {target}")


def _onward(softmax: fx.Node) -> list[fx.Node] | None:
    """What takes the probabilities, up to a product and with it; None where none does."""
    node, path = softmax, []
    while not any(user.target in _MATRICES for user in node.users):
        users = [u for u in node.users if u.target in VIEWS or u.target is aten._to_copy.default]
        if not users:
            return None
        node = users[0]
        value = node.meta["val"]
        if value.numel() != softmax.meta["val"].numel() or not value.dtype.is_floating_point:
            return None
        path.append(node)
    return [*path, next(user for user in node.users if user.target in _MATRICES)]


def _operand(node: fx.Node, turned: bool, batch: tuple[Axis, ...], rows: tuple[Axis, ...]) -> Operand:
    """The operand ``node`` of a product (``turned``: its rows lie as columns), as far back as views, permutations and
    copies alone lead to a tensor in which no dimension mixes batch, rows and width. Parts the batch as that does."""
    height, breadth = shape_of(node)[-2:]
    sizes = (breadth, height) if turned else (height, breadth)
    width = tuple(axis for dim in dims_of(sizes[1:]) for axis in dim)
    dims: Dims = (width, rows) if turned else (rows, width)
    if len(shape_of(node)) == 3:
        dims = (batch, *dims)
    best = node, dims
    while node.target in VIEWS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target is aten.permute.default:
            order = [d % len(dims) for d in node.args[1]]  # type: ignore[union-attr]
            dims = tuple(dims[order.index(d)] for d in range(len(order)))
        elif source.meta["val"].numel() != node.meta["val"].numel():
            break
        else:
            before = viewed(dims, shape_of(source))
            if before is None:
                break
            dims = before
        node = source
        if any(sum(bool(set(leaves(dim)) & set(leaves(own))) for own in (batch, rows, width)) > 1 for dim in dims):
            break
        best = node, dims
    return Operand(*best, batch, rows, width, sizes)
