"""Ranks and streams in random interleavings: what a schedule must survive on real machines.

Each rank has a stream that computes and, per exchange, one message to every member of its group. Whose turn it is,
is drawn from a seed; nothing but the program's own edges and waits orders anything. An exchange's result is NaN from
its start until the wait of a rank (by then all messages to it and from it have travelled, each at a random moment); a
message takes what is in the send buffer at the moment when it leaves, and once all have left the send buffer is
poisoned with NaN. So a dropped wait, a buffer that is written too early or read too late, and
exchanges in different orders show in the results (or as a CheckError). One-sided programs run here too (``sided``),
and several calls one behind the other, without a barrier in between.

Integers, which have no NaN, are poisoned with their largest value.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastpar.backends.simulate.lockstep import attribute, last_uses, own_inputs
from fastpar.backends.simulate.sided import Heaps, Message
from fastpar.core.errors import CheckError
from fastpar.core.mesh import Mesh
from fastpar.graph.program import Program
from fastpar.ops.collectives import reduce_terms
from fastpar.ops.onesided import is_onesided, put

_C10D = torch.ops._c10d_functional
_KINDS = {
    _C10D.all_to_all_single.default: "all_to_all",
    _C10D.all_gather_into_tensor.default: "all_gather",
    _C10D.all_reduce.default: "all_reduce",
}


def run_interleaved(programs: Sequence[Program], args: Sequence[Any], seed: int) -> list[tuple[Any, ...]]:
    """Outputs of every rank from the N localised programs, in the interleaving that ``seed`` draws.

    Raises CheckError where the ranks of a group start different exchanges, or wait for one that never comes.
    """
    return run_calls(programs, [args], seed)[0]


def run_calls(programs: Sequence[Program], calls: Sequence[Sequence[Any]], seed: int) -> list[list[tuple[Any, ...]]]:
    """The same for several calls in a row, [call][rank]: a rank starts its next call when its last is over."""
    return _World(programs, calls, random.Random(seed)).run()


def poison(x: torch.Tensor) -> torch.Tensor:
    """Overwrite with what no result should contain."""
    if x.is_floating_point() or x.is_complex():
        return x.fill_(float("nan"))
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


@dataclass
class _Exchange:
    """The n-th exchange of a group: what each member asked for, and which messages are still to come."""

    kind: str
    group: tuple[int, ...]
    sends: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    taken: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # (to, from) -> what has left
    left: list[tuple[int, int]] = field(default_factory=list)  # messages that can leave now
    done: set[int] = field(default_factory=set)  # members whose messages have all left and come


class _World:
    def __init__(self, programs: Sequence[Program], calls: Sequence[Sequence[Any]], draw: random.Random) -> None:
        self.mesh: Mesh = programs[0].mesh
        self.draw = draw
        self.ranks = [_Rank(r, p, [own_inputs(p, args, r) for args in calls]) for r, p in enumerate(programs)]
        self.heaps = Heaps(list(programs[0].gm.meta.get("heaps", {}).values()), len(programs))
        self.exchanges: dict[tuple[tuple[int, ...], int], _Exchange] = {}
        self.started: list[dict[tuple[int, ...], int]] = [{} for _ in programs]
        self.of: list[dict[fx.Node, _Exchange]] = [{} for _ in programs]

    def run(self) -> list[list[tuple[Any, ...]]]:
        while not all(r.over for r in self.ranks):
            steps: list[Any] = [r for r in self.ranks if not r.over and self._can(r)]
            steps += [(e, message) for e in self.exchanges.values() for message in e.left]
            steps += self.heaps.under_way
            if not steps:
                stuck = [r.rank for r in self.ranks if not r.over]
                raise CheckError(f"ranks {stuck} wait for exchanges that others never start")
            step = self.draw.choice(steps)
            if isinstance(step, _Rank):
                # several nodes in a row: a rank that is ahead of the others is as likely as one that keeps pace
                for _ in range(self.draw.randint(1, 12)):
                    if not step.over and self._can(step):
                        self._advance(step)
            elif isinstance(step, Message):
                gone = self.heaps.travel(step)
                if gone is not None:
                    poison(gone)
            else:
                self._travel(*step)
        return [[r.outputs[call] for r in self.ranks] for call in range(len(self.ranks[0].outputs))]

    def _can(self, rank: _Rank) -> bool:
        node = rank.node
        if node.target is _C10D.wait_tensor.default:
            exchange = self.of[rank.rank].get(node.args[0])  # type: ignore[arg-type]
            return exchange is None or rank.rank in exchange.done
        return not is_onesided(node) or self.heaps.can(node, rank.rank, rank.call)

    def _advance(self, rank: _Rank) -> None:
        if rank.node.target in _KINDS:
            self._start(rank)
        elif rank.node.target is put:
            x = rank.arguments(rank.node)[0]
            self.heaps.start(rank.node, x, rank.rank, rank.call)
            rank.give(x.new_empty(1, dtype=torch.uint8))
        elif is_onesided(rank.node):
            sent = rank.arguments(rank.node)[1]
            rank.give(self.heaps.receive(rank.node, sent, rank.rank, rank.call))
        else:
            rank.step()

    def _start(self, rank: _Rank) -> None:
        node = rank.node
        request = rank.arguments(node)
        group = self.mesh.group(rank.rank, tuple(str(request[-1]).split(".")))
        number = self.started[rank.rank].get(group, 0)
        self.started[rank.rank][group] = number + 1
        exchange = self.exchanges.setdefault((group, number), _Exchange(_KINDS[node.target], group))
        if exchange.kind != _KINDS[node.target]:
            raise CheckError(f"ranks {list(group)} start different exchanges: {exchange.kind}, {_KINDS[node.target]}")
        exchange.sends[rank.rank] = request
        buffer = request[0]
        if exchange.kind == "all_to_all":
            shape = (sum(request[1]), *buffer.shape[1:])
        else:
            shape = (buffer.shape[0] * (len(group) if exchange.kind == "all_gather" else 1), *buffer.shape[1:])
        exchange.results[rank.rank] = rank.give(poison(buffer.new_empty(shape)))
        self.of[rank.rank][node] = exchange
        if len(exchange.sends) == len(group):  # all have come: from now on messages may leave
            exchange.left = [(to, source) for to in group for source in group]

    def _travel(self, exchange: _Exchange, message: tuple[int, int]) -> None:
        exchange.left.remove(message)
        to, source = message
        buffer = exchange.sends[source][0]
        if exchange.kind == "all_to_all":
            me = exchange.group.index(to)
            buffer = buffer.split(list(exchange.sends[source][2]))[me]
        exchange.taken[message] = buffer.clone()
        if not any(s == source for _, s in exchange.left):
            poison(exchange.sends[source][0])
        if all((to, s) in exchange.taken for s in exchange.group):
            self._arrive(exchange, to)
        for rank in message:
            if not any(rank in m for m in exchange.left):
                exchange.done.add(rank)

    def _arrive(self, exchange: _Exchange, to: int) -> None:
        pieces = [exchange.taken[to, s] for s in exchange.group]
        if exchange.kind == "all_to_all" and [len(p) for p in pieces] != list(exchange.sends[to][1]):
            expected = list(exchange.sends[to][1])
            raise CheckError(f"sizes sent {[len(p) for p in pieces]} are not those expected {expected}")
        whole = reduce_terms(pieces, exchange.sends[to][1]) if exchange.kind == "all_reduce" else torch.cat(pieces)
        exchange.results[to].copy_(whole)


class _Rank:
    """One rank on its way through its program, once per call."""

    def __init__(self, rank: int, program: Program, calls: list[list[Any]]) -> None:
        self.rank, self.program, self.calls = rank, program, calls
        self.nodes = list(program.graph.nodes)
        self.last = last_uses(program.graph)
        self.outputs: list[tuple[Any, ...]] = []
        self._begin()

    def _begin(self) -> None:
        self.env: dict[fx.Node, Any] = {}
        self.queue = iter(self.calls[len(self.outputs)])
        self.at = 0

    @property
    def call(self) -> int:
        """Number of the call that it is in, from 1."""
        return len(self.outputs) + 1

    @property
    def over(self) -> bool:
        return len(self.outputs) == len(self.calls)

    @property
    def node(self) -> fx.Node:
        return self.nodes[self.at]

    def arguments(self, node: fx.Node) -> tuple[Any, ...]:
        return tuple(fx.map_arg(node.args, lambda n: self.env[n]))

    def give(self, value: Any) -> Any:
        """The value of the current node; on to the next."""
        node = self.node
        self.env[node] = value
        for gone in self.last.get(node, ()):
            del self.env[gone]
        self.at += 1
        return value

    def step(self) -> None:
        node = self.node
        if node.op == "placeholder":
            self.give(next(self.queue))
        elif node.op == "get_attr":
            self.give(attribute(self.program.gm, str(node.target)))
        elif node.op == "output":
            self.outputs.append(tuple(fx.map_arg(node.args[0], lambda n: self.env[n])))  # type: ignore[arg-type]
            if not self.over:
                self._begin()
        elif node.target is _C10D.wait_tensor.default:
            self.give(self.env[node.args[0]])  # type: ignore[index]
        else:
            kwargs = fx.map_arg(node.kwargs, lambda n: self.env[n])
            self.give(node.target(*self.arguments(node), **kwargs))  # type: ignore[operator]


__all__ = ["poison", "run_calls", "run_interleaved"]
