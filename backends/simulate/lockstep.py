"""Lock step: all ranks' programs in one process, any device and dtype.

``run_global`` executes the stages in which one program stands for all ranks (*sharded*,
*lowered*): node by node, each rank on its own shards, communication by its N-rank meaning.
``run_local`` executes N localised programs side by side: each runs to its next collective,
which takes place when all ranks of its group have come to the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastpar.core.errors import CheckError
from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.program import Program
from fastpar.ops.alone import alone, alone_across
from fastpar.ops.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    axes_of,
    exchange_across,
    layouts_of,
    local,
    pack_boxes,
    put_together,
    reduce_terms,
)
from fastpar.ops.join import join, join_across
from fastpar.ops.late import late, outgoing, side
from fastpar.ops.redistribute import across, redistribute, take
from fastpar.ops.ring import attention_lse, merge, redistribute_all
from fastpar.rules.localise import Localiser
from fastpar.sharding.blockwise import split_over
from fastpar.sharding.candidates import is_attention

Watch = Callable[[fx.Node, list[Any]], None]


def run_global(program: Program, args: Sequence[Any], watch: Watch | None = None) -> list[tuple[Any, ...]]:
    """Outputs of every rank. ``args``: the flat (whole) inputs, shared by all ranks.

    ``watch(node, values per rank)`` is called after every node.
    """
    mesh: Mesh = program.mesh
    ranks = range(mesh.ranks)
    env: dict[fx.Node, list[Any]] = {}
    localiser = Localiser(mesh)
    queue = iter(args)
    last = last_uses(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = next(queue)
            env[node] = [_own(value, node, mesh, r) for r in ranks]
        elif node.op == "get_attr":
            env[node] = [attribute(program.gm, str(node.target))] * mesh.ranks
        elif node.op == "output":
            return [tuple(fx.map_arg(node.args[0], lambda n, r=r: env[n][r])) for r in ranks]  # type: ignore[misc]
        else:
            meaning = _MEANING.get(node.target)
            if meaning is not None:
                env[node] = meaning(node, env, mesh)
            elif is_attention(node) and not node.args[1].meta["layout"].dims[-2].is_whole:
                env[node] = _attention(node, env, mesh)
            elif split_over(node):
                env[node] = _block(node, env, mesh)
            else:
                env[node] = [_call(node, env, localiser, r) for r in ranks]
        if watch is not None:
            watch(node, env[node])
        for gone in last.get(node, ()):
            del env[gone]
    raise AssertionError("a graph ends in its output node")


def _call(node: fx.Node, env: dict[fx.Node, list[Any]], localiser: Localiser, rank: int) -> Any:
    target, args, kwargs = localiser.call(node, rank)
    args, kwargs = fx.map_arg((args, kwargs), lambda n: env[n][rank])
    return target(*args, **kwargs)


def _attention(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    """Attention over split keys means: as if every rank had all of them."""
    gathered: dict[int, list[Any]] = {}
    for i in (1, 2):
        operand: fx.Node = node.args[i]  # type: ignore[assignment]
        layout: Layout = operand.meta["layout"]
        whole = layout.with_dim(len(layout.dims) - 2, Dim.whole(layout.dims[-2].size))
        gathered[i] = across(env[operand], layout, whole, mesh)
    localiser = Localiser(mesh)
    out = []
    for rank in range(mesh.ranks):
        target, args, kwargs = localiser.call(node, rank)
        args, kwargs = fx.map_arg((args, kwargs), lambda n, r=rank: env[n][r])  # type: ignore[misc]
        # by position: q, k and v may be one value, and q stays the rank's own rows
        out.append(target(*(gathered[i][rank] if i in gathered else a for i, a in enumerate(args)), **kwargs))
    return out


def _block(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    """A block whose keys are split means: over the keys of all ranks of the group, each with its mask columns."""
    keys: Dim = node.args[1].meta["layout"].dims[-2]  # type: ignore[union-attr]
    q, k, v, mask, *options = fx.map_arg(node.args[:6], lambda n: env[n])
    out = []
    for rank in range(mesh.ranks):
        total = None
        for member in mesh.group(rank, split_over(node)):
            columns = mask[rank] if mask is not None else None
            if columns is not None and columns.shape[-1] == keys.size > 1:
                rows = torch.from_numpy(keys.rows(mesh, member).copy()).to(columns.device)
                columns = columns.index_select(columns.dim() - 1, rows)
            block = attention_lse(q[rank], k[member], v[member], columns, *options)
            total = block if total is None else merge(*total, *block)
        assert total is not None
        out.append((total[0].to(total[1].dtype), total[1]))
    return out


def _join(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    xs, srcs, dst, dim = node.args
    layouts = [Layout.parse(str(t)) for t in srcs]  # type: ignore[union-attr]
    return join_across([env[x] for x in xs], layouts, Layout.parse(str(dst)), int(str(dim)), mesh)  # type: ignore[union-attr]


def _redistribute(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    src, dst = (Layout.parse(str(a)) for a in node.args[1:3])
    return list(across(env[node.args[0]], src, dst, mesh))  # type: ignore[index]


def _redistribute_all(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    moved = [
        across(env[x], Layout.parse(src), Layout.parse(dst), mesh)
        for x, src, dst in zip(*node.args, strict=True)  # type: ignore[arg-type]
    ]
    return [[value[r] for value in moved] for r in range(mesh.ranks)]


def _exchange(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    srcs, dsts = layouts_of(node)
    results = exchange_across([env[x] for x in node.args[0]], srcs, dsts, mesh)  # type: ignore[union-attr]
    return [[value[r] for value in results] for r in range(mesh.ranks)]


def _local(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    src, dst = (Layout.parse(str(a)).summed() for a in node.args[1:3])
    return list(exchange_across([env[node.args[0]]], [src], [dst], mesh)[0])  # type: ignore[index]


def _outgoing(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    xs = [env[x] for x in node.args[0]]  # type: ignore[union-attr]
    return [pack_boxes([x[r] for x in xs], side(node, mesh, r).send_boxes) for r in range(mesh.ranks)]


def _late(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    xs, came = [env[x] for x in node.args[0]], env[node.args[3]]  # type: ignore[union-attr, index]
    return [put_together(side(node, mesh, r), [x[r] for x in xs], came[r]) for r in range(mesh.ranks)]


def _all_reduce(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    axes, op = axes_of(node, mesh), str(node.args[1])
    several = [env[x] for x in node.args[0]]  # type: ignore[union-attr]
    return [[reduce_terms([v[m] for m in mesh.group(r, axes)], op) for v in several] for r in range(mesh.ranks)]


def _alone(node: fx.Node, env: dict[fx.Node, list[Any]], mesh: Mesh) -> list[Any]:
    src, dst = (Layout.parse(str(a)) for a in node.args[1:3])
    return list(alone_across(env[node.args[0]], src, dst, mesh))  # type: ignore[index]


_MEANING: dict[Any, Callable[..., list[Any]]] = {
    redistribute: _redistribute,
    redistribute_all: _redistribute_all,
    local: _local,
    alone: _alone,
    join: _join,
    all_to_all: _exchange,
    all_gather: _exchange,
    all_reduce: _all_reduce,
    outgoing: _outgoing,
    late: _late,
}


# -- localised programs -----------------------------------------------------------------------

_C10D = torch.ops._c10d_functional
_STARTS = {
    _C10D.all_to_all_single.default: "all_to_all",
    _C10D.all_gather_into_tensor.default: "all_gather",
    _C10D.all_reduce.default: "all_reduce",
}


def run_local(programs: Sequence[Program], args: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Outputs of every rank from the N localised programs.

    Raises CheckError where ranks of one group come to different collectives, or some end early.
    """
    mesh: Mesh = programs[0].mesh
    runners = [_run_rank(p, own_inputs(p, args, rank)) for rank, p in enumerate(programs)]
    results: list[tuple[Any, ...] | None] = [None] * mesh.ranks
    waiting: dict[int, tuple[str, tuple[Any, ...]]] = {}
    answers: dict[int, Any] = dict.fromkeys(range(mesh.ranks))
    while answers:
        for rank in list(answers):
            try:
                waiting[rank] = runners[rank].send(answers.pop(rank))
            except StopIteration as stop:
                results[rank] = stop.value
        for rank in list(waiting):
            if rank not in waiting:
                continue
            kind, request = waiting[rank]
            group = mesh.group(rank, tuple(str(request[-1]).split(".")))
            if not all(m in waiting for m in group):
                continue
            others = {m: waiting[m] for m in group}
            if any(k != kind or r[-1] != request[-1] for k, r in others.values()):
                raise CheckError(f"ranks {list(group)} come to different collectives: " + ", ".join(
                    f"{m}: {k} on {r[-1]}" for m, (k, r) in others.items()))  # fmt: skip
            for member, value in zip(group, _COLLECT[kind]([others[m][1] for m in group]), strict=True):
                del waiting[member]
                answers[member] = value
    if waiting:
        raise CheckError(f"ranks {sorted(waiting)} wait for collectives that others never reach")
    return [r for r in results if r is not None]


@dataclass(frozen=True)
class PerRank:
    """An argument of which each rank has its own: what its last call kept."""

    values: tuple[Any, ...]


def _own(value: Any, node: fx.Node, mesh: Mesh, rank: int) -> Any:
    """What ``rank`` is given of an argument: its part of a weight that is held in parts."""
    if isinstance(value, PerRank):
        return value.values[rank]
    layout = node.meta.get("layout")
    part = isinstance(layout, Layout) and not layout.is_whole
    return take(value, layout, mesh, rank).contiguous() if part else value  # type: ignore[arg-type]


def own_inputs(program: Program, args: Sequence[Any], rank: int) -> list[Any]:
    """What ``rank`` is given of the arguments."""
    pairs = zip(program.placeholders, args, strict=True)
    return [_own(value, node, program.mesh, rank) for node, value in pairs]


def carried(program: Program, results: Sequence[tuple[Any, ...]]) -> list[PerRank]:
    """Of every rank's outputs those that are arguments of the next call."""
    kept = [r[len(r) - program.carries :] for r in results]
    return [PerRank(values) for values in zip(*kept, strict=True)]


def with_carried(program: Program, args: Sequence[Any]) -> list[Any]:
    """The arguments with what a call with the same ones has kept, for a program that takes that."""
    if program.first is None or not any(i.kind == "carried" for i in program.inputs):
        return list(args)
    return [*args, *passed_on(program, run_global(program.first, args))]


def passed_on(program: Program, results: Sequence[tuple[Any, ...]]) -> list[PerRank]:
    """Of what every rank's first call gave what ``program`` takes: messages that were sent (pass ``stride``) as those
    that came."""
    assert program.first is not None
    kept = carried(program.first, results)
    mesh: Mesh = program.mesh
    given = [n for n, i in zip(program.placeholders, program.inputs, strict=True) if i.kind == "carried"]
    for node in program.graph.nodes:
        if node.target is not late:
            continue
        i = given.index(node.args[3])
        sides = [side(node, mesh, r) for r in range(mesh.ranks)]
        sent = [kept[i].values[r].split(one.send_splits) for r, one in enumerate(sides)]
        kept[i] = PerRank(tuple(torch.cat([sent[peer][one.me] for peer in one.group]) for one in sides))
    return kept


def _run_rank(program: Program, args: list[Any]) -> Generator[tuple[str, tuple[Any, ...]], Any, tuple[Any, ...]]:
    env: dict[fx.Node, Any] = {}
    queue = iter(args)
    last = last_uses(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(queue)
        elif node.op == "get_attr":
            env[node] = attribute(program.gm, str(node.target))
        elif node.op == "output":
            return tuple(fx.map_arg(node.args[0], lambda n: env[n]))  # type: ignore[arg-type]
        else:
            values, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            if node.target in _STARTS:
                env[node] = yield _STARTS[node.target], values
            elif node.target is _C10D.wait_tensor.default:
                env[node] = values[0]
            else:
                env[node] = node.target(*values, **kwargs)  # type: ignore[operator]
        for gone in last.get(node, ()):
            del env[gone]
    raise AssertionError("a graph ends in its output node")


def _collect_all_to_all(requests: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    sent = [buffer.split(list(send)) for buffer, _, send, _ in requests]
    out = []
    for me, (_, receive, _, _) in enumerate(requests):
        pieces = [s[me] for s in sent]
        if [len(p) for p in pieces] != list(receive):
            raise CheckError(f"sizes sent {[len(p) for p in pieces]} are not those expected {list(receive)}")
        out.append(torch.cat(pieces))
    return out


def _collect_all_gather(requests: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    return [torch.cat([r[0] for r in requests]) for _ in requests]


def _collect_all_reduce(requests: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    return [reduce_terms([r[0] for r in requests], requests[0][1]) for _ in requests]


_COLLECT: dict[str, Callable[[list[tuple[Any, ...]]], list[torch.Tensor]]] = {
    "all_to_all": _collect_all_to_all,
    "all_gather": _collect_all_gather,
    "all_reduce": _collect_all_reduce,
}


def attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Values that no later node needs, by the node after which they go."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for operand in {*node.all_input_nodes, node} - seen:
            seen.add(operand)
            if node.op != "output":
                last.setdefault(node, []).append(operand)
    return last


__all__ = ["run_global", "run_local"]
