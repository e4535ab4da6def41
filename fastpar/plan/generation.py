"""Whole generations on the virtual clock: what runs once, and a sampler's steps behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastpar.core.errors import OptionError
from fastpar.core.mesh import Mesh
from fastpar.graph.program import Program
from fastpar.graph.prologue import Parts, checked, split
from fastpar.graph.roofline import local_shape, node_bytes
from fastpar.plan.clock import CHECK, call, check_seconds, play
from fastpar.plan.engine import Call, Op
from fastpar.plan.timeline import Timeline
from fastpar.plan.topology import Device, Topology


@dataclass(frozen=True)
class Generation:
    """A sampling run: seconds until the last rank is done, seconds of every step (from the end of the one before to
    its own end, on the last rank), and the timeline of all calls (events of the first steps only)."""

    seconds: float
    steps: tuple[float, ...]
    timeline: Timeline

    @property
    def first(self) -> float:
        """Seconds of the first step, which also runs the prologues."""
        return self.steps[0]

    @property
    def step(self) -> float:
        """Mean seconds of a later step; of the first where there is no other."""
        return (self.seconds - self.first) / (len(self.steps) - 1) if len(self.steps) > 1 else self.first


def generation(
    programs: Sequence[Program],
    topology: Topology,
    steps: int,
    streams: int = 1,
    slowdown: Mapping[int, float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
    keep: int = 2,
    waiting: Sequence[Program] = (),
    warmup: int = 0,
    rounds: Sequence[Sequence[Program | None]] = (),
) -> Generation:
    """``steps`` steps of a sampler that calls N localised programs ``streams`` times in each (2 where guidance is a
    call of its own): every stream's first call runs the prologue, which ``hoist`` has marked, and the step, later
    calls the step; all check what the prologue read. Ranks meet at exchanges only, not between calls. The sampler's
    own work is not counted. Events of the first ``keep`` steps are kept; other arguments and errors as for
    ``clock.run``. Of a displaced plan the first ``warmup`` steps run the programs that are ``waiting``. Where ranks
    have strides, ``rounds`` are the programs of each step of a cycle, which take turns behind it.
    """
    for name, value in (("steps", steps), ("streams", streams)):
        if value < 1:
            raise OptionError(f"{name} is a whole number above 0, not {value!r}")
    mesh: Mesh = programs[0].mesh
    rounds = rounds or [programs]
    calls: list[Call] = []
    ends: list[int] = []  # of each step, the number of its last call
    begins = {0, warmup} if waiting else {0}  # each kind of program has a prologue of its own
    waits, *turns = [_calls(kind, topology) for kind in (waiting or programs, *rounds)]
    for number in range(steps):
        first, later = waits if number < warmup else turns[(number - warmup) % len(turns)]
        calls += (first if number in begins else later) * streams
        ends.append(len(calls) - 1)
    kept = ends[min(keep, steps) - 1] + 1 if keep > 0 else 0
    line = play(calls, mesh, topology, slowdown, jitter, seed, kept)
    done = [line.calls[i] for i in ends]
    return Generation(line.seconds, tuple(b - a for a, b in zip([0.0, *done], done, strict=False)), line)


def _calls(programs: Sequence[Program | None], topology: Topology) -> tuple[list[Call], list[Call]]:
    """What a stream's first step runs, and what later ones do. Ranks without a program have nothing to do."""
    there = [p for p in programs if p is not None]
    if not there:
        return [], []
    parts = [split(p) if p is not None else None for p in programs]
    if not any(parts):
        step = [call(programs, topology)]
        return step, step
    mesh: Mesh = there[0].mesh
    check = [[Op(_checked(p, r, mesh, topology.device), "check")] if p else () for r, p in enumerate(parts)]
    once, after = (call([getattr(p, name) if p else None for p in parts], topology) for name in ("prologue", "step"))
    return [check, once, after], [check, after]


def _checked(parts: Parts, rank: int, mesh: Mesh, device: Device) -> float:
    """Seconds in which a rank sees whether what its prologue reads has changed."""
    read = [part for several in checked(parts.prologue).values() for part in several]
    sizes = [node_bytes(part, local_shape(part, mesh, rank)) for part in read]
    return CHECK + sum(check_seconds(size, device) for size in sizes) if sizes else 0.0
