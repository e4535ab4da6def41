"""``quantize``: what travels, travels as 8-bit floats with a scale per row (``fastpar.ops.quantize``).

A change of layout of ``x`` becomes the same change of the bytes of its rows, and the receiver makes numbers of them.
Queries, values and outputs of attention by default; keys are what a softmax is most sensitive to, and stay as they are
unless asked for (cache-dit's choice). What goes round in several hops (a ring, the stages of a torus) is rounded once,
where it starts, and its bytes make all hops. K and V of a step stay one message: where only one of them is rounded,
the other travels as its own bytes.

Rows that stay on their rank are rounded all the same. So the ranks compute one function, that of the model with these
values rounded, which does not depend on who holds which rows or how many ranks there are, and the same row has the
same bits wherever it is. That function is what ``verify`` holds the ranks against.

Left alone: sums over ranks, masks, weights, the outputs, values split in their last dimension, which is the row,
and those that would not get shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.inherit import inherited
from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import FP8_MEANING, fp8_letters
from fastpar.core.transfer import is_local
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, source_line
from fastpar.ops.join import join
from fastpar.ops.quantize import dequantize, from_bytes, quantize, row_bytes, to_bytes
from fastpar.ops.redistribute import redistribute
from fastpar.ops.ring import redistribute_all
from fastpar.sharding.blockwise import attended, blockwise


@dataclass(frozen=True)
class Quantize(Pass):
    """Of ``what`` (letters: q, k, v, o of attention, g for other gathers, h for halos) rows travel in e4m3."""

    name: ClassVar[str] = "quantize"
    stage_in: ClassVar[str] = "sharded"
    lossy: ClassVar[bool] = True

    what: str = "qvo"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        asked = fp8_letters(self.what)
        moves = _Moves(program.graph, ctx.mesh)
        chosen = [move for move in moves.found if moves.refused(move, asked) is None]
        _tell(moves, chosen, asked, ctx)
        _Writer(moves, chosen).write()
        program.gm.recompile()
        return program


_KEPT = {"output": "an output", "mask": "a mask", "weight": "a weight"}


@dataclass
class _Move:
    """Values that are one another in other layouts, the values that they come from, and what they are used as."""

    values: list[fx.Node] = field(default_factory=list)
    sources: set[fx.Node] = field(default_factory=set)
    letters: set[str] = field(default_factory=set)
    travels: bool = False
    kept: str = ""  # what it is, where that is never rounded
    why_not: str = ""


class _Moves:
    """What moves in a sharded graph: a redistribute, an entry of a ``redistribute_all``, a join."""

    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        of: dict[fx.Node, _Move] = {}
        for node in graph.nodes:
            if (inputs := _moved_from(node)) is None:
                continue
            self.inputs[node] = inputs
            one = _Move([node])
            for x in inputs:
                if x not in of:
                    one.sources.add(x)
                elif of[x] is not one:
                    before, one = one, of[x]
                    one.values += before.values
                    one.sources |= before.sources
                of.update(dict.fromkeys(one.values, one))
            of[node] = one
        self.found = list({id(move): move for move in of.values()}.values())
        for move in self.found:
            move.letters = set(self._letters(move))
            move.travels = any(not self._stays(value) for value in move.values)
            move.kept = next(filter(None, map(self._kept, move.values)), "")
            move.why_not = move.kept or next(filter(None, map(self._why_not, move.values)), "")
        self.sent = {(x, letter) for m in self.found if m.travels for x in m.sources for letter in m.letters}

    def refused(self, move: _Move, asked: str) -> str | None:
        """Why these values are not rounded; None where they are, "" where there is no reason to."""
        if not any((x, letter) in self.sent for x in move.sources for letter in move.letters):
            return ""
        if not move.letters & set(asked):
            return ""
        if move.why_not:
            return move.why_not
        others = sorted(move.letters - set(asked))
        return f"is used as {' and '.join(others)} as well" if others else None

    def _letters(self, move: _Move) -> Iterable[str]:
        for value in move.values:
            for user in value.users:
                if user in self.inputs or user.target is redistribute_all:
                    continue
                operand = _operand(user, value)
                if operand:
                    yield from operand
                elif any(map(attended, move.sources)):
                    yield "o"
                else:
                    yield "h" if any(value.meta["layout"].windowed for value in move.values) else "g"

    def _stays(self, value: fx.Node) -> bool:
        if value.target is join:
            return True
        src, dst = self.inputs[value][0].meta["layout"], value.meta["layout"]
        return src.partial == dst.partial and is_local(src, dst, self.mesh)

    def _kept(self, value: fx.Node) -> str:
        if any(x.meta["layout"].partial for x in (self.inputs[value][0], value)):
            return "is a sum over ranks"
        return {why: f"is {what}" for why, what in _KEPT.items()}.get(value.meta.get("why", ""), "")

    def _why_not(self, value: fx.Node) -> str:
        source = self.inputs[value][0]
        tensor: torch.Tensor = source.meta["val"]
        layouts: list[Layout] = [source.meta["layout"], value.meta["layout"]]
        if not tensor.is_floating_point():
            return f"is {str(tensor.dtype).removeprefix('torch.')}"
        if not tensor.dim() or any(not x.dims[-1].is_whole for x in layouts):
            return "is split in its last dimension, of which a scale needs all"
        width, size = int(tensor.shape[-1]), tensor.element_size()
        if row_bytes(width, size) >= width * size:
            return f"has rows of {width} x {size} bytes, which a scale makes no shorter"
        return ""


def _moved_from(node: fx.Node) -> list[fx.Node] | None:
    """The values that ``node`` is in another layout; None where it is something else."""
    if node.target is redistribute:
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is join:
        return list(node.args[0])  # type: ignore[arg-type]
    if node.target is getitem and node.args[0].target is redistribute_all:  # type: ignore[union-attr]
        return [node.args[0].args[0][node.args[1]]]  # type: ignore[union-attr, index]
    return None


def _operand(user: fx.Node, value: fx.Node) -> str:
    """Which of q, k and v of an attention ``value`` is; "m" for its mask, "" for other operators."""
    if not blockwise(user):
        return ""
    return "".join(letter for letter, arg in zip("qkvm", user.args, strict=False) if arg is value)


def _tell(moves: _Moves, chosen: list[_Move], asked: str, ctx: PassContext) -> None:
    """Notes of what is rounded and what is not, and why. Raises PlanError where that is nothing of what travels."""
    sources = {(x, letter) for move in chosen for x in move.sources for letter in move.letters}
    counts = Counter(letter for _, letter in sources)
    told, reasons = set(counts), []
    for move in moves.found:
        reason = moves.refused(move, asked)
        if reason:
            told |= move.letters
            where = source_line(move.values[0])
            reasons.append(f"{'/'.join(sorted(move.letters & set(asked)))} {reason}{f' [{where}]' if where else ''}")
    ctx.notes += [f"fp8: travels as it is: {reason}" for reason in dict.fromkeys(reasons)]
    others = [move for move in moves.found if move.travels and not move.kept]
    if not chosen and others:
        could = sorted({letter for move in others if not move.why_not for letter in move.letters} - {"m"})
        said = [*dict.fromkeys(reasons), *([f"what could be is {', '.join(could)} ({FP8_MEANING})"] if could else [])]
        raise PlanError(f"fp8({asked}) would round nothing: {'; '.join(said) or 'nothing of it travels'}")
    if still := [letter for letter in asked if letter not in told]:
        ctx.notes.append(f"fp8: nothing of {', '.join(still)} travels")
    if counts:
        values = ", ".join(f"{letter} {counts[letter]}" for letter in asked if counts[letter])
        ctx.notes.append(f"fp8: values rounded to e4m3 with a scale per row: {values}")


class _Writer:
    """Writes the chosen moves as moves of bytes."""

    def __init__(self, moves: _Moves, chosen: list[_Move]) -> None:
        self.moves, self.graph = moves, moves.graph
        self.rounded = {value for move in chosen for value in move.values}
        self.sources = {(x, letter) for move in chosen for x in move.sources for letter in move.letters}
        # what travels in one message with bytes is bytes
        shared = {n.args[0] for n in self.rounded if n.target is getitem}
        self.moved = [n for n in moves.inputs if n in self.rounded or (n.target is getitem and n.args[0] in shared)]
        self.old = {*self.moved, *shared}
        self.bytes: dict[fx.Node, fx.Node] = {}
        self.rows: dict[tuple[fx.Node, bool], fx.Node] = {}
        self.messages: dict[fx.Node, fx.Node] = {}

    def write(self) -> None:
        for value in self.moved:
            self.bytes[value] = self._move(value)
        for value in self.moved:
            users = [u for u in value.users if u not in self.old]
            self._numbers(value, self.bytes[value], users)
        for source in dict.fromkeys(x for x, _ in self.sources):  # blocks of a ring or torus that did not travel
            here = [
                user
                for user in source.users
                if any((source, letter) in self.sources for letter in _operand(user, source))
            ]
            if here:
                self._numbers(source, self._rows(source, True), here)
        for node in sorted(self.old, key=lambda n: -self.moves.place[n]):
            self.graph.erase_node(node)

    def _move(self, value: fx.Node) -> fx.Node:
        """``value`` as bytes in its layout."""
        if value.target is getitem:
            message: fx.Node = value.args[0]  # type: ignore[assignment]
            if message not in self.messages:
                self.messages[message] = self._message(message)
            new = self.messages[message]
            index: int = value.args[1]  # type: ignore[assignment]
            return self._emit(value, getitem, (new, index), new.meta["val"][index], new.meta["layout"][index])
        xs = [self._rows(x, True) for x in self.moves.inputs[value]]
        tensor, width = xs[0].meta["val"], int(xs[0].meta["val"].shape[-1])
        layout = _wide(value.meta["layout"], width)
        texts = [str(x.meta["layout"]) for x in xs]
        if value.target is join:
            return self._emit(value, join, (xs, texts, str(layout), value.args[3]), tensor, layout)
        return self._emit(value, redistribute, (xs[0], texts[0], str(layout)), tensor, layout)

    def _message(self, node: fx.Node) -> fx.Node:
        operands: list[fx.Node] = node.args[0]  # type: ignore[assignment]
        lanes = {user.args[1]: user for user in node.users}
        xs = [self._rows(x, lanes.get(i) in self.rounded) for i, x in enumerate(operands)]
        layouts = tuple(
            _wide(layout, int(x.meta["val"].shape[-1])) for x, layout in zip(xs, node.meta["layout"], strict=True)
        )
        args = (xs, [str(x.meta["layout"]) for x in xs], list(map(str, layouts)))
        return self._emit(node, redistribute_all, args, [x.meta["val"] for x in xs], layouts)

    def _rows(self, x: fx.Node, rounded: bool) -> fx.Node:
        """The bytes of ``x``: those that came, or made before its first use."""
        if x in self.bytes:
            return self.bytes[x]
        if (x, rounded) not in self.rows:
            self.rows[x, rounded] = self._apply(x, x.users, quantize if rounded else to_bytes, (x,))
        return self.rows[x, rounded]

    def _numbers(self, x: fx.Node, rows: fx.Node, users: Iterable[fx.Node]) -> None:
        """``users`` get the numbers that ``rows`` are, made when the first of them needs them: until then they may
        be on their way."""
        users = list(users)
        if users:
            back = dequantize if self._lossy(x) else from_bytes
            made = self._apply(x, users, back, (rows, x.meta["val"].dtype))
            for user in users:
                user.replace_input_with(x, made)

    def _lossy(self, x: fx.Node) -> bool:
        return x in self.rounded or x not in self.bytes

    def _apply(
        self, x: fx.Node, users: Iterable[fx.Node], target: Callable[..., Any], args: tuple[Any, ...]
    ) -> fx.Node:
        place = self.moves.place
        value: Any = x.meta["val"]
        with self.graph.inserting_before(min((u for u in users if u in place), key=place.__getitem__)):
            new = self.graph.call_function(target, args)
        with value.fake_mode:
            made = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
        new.meta = {**inherited(x.meta), "val": made, "layout": _wide(x.meta["layout"], int(made.shape[-1]))}
        return new

    def _emit(self, old: fx.Node, target: Any, args: tuple[Any, ...], value: Any, layout: Any) -> fx.Node:
        with self.graph.inserting_before(old):
            new = self.graph.call_function(target, args)
        new.meta = {**old.meta, "val": value, "layout": layout}
        return new


def _wide(layout: Layout, width: int) -> Layout:
    """``layout`` with a last dimension of ``width`` bytes or numbers, whole."""
    return layout.with_dim(len(layout.dims) - 1, Dim.whole(width))
