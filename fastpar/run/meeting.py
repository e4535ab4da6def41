"""Between two calls: ranks that next run the model at the same step exchange what each has sent last (pass ``stride``).

A *cycle* is as many steps as all strides divide. At its start all ranks run the model; within it those whose stride
divides the number of the step. These exchange their messages, in a program of exchanges alone, in front of the model's
own; of the others each keeps the message that came before::

    strides 1:1:2      step 0: ranks 0, 1, 2       step 1: ranks 0, 1       step 2 is step 0 of the next cycle

So ranks start the same exchanges in the same order whichever steps a sampler takes, or where it stops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh, some
from fastpar.graph.program import Input, Program, module_of
from fastpar.ops.late import late, side
from fastpar.passes.displace import AXIS
from fastpar.passes.localise import group_name
from fastpar.run.build import Built

aten = torch.ops.aten
_C10D = torch.ops._c10d_functional
Members = tuple[int, ...]
"""Coordinates along the axis, in order, of ranks that meet."""


def cycle(strides: Sequence[int]) -> int:
    """Steps after which all ranks run the model at the same step again."""
    return math.lcm(*strides)


def members(strides: Sequence[int], step: int) -> Members:
    """Coordinates of the ranks that run the model at this step of a cycle."""
    return tuple(i for i, stride in enumerate(strides) if step % stride == 0)


def meetings(strides: Sequence[int]) -> list[Members]:
    """The sets of ranks that meet, each once, all ranks first."""
    return list(dict.fromkeys(members(strides, step) for step in range(cycle(strides)) if members(strides, step)))


def here_of(rank: int, mesh: Mesh) -> int:
    """A rank's coordinate along the axis; 0 where nothing is split over it."""
    return mesh.coordinate(rank, (AXIS,)) if AXIS in mesh.names else 0


def axes_of_meeting(who: Members, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes, for names of groups, of those who meet."""
    return (some(AXIS, who),) if AXIS in mesh.names and len(who) < mesh.size((AXIS,)) else (AXIS,)


def meeting(
    steady: Program, mesh: Mesh, rank: int, who: Members, groups: Mapping[tuple[str, ...], str] | None = None,
    wait: bool = True,
) -> Program:  # fmt: skip
    """The program of one rank: from what it has sent and what came before, ``[*sent, *came]``, to what came now.

    ``steady`` is the lowered program that ``stride`` has made; all messages are one-dimensional. Where a rank is not
    among those who meet, or is alone there, what came before stays. Without ``wait``, a message that comes from all
    ranks is still under way, and is waited for where the model's program needs it.
    """
    axes = axes_of_meeting(who, mesh)
    name = (groups or {}).get(axes, group_name(axes))
    carried = [n for n, i in zip(steady.placeholders, steady.inputs, strict=True) if i.kind == "carried"]
    several = {n.args[3]: n for n in steady.graph.nodes if n.target is late}
    graph = fx.Graph()
    order = [(node, several[node]) for node in carried if node in several]
    sides = [side(node, mesh, rank) for _, node in order]
    write = _Writer(graph, [node.meta["val"] for node, _ in order])
    sent = [write.given(f"sent_{i}", i, sum(one.send_splits)) for i, one in enumerate(sides)]
    before = [write.given(f"came_{i}", i, sum(one.receive_splits)) for i, one in enumerate(sides)]
    outs = []
    for i, (x, old, exchange) in enumerate(zip(sent, before, sides, strict=True)):
        there = [mesh.coordinate(peer, (AXIS,)) in who for peer in exchange.group]
        if not there[exchange.me] or sum(there) < 2:
            outs.append(old)
            continue
        gives, gets = exchange.send_splits, exchange.receive_splits
        splits = [[n for n, here in zip(sizes, there, strict=True) if here] for sizes in (gets, gives)]
        message = x if all(there) else write.joined(i, write.parts(i, x, gives, there))
        started = write.call(i, sum(splits[0]), _C10D.all_to_all_single.default, message, *splits, name)
        if all(there) and not wait:
            outs.append(started)
            continue
        got = write.call(i, sum(splits[0]), _C10D.wait_tensor.default, started)
        if not all(there):  # in the place of theirs
            new = iter(write.parts(i, got, [n * here for n, here in zip(gets, there, strict=True)], there))
            kept = iter(write.parts(i, old, gets, [not here for here in there]))
            got = write.joined(i, [next(new if here else kept) for here in there])
        outs.append(got)
    graph.output(tuple(outs))
    gm = module_of(fx.GraphModule(torch.nn.Module(), fx.Graph()), graph, f"Meeting{rank}")
    inputs = tuple(Input(node.name, "carried") for node in (*sent, *before))
    return Program(gm, inputs, "localised", f"meeting_{'_'.join(map(str, who))}", mesh, steady.plan)


class _Writer:
    """Writes nodes with fake values: one-dimensional, of message ``i``'s dtype."""

    def __init__(self, graph: fx.Graph, like: Sequence[torch.Tensor]) -> None:
        self.graph, self.like = graph, like

    def _noted(self, node: fx.Node, i: int, size: int) -> fx.Node:
        with self.like[i].fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = self.like[i].new_empty(size)
        return node

    def given(self, name: str, i: int, size: int) -> fx.Node:
        return self._noted(self.graph.placeholder(name), i, size)

    def call(self, i: int, size: int, target: Any, *args: Any) -> fx.Node:
        return self._noted(self.graph.call_function(target, args), i, size)

    def parts(self, i: int, x: fx.Node, sizes: Sequence[int], wanted: Sequence[bool]) -> list[fx.Node]:
        """Of a message of parts of these sizes those that are wanted."""
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        return [self.call(i, size, aten.slice.Tensor, x, 0, start, start + size)
                for start, size, keep in zip(starts, sizes, wanted, strict=True) if keep]  # fmt: skip

    def joined(self, i: int, parts: list[fx.Node]) -> fx.Node:
        return self.call(i, sum(p.meta["val"].numel() for p in parts), aten.cat.default, parts)


def joined(meeting: Program, steady: Program) -> Program:
    """Both programs of one rank as one: what came goes straight to where it is needed."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    outs = graph.graph_copy(meeting.graph, env)
    came = iter(outs)  # type: ignore[arg-type]
    for node in steady.graph.nodes:
        if node.op == "placeholder" and node.meta.get("came"):
            env[node] = next(came)
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: env[n]))
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    rest = [i for i, node in zip(steady.inputs, steady.placeholders, strict=True) if not node.meta.get("came")]
    return replace(steady, gm=module_of(steady.gm, graph, "Joined"), inputs=(*meeting.inputs, *rest))


def rounds(built: Built, programs: Sequence[Program]) -> list[list[Program | None]]:
    """What every rank runs in each step of a cycle, meeting and all; None where it has nothing to do."""
    out: list[list[Program | None]] = []
    for step in range(cycle(built.plan.steps)):
        who = members(built.plan.steps, step)
        here = [here_of(rank, built.mesh) in who for rank in range(built.mesh.ranks)]
        out.append([joined(meeting(built.lowered, built.mesh, rank, who, wait=False), programs[rank]) if there else None
                    for rank, there in enumerate(here)])  # fmt: skip
    return out


def rows_like(rows: Sequence[tuple[str, str] | None], shape: Sequence[int]) -> tuple[Layout, Layout]:
    """Layouts of latents of this shape with the rows of an output (``rows``: of each, before and after its exchange).

    Latents have the output's dimensions and as many rows; a batch or channels may be others. Raises PlanError.
    """
    several = [tuple(map(Layout.parse, pair)) for pair in rows if pair is not None]
    several.sort(key=lambda pair: pair[1].shape[1:] != tuple(shape)[1:])
    for src, dst in several:
        cut = [AXIS in dim.axes for dim in src.dims]
        if len(shape) == len(cut) and all(n == m for n, m, c in zip(shape, dst.shape, cut, strict=True) if c):
            dims = (dim if c else Dim.whole(n) for dim, n, c in zip(src.dims, shape, cut, strict=True))
            return Layout(tuple(dims)), Layout.whole(shape)
    shapes = " and ".join(str(list(dst.shape)) for _, dst in several) or "nothing that is split"
    raise PlanError(f"steps: latents of shape {list(shape)} have no rows of the model's output, which is {shapes}")
