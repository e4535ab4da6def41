"""``localise``: the program of one rank, with its own sizes, peers and boxes.

The last pass. Collectives become ``torch.ops._c10d_functional`` calls on groups named by
mesh axes (``ctx.groups`` maps them to process groups; in simulation the axes' own names
stay), everything else gets its local sizes from the layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.inherit import inherited
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import Box, transfer
from fastpar.graph.arrival import in_arrival_order
from fastpar.graph.modules import complete
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, module_of
from fastpar.ops.alone import alone, place, placement
from fastpar.ops.collectives import (
    COLLECTIVES,
    Exchange,
    all_gather,
    all_reduce,
    all_to_all,
    axes_of,
    dtypes_of,
    encode,
    layouts_of,
    local,
    pack,
    shapes_of,
    unpack,
)
from fastpar.ops.displaced import around, context, kept_apart, kept_shape, tiles_of
from fastpar.ops.join import join, join_order
from fastpar.ops.late import late, outgoing, side
from fastpar.rules.localise import Localiser
from fastpar.sharding.blockwise import blockwise

_C10D = torch.ops._c10d_functional


_EXCHANGES = (*COLLECTIVES, late)


def group_name(axes: tuple[str, ...]) -> str:
    """Name of the group over ``axes`` until it is mapped to a process group."""
    return ".".join(axes)


@dataclass(frozen=True)
class Localise(Pass):
    """The program of ``rank``."""

    name: ClassVar[str] = "localise"
    stage_in: ClassVar[tuple[str, ...]] = ("lowered", "scheduled")
    stage_out: ClassVar[str] = "localised"

    rank: int = 0

    def apply(self, program: Program, ctx: PassContext) -> Program:
        writer = _Writer(program, ctx.mesh, self.rank, getattr(ctx, "groups", None) or {})
        graph = writer.run()
        in_arrival_order(graph)
        gm = module_of(program.gm, graph, f"Rank{self.rank}")
        return replace(program, gm=gm, stage="localised", mesh=ctx.mesh)


class _Writer:
    def __init__(self, program: Program, mesh: Mesh, rank: int, groups: dict[tuple[str, ...], str]) -> None:
        self.source, self.mesh, self.rank, self.groups = program.graph, mesh, rank, groups
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.localiser = Localiser(mesh)

    def run(self) -> fx.Graph:
        for node in self.source.nodes:
            handler = _HANDLERS.get(node.target) if node.op == "call_function" else None
            if handler is not None:
                self.env[node] = handler(self, node)
            elif node.op == "call_function" and node.target is getitem and node.args[0].target in _EXCHANGES:
                self.env[node] = _Part(self.env[node.args[0]], node.args[1])
            elif node.op == "call_function":
                target, args, kwargs = self.localiser.call(node, self.rank)
                self.env[node] = self._emit(node, target, self._map(args), self._map(kwargs))
            else:
                if node.op == "output":
                    self._finish_all()
                new = self.graph.node_copy(node, self._value)
                new.meta = dict(node.meta)
                value = node.meta.get("val")
                if node.op == "placeholder" and isinstance(value, torch.Tensor):
                    shape = given_shape(node, self.mesh, self.rank)
                    if shape != tuple(value.shape):
                        with value.fake_mode:  # type: ignore[attr-defined]
                            new.meta["val"] = value.new_empty(shape)
                self.env[node] = new
        complete(self.graph)
        return self.graph

    def _finish_all(self) -> None:
        """Wait for what nobody waited for: an exchange that gives this rank nothing has buffers under way as well."""
        for started in self.env.values():
            if isinstance(started, _Started) and started.buffer is None:
                started.finish()

    def _map(self, value: Any) -> Any:
        return fx.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> Any:
        """What ``node`` became; an exchange under way is waited for here, where its result is first needed."""
        value = self.env[node]
        return value.exchange.finish()[value.index] if isinstance(value, _Part) else value

    def _emit(self, origin: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs or {})
        new.meta = inherited(origin.meta, "layout", "why", "hoisted")
        new.meta["val"] = origin.meta.get("val")
        return new

    def _group(self, axes: tuple[str, ...]) -> str:
        return self.groups.get(axes, group_name(axes))

    def local(self, node: fx.Node) -> fx.Node:
        src, dst = (Layout.parse(str(a)).summed() for a in node.args[1:3])
        t = transfer(src, dst, self.mesh, self.rank)
        x = self._value(node.args[0])  # type: ignore[arg-type]
        boxes = t.receives[t.me]
        if len(boxes) > 1:
            exchange = Exchange([src], [dst], self.mesh, self.rank)
            buffer = self._emit(node, pack, ([x], exchange.send_boxes_to(t.me)))
            done = self._emit(node, unpack, (buffer, exchange.shapes, exchange.receive_boxes_from(t.me)))
            return self._emit(node, getitem, (done, 0))
        if not boxes:  # nothing arrives; but in the result's shape, of which a dimension may even have grown
            return self._emit(node, torch.ops.aten.new_empty.default, (x, list(t.shape)))
        for d, (have, want) in enumerate(zip(src.local_shape(self.mesh, self.rank), t.shape, strict=True)):
            if have != want:
                start = boxes[0].src[d]
                x = self._emit(node, torch.ops.aten.slice.Tensor, (x, d, start, start + want))
        sliced = x is not self._value(node.args[0])  # type: ignore[arg-type]
        if sliced and not _read_in_place(node):
            x = self._emit(node, torch.ops.aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
        return x

    def alone(self, node: fx.Node) -> fx.Node:
        src, dst = (Layout.parse(str(a)) for a in node.args[1:3])
        x = self._value(node.args[0])  # type: ignore[arg-type]
        return self._emit(node, place, (x, *placement(src, dst, self.mesh, self.rank)))

    def join(self, node: fx.Node) -> fx.Node:
        xs, srcs, dst, dim = node.args
        layouts = [Layout.parse(str(t)) for t in srcs]  # type: ignore[union-attr]
        order = join_order(layouts, Layout.parse(str(dst)), int(str(dim)), self.mesh, self.rank)
        pieces = [self._value(xs[i]) for i in order]  # type: ignore[index, arg-type]
        return self._emit(node, torch.ops.aten.cat.default, (pieces, dim))

    def context(self, node: fx.Node) -> fx.Node:
        part = self.env[node.args[0]]  # type: ignore[index]
        src, dst = (Layout.parse(str(a)) for a in node.args[1:3])
        # what is kept follows from this value's layouts, not from what it shares a message with
        if isinstance(part, _Part) and kept_apart(src, dst, self.mesh, self.rank) is not None:
            came = part.exchange.came(part.index)
            if came is not None:
                return came
        target, args, kwargs = self.localiser.call(node, self.rank)
        return self._emit(node, target, self._map(args), kwargs)

    def all_to_all(self, node: fx.Node) -> _Started:
        exchange = Exchange(*layouts_of(node), self.mesh, self.rank, dtypes_of(node), keep=True)
        buffer = self._emit(node, pack, (self._map(node.args[0]), exchange.send_boxes))
        args = (buffer, exchange.receive_splits, exchange.send_splits, self._group(exchange.axes))
        started = self._emit(node, _C10D.all_to_all_single.default, args)
        return self._started(node, started, exchange, exchange.axes)

    def all_gather(self, node: fx.Node) -> _Started:
        exchange = Exchange(*layouts_of(node), self.mesh, self.rank, dtypes_of(node))
        buffer = self._emit(node, pack, (self._map(node.args[0]), exchange.send_boxes_to(0)))
        args = (buffer, len(exchange.group), self._group(exchange.axes))
        started = self._emit(node, _C10D.all_gather_into_tensor.default, args)
        return self._started(node, started, exchange, exchange.axes)

    def outgoing(self, node: fx.Node) -> fx.Node:
        return self._emit(node, pack, (self._map(node.args[0]), side(node, self.mesh, self.rank).send_boxes))

    def late(self, node: fx.Node) -> _Started:
        """An exchange that was started between the calls: the message is an input."""
        exchange, came = side(node, self.mesh, self.rank), self._value(node.args[3])  # type: ignore[arg-type]
        return _Late(self, node, came, exchange, f"message over {' and '.join(exchange.axes)}")

    def all_reduce(self, node: fx.Node) -> _Started:
        shapes = [layout.local_shape(self.mesh, self.rank) for layout in layouts_of(node)[1]]
        boxes = encode([(i, Box((0,) * len(s), (0,) * len(s), s)) for i, s in enumerate(shapes)], "src")
        buffer = self._emit(node, pack, (self._map(node.args[0]), boxes))
        axes = axes_of(node, self.mesh)
        args = (buffer, node.args[1], self._group(axes))
        started = self._emit(node, _C10D.all_reduce.default, args)
        return self._started(node, started, _Sums([n for s in shapes for n in (len(s), *s)], boxes), axes)

    def _started(
        self, node: fx.Node, started: fx.Node, exchange: Exchange | _Sums, axes: tuple[str, ...]
    ) -> _Started:
        """The exchange under way, with a name for profiles: groups of processes are known by numbers."""
        name = f"{str(node.target).split('.')[1]} over {' and '.join(axes)}"
        started.meta["exchange"] = name
        started.args[0].meta["exchange"] = f"pack for {name}"  # type: ignore[union-attr]
        return _Started(self, node, started, exchange, name)


def given_shape(node: fx.Node, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Shape of what ``rank`` is given of a tensor that is an input."""
    layout = node.meta.get("layout")
    if "message" in node.meta:  # what it has kept of an exchange
        src, dst = map(Layout.parse, node.meta["message"])
        return kept_shape(src, dst, mesh, rank)
    return layout.local_shape(mesh, rank) if isinstance(layout, Layout) else tuple(node.meta["val"].shape)


def _read_in_place(node: fx.Node) -> bool:
    """Whether a slice may be a view: products take a weight's, attentions and messages any."""
    if node.meta.get("why") == "weight":
        return True
    permute = torch.ops.aten.permute.default
    users = [u for user in node.users for u in (user.users if user.target is permute else [user])]
    return all(blockwise(user) or user.target in COLLECTIVES for user in users)


@dataclass(frozen=True)
class _Sums:
    """How values that were summed lie in their buffer: as an ``Exchange`` says it of what it exchanged."""

    shapes: list[int]
    receive_boxes: list[int]
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass
class _Started:
    """An exchange under way: waited for and unpacked once, when a part of it is first needed.

    Whatever stands in between in the program runs while it travels.
    """

    writer: _Writer
    node: fx.Node
    started: fx.Node
    exchange: Exchange | _Sums
    name: str
    buffer: fx.Node | None = None
    unpacked: list[fx.Node] | None = None
    parts: list[fx.Node] | None = None

    def wait(self) -> fx.Node:
        """The message."""
        if self.buffer is None:
            self.buffer = self.writer._emit(self.node, _C10D.wait_tensor.default, (self.started,))
            self.buffer.meta["exchange"] = f"wait for {self.name}"
        return self.buffer

    def _unpacked(self) -> list[fx.Node]:
        if self.unpacked is None:
            emit, x = self.writer._emit, self.exchange
            args = (self.wait(), x.shapes, x.receive_boxes, *([x.dtypes] if x.dtypes else []))
            done = emit(self.node, unpack, args)
            done.meta["exchange"] = f"unpack from {self.name}"
            self.unpacked = [emit(self.node, getitem, (done, i)) for i in range(len(shapes_of(x.shapes)))]
        return self.unpacked

    def came(self, index: int) -> fx.Node | None:
        """What came of a value, in one dimension, where the rest of it stayed out of the message."""
        x = self.exchange
        if not isinstance(x, Exchange) or not x.kept:
            return None
        if len(x.sides) == 1:
            return self.wait()
        emit, aten = self.writer._emit, torch.ops.aten
        flat = [emit(self.node, aten.reshape.default, (part, [-1]))
                for (i, _), part in zip(x.came, self._unpacked(), strict=True) if i == index]  # fmt: skip
        return emit(self.node, aten.cat.default, (flat,)) if flat else None

    def finish(self) -> list[fx.Node]:
        if self.parts is None:
            x, self.parts = self.exchange, list(self._unpacked())
            if isinstance(x, Exchange) and x.kept:
                self.parts = self._around(x, self.parts)
            for i, part in enumerate(self.parts):  # of an exchange of several values, each has its own
                for key in ("val", "layout"):
                    if isinstance(part.meta.get(key), (list, tuple)):
                        part.meta[key] = part.meta[key][i]
        return self.parts

    def _around(self, exchange: Exchange, came: list[fx.Node]) -> list[fx.Node]:
        """The values: what came, around what stayed."""
        aten = torch.ops.aten

        def emit(target: Any, *args: Any) -> fx.Node:
            return self.writer._emit(self.node, target, args)

        def cut(x: fx.Node, box: Box) -> fx.Node:
            for d, (start, size) in enumerate(zip(box.src, box.size, strict=True)):
                x = emit(aten.slice.Tensor, x, d, start, start + size)
            return x

        def cat(parts: list[fx.Node], d: int) -> fx.Node:
            return emit(aten.cat.default, parts, d)

        def empty(x: fx.Node, shape: tuple[int, ...]) -> fx.Node:
            return emit(aten.new_empty.default, x, list(shape))

        xs = self.writer._map(self.node.args[0])
        # a value of its own also where all of it stays
        return [emit(aten.clone.default, x) if x in xs else x for x in exchange.results(xs, came, cut, cat, empty)]


class _Late(_Started):
    """An exchange whose message is an input: its parts are put straight around the rank's own rows."""

    def finish(self) -> list[fx.Node]:
        x = self.exchange
        if self.parts is None and isinstance(x, Exchange) and not x.dtypes:  # of bytes, each part is unpacked first
            values, layouts = self.node.meta["val"], self.node.meta["layout"]
            self.parts = []
            for i, own in enumerate(self.writer._map(self.node.args[0])):
                part = self.writer._emit(self.node, around, (own, self.wait(), *tiles_of(x, i)))
                part.meta |= {"val": values[i], "layout": layouts[i]}
                self.parts.append(part)
        return super().finish() if self.parts is None else self.parts


@dataclass(frozen=True)
class _Part:
    exchange: _Started
    index: int


_HANDLERS: dict[Any, Any] = {
    local: _Writer.local,
    alone: _Writer.alone,
    join: _Writer.join,
    context: _Writer.context,
    all_to_all: _Writer.all_to_all,
    all_gather: _Writer.all_gather,
    all_reduce: _Writer.all_reduce,
    outgoing: _Writer.outgoing,
    late: _Writer.late,
}
