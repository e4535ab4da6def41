"""The order of a lowered program: what it takes on two streams, and a better one.

A collective starts where it stands in the program and is waited for where its result is first needed, so an order
of the nodes is a schedule: nothing else has to be written down. The machine has a stream that computes and one that
communicates (exchanges one after the other); a node's ``Task`` says what it takes of each.

``listed`` is list scheduling: of what could run now, exchanges first, else the node with the longest way to the end;
or, which feeds the link sooner, the one with the shortest way to the next exchange. The faster of the two is kept.
Operators that take no time of their own (views, and what is fused with its neighbours) stay with the first that
needs them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem

from torch import fx

from fastpar.ops.collectives import COLLECTIVES


@dataclass(frozen=True)
class Task:
    """Seconds on the computing stream (of an exchange: packing), on the link, and to unpack; bytes of the result, and
    whether it only looks at what its operand holds."""

    compute: float = 0.0
    travel: float = 0.0
    unpack: float = 0.0
    size: int = 0
    view: bool = False


Tasks = Mapping[fx.Node, Task]
_Rank = tuple[float, float]  # of nodes that could run, the one with the least is next


@dataclass(frozen=True)
class Exposed:
    """A collective that the computing stream waits for: how long, and why nothing hides it."""

    node: fx.Node
    seconds: float
    reason: str


@dataclass
class Played:
    """One call in a given order: seconds in all, on the computing stream, on the link, what was waited for, and the
    most bytes that are alive at once (inputs not counted)."""

    seconds: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    peak: int = 0
    exposed: list[Exposed] = field(default_factory=list)

    @property
    def waited(self) -> float:
        return sum(e.seconds for e in self.exposed)


def calls(graph: fx.Graph) -> list[fx.Node]:
    """What an order is of: everything but inputs, constants and the output."""
    return [n for n in graph.nodes if n.op == "call_function"]


def parts(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls that run once per generation (marked ``hoisted``), which come first, and those of every step."""
    once = [n for n in calls(graph) if n.meta.get("hoisted")]
    return once, [n for n in calls(graph) if not n.meta.get("hoisted")]


def play(order: Sequence[fx.Node], tasks: Tasks) -> Played:
    """What the nodes take in this order."""
    run = _Run(tasks, order)
    for node in order:
        run.emit(node)
    return run.done()


class _Run:
    """The two streams while nodes are handed over one by one."""

    def __init__(self, tasks: Tasks, nodes: Sequence[fx.Node]) -> None:
        self.tasks = tasks
        self.time = self.link = 0.0
        self.live = 0
        self.played = Played()
        self.ends: dict[fx.Node, float] = {}  # exchanges under way
        self.begun: dict[fx.Node, float] = {}
        self.asked: dict[fx.Node, float] = {}
        self.inside = set(nodes)
        self.uses = {n: len(n.users) for n in nodes}

    def emit(self, node: fx.Node) -> None:
        task = self.tasks[node]
        if node.target is not getitem:
            for operand in node.all_input_nodes:
                self._need(operand.args[0] if operand.target is getitem else operand)  # type: ignore[arg-type]
        self.time += task.compute
        self.played.compute += task.compute
        if node.target in COLLECTIVES:
            begin = max(self.time, self.link)
            self.asked[node], self.begun[node] = self.time, begin
            self.ends[node] = self.link = begin + task.travel
            self.played.communication += task.travel
        if not task.view:
            self.live += task.size
            self.played.peak = max(self.played.peak, self.live)
            self._used(node.all_input_nodes)

    def _used(self, nodes: Iterable[fx.Node]) -> None:
        """One use less of each; what has none left goes. A view uses its operand for as long as it is used."""
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in self.inside:
                continue
            self.uses[node] -= 1
            if self.uses[node] == 0:
                task = self.tasks[node]
                self.live -= 0 if task.view else task.size
                stack += node.all_input_nodes if task.view else []

    def _need(self, node: fx.Node) -> None:
        """Wait for an exchange that is still under way, and unpack it."""
        if node not in self.ends:
            return
        end, task = self.ends.pop(node), self.tasks[node]
        if end > self.time:
            waited = end - self.time
            queued = self.begun[node] - self.asked[node]
            self.played.exposed.append(Exposed(node, waited, _reason(waited, queued, task.travel)))
            self.time = end
        self.time += task.unpack
        self.played.compute += task.unpack

    def done(self) -> Played:
        for node in list(self.ends):
            self._need(node)
        self.played.seconds = self.time
        return self.played


def _reason(waited: float, queued: float, travel: float) -> str:
    if queued > travel:
        return "other exchanges were on the link"
    if waited < 0.95 * travel:
        return "what can run meanwhile is shorter"
    return "all that is left to run needs it"


def listed(nodes: list[fx.Node], tasks: Tasks, bound: float = float("inf")) -> list[fx.Node]:
    """An order of nodes of a graph that hides exchanges, if anything can; what other nodes give is there.

    ``bound``: bytes alive at once, above which nodes come in the order that they have (which frees what it frees).
    """
    ways, feeds = _ways(nodes, tasks), _feeds(nodes, tasks)
    found = []
    for priority in ({n: (-ways[n], 0.0) for n in nodes}, {n: (feeds[n], -ways[n]) for n in nodes}):
        lister = _Lister(nodes, tasks, bound, priority)
        order = lister.run()
        found.append((lister.machine.done().seconds, order))
    return min(found, key=lambda f: f[0])[1]


def shortest(nodes: list[fx.Node], tasks: Tasks) -> float:
    """Seconds of the nodes in the better of the order that they have and the one of list scheduling: what passes weigh
    by that change what there is to hide."""
    return min(play(order, tasks).seconds for order in (nodes, listed(nodes, tasks)))


SLACK = 5e-3
"""Share of a call by which ``shortest`` may be longer and count as equal: list scheduling is a heuristic, and packing
comes later."""


class _Lister:
    def __init__(self, nodes: list[fx.Node], tasks: Tasks, bound: float, priority: Mapping[fx.Node, _Rank]) -> None:
        self.nodes, self.tasks, self.bound = nodes, tasks, bound
        self.place = {n: i for i, n in enumerate(nodes)}
        self.priority = priority
        self.open = {n: sum(m in self.place for m in n.all_input_nodes) for n in nodes}
        self.machine = _Run(tasks, nodes)
        self.emitted: set[fx.Node] = set()
        self.order: list[fx.Node] = []
        self.exchanges: list[tuple[_Rank, int]] = []
        self.ready: list[tuple[_Rank, int]] = []
        self.early: list[int] = []  # of those, by place
        self.late: list[tuple[float, int]] = []  # by the end of the exchange that they need
        self.taken: set[fx.Node] = set()
        self.known: dict[fx.Node, float] = {}  # when operands of what takes no time itself are there

    def run(self) -> list[fx.Node]:
        for node in [n for n in self.nodes if self.open[n] == 0]:  # before any of them opens others
            self._ready(node, 0.0)
        while (node := self._next()) is not None:
            self._emit(node)
        for node in self.nodes:  # views that only the output needs
            self._with_operands(node)
        return self.order

    def _free(self, node: fx.Node) -> bool:
        return node.target not in COLLECTIVES and self.tasks[node].compute == 0.0

    def _ready(self, node: fx.Node, when: float) -> None:
        """All operands of ``node`` are there at ``when``; of what takes no time, its result is, too."""
        stack = [(node, when)]
        while stack:
            node, when = stack.pop()
            if self._free(node):
                stack += self._leads(node, when)
            elif when > self.machine.time:
                heapq.heappush(self.late, (when, self.place[node]))
            else:
                self._push(node)

    def _push(self, node: fx.Node) -> None:
        item = (self.priority[node], self.place[node])
        heapq.heappush(self.exchanges if node.target in COLLECTIVES else self.ready, item)
        heapq.heappush(self.early, self.place[node])

    def _leads(self, node: fx.Node, when: float) -> list[tuple[fx.Node, float]]:
        """Users of ``node`` that wait for nothing else, with the time at which they can run."""
        out = []
        for user in node.users:
            if user not in self.place:
                continue
            self.known[user] = max(self.known.get(user, 0.0), when)
            self.open[user] -= 1
            if self.open[user] == 0:
                out.append((user, self.known.pop(user)))
        return out

    def _next(self) -> fx.Node | None:
        while True:
            while self.late and self.late[0][0] <= self.machine.time:
                self._push(self.nodes[heapq.heappop(self.late)[1]])
            heaps = [self.exchanges, self.ready]
            if self.machine.live > self.bound:
                while self.early and self.nodes[self.early[0]] in self.taken:
                    heapq.heappop(self.early)
                if self.early:
                    return self._take(self.nodes[heapq.heappop(self.early)])
            for heap in heaps:
                while heap:
                    node = self.nodes[heapq.heappop(heap)[1]]
                    if node not in self.taken:
                        return self._take(node)
            if not self.late:
                return None
            # Nothing is left to do but to wait. Emitting the node waits; until then time stands still.
            return self._take(self.nodes[heapq.heappop(self.late)[1]])

    def _take(self, node: fx.Node) -> fx.Node:
        self.taken.add(node)
        return node

    def _emit(self, node: fx.Node) -> None:
        self._with_operands(node)
        end = self.machine.ends.get(node, self.machine.time)
        for user, when in self._leads(node, end):
            self._ready(user, when)

    def _with_operands(self, node: fx.Node) -> None:
        """``node`` and, before it, what it needs that takes no time of its own."""
        stack = [(node, False)]
        while stack:
            node, opened = stack.pop()
            if node in self.emitted:
                continue
            if opened:
                self.emitted.add(node)
                self.order.append(node)
                self.machine.emit(node)
                continue
            stack.append((node, True))
            needed = [n for n in node.all_input_nodes if n in self.place and n not in self.emitted]
            stack += [(n, False) for n in sorted(needed, key=lambda n: -self.place[n])]


def _ways(nodes: list[fx.Node], tasks: Tasks) -> dict[fx.Node, float]:
    """Seconds of the longest way from the start of each node to the end of the program."""
    ways: dict[fx.Node, float] = {}
    for node in reversed(nodes):
        task = tasks[node]
        after = max((ways[user] for user in node.users if user in ways), default=0.0)
        ways[node] = task.compute + task.travel + task.unpack + after
    return ways


def _feeds(nodes: list[fx.Node], tasks: Tasks) -> dict[fx.Node, float]:
    """Seconds of computing from the start of each node to the nearest exchange behind it."""
    feeds: dict[fx.Node, float] = {}
    for node in reversed(nodes):
        task = tasks[node]
        after = min((feeds[user] for user in node.users if user in feeds), default=float("inf"))
        feeds[node] = 0.0 if node.target in COLLECTIVES else task.compute + after
    return feeds


def reorder(graph: fx.Graph, order: Sequence[fx.Node]) -> None:
    """Put the graph's calls into ``order``, behind its inputs."""
    end = graph.output_node()
    for node in order:
        end.prepend(node)
