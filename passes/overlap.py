"""``overlap``: exchanges start as soon as they can and travel under whatever else there is to compute.

A collective is waited for where its result is first needed, so the order of the program is its schedule. List
scheduling over the graph with the cost model finds an order (Lightning Thunder sorts collectives to the front in
the same way; here seconds decide), for the program as it is, packed, and packed with V ahead. The fastest by the same
clock is taken; the order as written stays where none is faster, since overlap can lose (TensorRT-LLM's asynchronous
Ulysses does on 8 GPUs), or where it would need too much memory. What runs once per generation (``hoist``) stays in
front, in an order of its own, and is not part of what is weighed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar.core.errors import OptionError
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, source_line
from fastpar.graph.schedule import Exposed, Played, listed, parts, play, reorder
from fastpar.ops.collectives import COLLECTIVES
from fastpar.passes.pack import Pack

GAIN = 1e-3  # share of the time that another order must save, since every change is a risk


@dataclass(frozen=True)
class Way:
    """One alternative that was weighed: seconds of a call, on the computing stream, exposed; exchanges."""

    name: str
    seconds: float
    compute: float
    exposed: float
    collectives: int
    peak: int  # bytes alive at once


@dataclass(frozen=True)
class Schedule:
    """What ``overlap`` weighed, the one that it took first, and what stays exposed: (source, seconds, count, why)."""

    ways: tuple[Way, ...]
    exposed: tuple[tuple[str, float, int, str], ...]


@dataclass(frozen=True)
class Overlap(Pass):
    """Reorders the program. ``memory`` is the share of the device's memory that it may need on top of what the
    program needs as written; ``pack`` lets it join collectives of one place where that is no slower."""

    name: ClassVar[str] = "overlap"
    stage_in: ClassVar[str] = "lowered"
    stage_out: ClassVar[str] = "scheduled"

    memory: float = 0.02
    pack: bool = True

    def apply(self, program: Program, ctx: PassContext) -> Program:
        if ctx.costs is None:
            raise OptionError("pass 'overlap' needs a cost model, which a pipeline without a topology does not have")
        if not 0 <= self.memory <= 1:
            raise OptionError(f"pass 'overlap': memory is a share of the device's, 0 to 1, not {self.memory}")
        if not any(n.target in COLLECTIVES for n in program.graph.nodes):
            program.stage = "scheduled"
            return program
        once, step = parts(program.graph)
        written = play(step, ctx.costs.tasks(program.graph))
        best, way, best_order = program, _way("as written", step, written), [*once, *step]
        ways, played, tried = [way], written, set()
        bound = written.peak + self.memory * ctx.costs.topology.device.memory
        # of those as fast, the one with the fewest messages: it is the first
        for name, packed in (("packed", Pack()), ("packed, V ahead", Pack(ahead=True)), ("overlapped", None)):
            if packed is not None and not self.pack:
                continue
            other = packed.apply(program.copy(), ctx) if packed is not None else program
            once, step = parts(other.graph)
            count = _exchanges(step)
            if count in tried or (packed is not None and count == way.collectives):
                continue  # there was nothing to pack
            tried.add(count)
            tasks = ctx.costs.tasks(other.graph)
            order = listed(step, tasks, bound)
            found = play(order, tasks)
            ways.append(_way(name, step, found))
            if found.peak <= bound and found.seconds < (1 - GAIN) * way.seconds:
                best, way, played, best_order = other, ways[-1], found, [*listed(once, tasks), *order]
        reorder(best.graph, best_order)
        rest = sorted((w for w in ways if w is not way), key=lambda w: w.seconds)
        best.gm.meta["schedule"] = Schedule((way, *rest), _grouped(played.exposed))
        best.gm.recompile()
        best.stage = "scheduled"
        return best


def _exchanges(nodes: list[fx.Node]) -> int:
    return sum(n.target in COLLECTIVES for n in nodes)


def _way(name: str, nodes: list[fx.Node], played: Played) -> Way:
    return Way(name, played.seconds, played.compute, played.waited, _exchanges(nodes), played.peak)


def _grouped(exposed: list[Exposed]) -> tuple[tuple[str, float, int, str], ...]:
    """Exposed collectives of one line of the model and one reason together, longest first."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in exposed:
        found.setdefault((source_line(one.node), one.reason), []).append(one.seconds)
    rows = [(source, sum(times), len(times), reason) for (source, reason), times in found.items()]
    return tuple(sorted(rows, key=lambda row: -row[1]))
