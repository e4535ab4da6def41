"""``fastpar::attention`` in place of what a model writes out (:mod:`fastpar.graph.written` reads it).

What is done to the scores becomes a factor of the queries (or keys) and a mask, since only those an attention has:
``scale * q k^T + mask``. Values are those of eager, also in rows in which every key is hidden: uniform where they are
hidden by a large finite number, NaN where by -inf. A kernel gives neither (0, or what its rounding makes of it, and on
several ranks blocks of unequal size would count the same), so such rows get queries of zero and a mask of zero, or
have their NaN added.

What is written over the scores is exact where it

- is -inf or so low that a score added to it is lost (below -1e25), or
- depends on the query or the key alone: that row of q or k becomes zero, and its scores what is in the mask, or
- is -1e4 or less, and nothing else is added: what is left of a hidden score, ``exp(-1e4)``, is zero.

Anything else is not taken.

**Dtypes.** The attention has the dtype in which queries, keys and values were made: casts to a wider one after that
change no number, and what they are for, wide sums, kernels have inside. A mask of a wider dtype makes it as wide,
except where it only hides. Scores or probabilities that are cast to a narrower dtype than queries, keys, values and
result have, as float64 models do with a softmax in float32, make it as narrow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from fastpar.graph.axes import Axis, Dims, leaves
from fastpar.graph.axes import size as size_of
from fastpar.graph.program import source_line
from fastpar.graph.tidy import tidy
from fastpar.graph.written import VIEWS, Fill, Operand, Plus, Reader, Times, Unlike, Written, number, shape_of
from fastpar.ops.attention import attention

aten = torch.ops.aten

HIDDEN = -1e4
"""Written over a score, this or less hides its key: next to any other, nothing of it is left."""
LOST = -1e25
"""A score added to this or less is lost in rounding, in every dtype."""


def replace_written(gm: fx.GraphModule, weights: Collection[fx.Node]) -> list[str]:
    """Make every attention that a tidy functional ATen graph writes out a ``fastpar::attention``, in place.

    ``weights`` are the inputs that are parameters or buffers. Returns a note for each softmax between two products that
    nearly is an attention, with the line of the model and the reason why it stays as it is.
    """
    softmaxes = list(gm.graph.find_nodes(op="call_function", target=aten._softmax.default))
    if not softmaxes:
        return []
    reader, notes, count = Reader(gm.graph, weights), [], 0
    for softmax in softmaxes:
        try:
            written = reader.read(softmax)
            if written is not None:
                _Writer(written).write()
                count += 1
        except Unlike as error:
            notes.append(f"the softmax at {source_line(softmax)} stays as the model wrote it: {error}")
    if count:
        tidy(gm)
    return list(dict.fromkeys(notes))


class _Writer:
    def __init__(self, written: Written) -> None:
        self.it = written
        self.graph = written.softmax.graph
        self.before = written.product
        self.lead = _lead(written)
        # a number that is added to all scores changes no weight
        self.steps = [s for s in written.steps if not (isinstance(s, Plus) and _finite(s.what))]
        self.factor = 1.0
        self.mask: fx.Node | None = None
        self.fills: list[float] = []  # as low as later factors leave them
        self.added = False  # something whose numbers are not known
        self.tight = False  # hidden rows must be zeros throughout
        self.made: list[fx.Node] = []

    def write(self) -> None:
        """Replace the product with the values; raises :class:`Unlike`, and leaves nothing behind, where it cannot."""
        try:
            with self.graph.inserting_before(self.before):
                result = self._attention()
        except Unlike:
            for node in reversed(self.made):
                self.graph.erase_node(node)
            raise
        self.before.replace_all_uses_with(result)
        self.graph.erase_node(self.before)  # what led to it is dead now

    # -- the attention --------------------------------------------------------------------

    def _attention(self) -> fx.Node:
        it = self.it
        self.q, self.k = self._matrices(it.q), self._matrices(it.k)
        v = self._matrices(it.v)
        dtype = self._dtype()
        self.dtype, self.low = dtype, float(torch.finfo(dtype).min)
        for step in self.steps:
            if isinstance(step, Times):
                self._times(step)
            elif isinstance(step, Plus):
                self._plus(step)
            else:
                self._fill(step)
        if self.tight and (self.added or any(f > HIDDEN for f in self.fills)):
            raise Unlike(f"numbers down to {min(self.fills)} are written over scores, to others something is added")
        if not math.isfinite(self.factor):
            raise Unlike(f"its scores are scaled by {self.factor}")
        if self.factor <= 0:  # kernels look for the largest score before they scale
            self.q, self.factor = self._emit(aten.mul.Tensor, self.q, self.factor), 1.0
        nan = self._hidden_rows()
        q, k, v = (self._cast(x, dtype) for x in (self.q, self.k, v))
        mask = self._cast(self.mask, dtype) if self.mask is not None else None
        if mask is not None and shape_of(mask)[-1] != it.sizes[1]:
            # the same for all keys, it changes no weight; what it has of NaN is added below
            mask = None
        out = self._emit(attention, q, k, v, mask, False, self.factor, False)
        if nan is not None:
            out = self._emit(aten.add.Tensor, out, self._cast(nan, dtype))
        out = self._cast(out, it.product.meta["val"].dtype)
        return self._as_product(out)

    def _dtype(self) -> torch.dtype:
        it = self.it
        dtype = _widest(_made(it.q.node), _made(it.k.node), _made(it.v.node))
        narrow = min(it.dtypes, key=lambda d: torch.finfo(d).bits)
        if torch.finfo(narrow).bits < min(torch.finfo(d).bits for d in (dtype, it.product.meta["val"].dtype)):
            return narrow
        return _widest(dtype, *self._mask_dtypes())

    def _hidden_rows(self) -> fx.Node | None:
        """Rows in which every key is hidden get what eager gives; what is to be added to the result for it."""
        if self.mask is None or not (self.fills or self.added):
            return None
        infinite = self.added or any(math.isinf(f) for f in self.fills)
        top = self._emit(aten.amax.default, self.mask, [-1], True)
        if not self.added and all(f <= HIDDEN for f in self.fills) and any(math.isfinite(f) for f in self.fills):
            # Nothing but fills and zeros: rows below zero are hidden throughout, and how far below does not matter.
            self.mask = self._emit(aten.sub.Tensor, self.mask, top)
            hidden = self._emit(aten.lt.Scalar, top, 0)
            self.q = self._emit(aten.masked_fill.Scalar, self.q, hidden, 0)
        # 0, and NaN for a row of -inf
        return self._emit(aten.sub.Tensor, top, top) if infinite else None

    # -- what is done to the scores -------------------------------------------------------

    def _times(self, step: Times) -> None:
        by = number(step.by)
        if by is not None:
            if by == 0 and step.over:
                raise Unlike("its scores are divided by zero")
            self.factor = self.factor / by if step.over else self.factor * by
            if self.mask is not None and by != 1:
                self.mask = self._emit(aten.div.Tensor if step.over else aten.mul.Tensor, self.mask, by)
                self.fills = [f / by if step.over else f * by for f in self.fills]
            return
        target = aten.div.Tensor if step.over else aten.mul.Tensor
        by = self._placed(step.by, step.dims)
        _, rows, keys = self._extent(by)
        if rows and keys:
            raise Unlike("its scores are scaled by a number per query and key")
        if self.mask is not None:
            if self.fills:
                raise Unlike("its scores are scaled by a tensor after some were written over")
            self.mask = self._emit(target, self.mask, by)
        if keys:
            self.k = self._emit(target, self.k, self._turn(by))
        else:
            self.q = self._emit(target, self.q, by)

    def _plus(self, step: Plus) -> None:
        if not isinstance(step.what, fx.Node):
            raise Unlike(f"{step.what} is added to its scores")
        what = self._placed(step.what, step.dims)
        if step.by != 1:
            what = self._emit(aten.mul.Tensor, what, step.by)
        self.mask = what if self.mask is None else self._emit(aten.add.Tensor, self.mask, what)
        self.added = True

    def _fill(self, step: Fill) -> None:
        mask = self._placed(step.mask, step.dims)
        if not step.when:
            mask = self._emit(aten.logical_not.default, mask)
        value = number(step.value)
        low = self._final(value, step)
        _, rows, keys = self._extent(mask)
        if low is None or low > LOST:
            if not (rows and keys):
                self._blank(mask, keys)
            elif low is None or low > HIDDEN:
                raise Unlike("it writes a tensor, or a number that hides nothing, over scores of some queries and keys")
            self.tight |= rows and keys
        if value is None:
            written = self._placed(step.value, step.dims)
            self.added = True
        else:
            written = self._number(max(value, self.low) if math.isfinite(value) else value)
            self.fills.append(value)
        under = self.mask if self.mask is not None else self._number(0.0)
        self.mask = self._emit(aten.where.self, mask, written, under)

    def _blank(self, mask: fx.Node, keys: bool) -> None:
        """Zeros in q or k where ``mask``, which is the same for all queries or for all keys, is true."""
        if keys:
            self.k = self._emit(aten.masked_fill.Scalar, self.k, self._turn(mask), 0)
        else:
            self.q = self._emit(aten.masked_fill.Scalar, self.q, mask, 0)

    def _final(self, value: float | None, step: Fill) -> float | None:
        """What the later factors make of a number that is written over scores; None where they are no numbers."""
        later = self.steps[self.steps.index(step) + 1 :]
        for factor in (s for s in later if isinstance(s, Times)):
            by = number(factor.by)
            if value is None or by is None or by == 0:
                return None
            value = value / by if factor.over else value * by
        return value

    def _mask_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the mask needs: that in which its only term was made, or those of the scores."""
        added = [s for s in self.steps if isinstance(s, Plus)]
        later = self.steps[self.steps.index(added[0]) + 1 :] if added else ()
        alone = len(added) == 1 and not later and isinstance(added[0].what, fx.Node)
        found = [_made(s.what) if alone and s.what.meta["val"].is_floating_point() else s.dtype for s in added]
        found += [s.by.meta["val"].dtype for s in self.steps if isinstance(s, Times) and _tensor(s.by)]
        found += [s.value.meta["val"].dtype for s in self.steps if isinstance(s, Fill) and _tensor(s.value)]
        return [dtype for dtype in found if dtype.is_floating_point]

    # -- places ---------------------------------------------------------------------------

    def _matrices(self, operand: Operand) -> fx.Node:
        """An operand as ``[*lead, rows or keys, width]``."""
        node, have = operand.node, leaves(axis for dim in operand.dims for axis in dim)
        want = [*(axis for group in self.lead for axis in group), *leaves(operand.rows), *leaves(operand.width)]
        node = self._view(node, [axis.size for axis in have])
        if have != want:
            node = self._emit(aten.permute.default, node, [have.index(axis) for axis in want])
        return self._view(node, [*map(size_of, self.lead), *operand.sizes])

    def _placed(self, value: Any, dims: Dims) -> fx.Node:
        """What broadcasts to scores of ``dims``, as ``[*lead, rows, keys]`` with 1 for what it does not depend on."""
        assert isinstance(value, fx.Node)
        shape = shape_of(value)
        if not shape:
            if value.meta["val"].device != self.before.meta["val"].device:
                value = self._emit(aten._to_copy.default, value, device=self.before.meta["val"].device)
            return self._view(value, [1] * (len(self.lead) + 2))
        shape = (1,) * (len(dims) - len(shape)) + shape
        parted: list[Axis] = []
        sizes: list[int] = []
        for rows, dim in zip(shape, dims, strict=True):
            parted += (own := leaves(dim))
            sizes += [axis.size if rows > 1 else 1 for axis in own]
        value = self._view(value, sizes)
        groups = [*self.lead, leaves(self.it.rows), leaves(self.it.keys)]
        order = [parted.index(axis) for group in groups for axis in group]
        if order != sorted(order):
            value = self._emit(aten.permute.default, value, order)
        wide, out, at = [], [], 0
        for group in groups:
            have = [sizes[order[at + i]] for i in range(len(group))]
            full = any(n > 1 for n in have)
            wide += [axis.size if full else 1 for axis in group]
            out.append(size_of(group) if full else 1)
            at += len(group)
        if wide != list(shape_of(value)):
            value = self._emit(aten.expand.default, value, wide)
        return self._view(value, out)

    def _extent(self, placed: fx.Node) -> tuple[bool, bool, bool]:
        """Whether it depends on batch, rows and keys."""
        *lead, rows, keys = shape_of(placed)
        return any(n > 1 for n in lead), rows > 1, keys > 1

    def _as_product(self, out: fx.Node) -> fx.Node:
        """The result in the shape, order and memory that the product has."""
        it = self.it
        if it.turned:
            out = self._turn(out)
        batch = leaves(it.v.batch)
        groups = [axis for group in self.lead for axis in group]
        shape = shape_of(it.product)
        if batch != groups:
            out = self._view(out, [*(a.size for a in groups), *shape[-2:]])
            out = self._emit(aten.permute.default, out, [*map(groups.index, batch), len(batch), len(batch) + 1])
        out = self._emit(aten.clone.default, out, memory_format=torch.contiguous_format)
        return self._view(out, shape)

    # -- nodes ----------------------------------------------------------------------------

    def _turn(self, node: fx.Node) -> fx.Node:
        last = len(shape_of(node)) - 1
        return self._emit(aten.permute.default, node, [*range(last - 1), last, last - 1])

    def _view(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        if list(shape_of(node)) == list(shape):
            return node
        try:
            node.meta["val"].view(list(shape))
        except (RuntimeError, ValueError):  # its memory does not allow that
            node = self._emit(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self._emit(aten.view.default, node, list(shape))

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else self._emit(aten._to_copy.default, node, dtype=dtype)

    def _number(self, value: float) -> fx.Node:
        like = self.before.meta["val"]
        return self._emit(aten.full.default, [], value, dtype=self.dtype, device=like.device, pin_memory=False)

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.it.softmax.meta.items() if k not in ("val", "tensor_meta")}
        like = self.before.meta["val"]
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        if isinstance(like, FakeTensor):
            with like.fake_mode:
                node.meta["val"] = target(*values, **kwargs)
        else:
            node.meta["val"] = target(*values, **kwargs)
        self.made.append(node)
        return node


def _tensor(value: Any) -> bool:
    """Whether it takes part in the choice of a result's dtype."""
    return isinstance(value, fx.Node) and bool(shape_of(value)) and number(value) is None


def _finite(value: Any) -> bool:
    known = number(value)
    return known is not None and math.isfinite(known)


def _widest(*dtypes: torch.dtype) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _made(node: fx.Node) -> torch.dtype:
    """The dtype in which the numbers of ``node`` were made, before they were cast to a wider one."""
    dtype: torch.dtype = node.meta["val"].dtype
    while node.target in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is aten._to_copy.default:
        before = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
        if before.is_floating_point and torch.promote_types(before, dtype) == dtype:
            return _made(node.args[0])  # type: ignore[arg-type]
    return dtype


def _lead(written: Written) -> list[list[Axis]]:
    """The batch of the attention: the axes of the products' batch, parted as views part them, in two dimensions unless
    a mask is needed for one of more and not for its neighbour. The last one is the heads'."""
    batch = leaves(written.q.batch)
    groups = [[axis] for axis in batch]
    uses = [_uses(step) for step in written.steps]
    while len(groups) > 2:
        a, b = groups[0][-1], groups[1][0]
        if any((a in used) != (b in used) for used in uses):
            break
        groups[:2] = [groups[0] + groups[1]]
    if len(groups) == 1 and _has_one_head(written.q):
        return [*groups, []]
    return [[]] * (2 - len(groups)) + groups


def _has_one_head(q: Operand) -> bool:
    """Whether there is a dimension of one where the heads would be, behind the batch."""
    batch = [d for d, dim in enumerate(q.dims) if set(leaves(dim)) & set(leaves(q.batch))]
    return len(q.dims) == 4 and batch == [0]


def _uses(step: Any) -> set[Axis]:
    """Axes of the scores on which a step's tensors depend."""
    found: set[Axis] = set()
    for value in (getattr(step, name, None) for name in ("by", "what", "mask", "value")):
        if isinstance(value, fx.Node):
            shape = shape_of(value)
            for rows, dim in zip(shape[::-1], step.dims[::-1], strict=False):
                if rows > 1:
                    found |= set(leaves(dim))
    return found
