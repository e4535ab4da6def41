"""Which program a call of a displaced plan runs, and what is carried from one step to the next.

The first calls of a sampling run (``warmup`` of them, and always one) wait for their exchanges; later ones use what
the call before has kept (pass ``displace``). What is kept belongs to one generation and to one stream of it: the same
place in the step before. So nothing is carried outside of ``fastpar.generation()``, where nobody says which calls
belong together: there every call waits, which is said once.

A call's stream is found by what stays the same over the steps (a prompt is the same tensor in every step) and, where
that is the same for several calls of a step, by their order: calls that come with the very sample of the call before
are of the same step. ``fastpar.generation(streams=N)`` says it instead: call k is of stream k mod N.

Ranks find the same, since all of this follows from the order of calls and which tensors come again. Frames without any
input that stays the same, and samplers that make a copy of the sample for each of their calls, need to say it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastpar.graph.program import Program
from fastpar.graph.prologue import fake_outputs
from fastpar.passes.hoist import guess
from fastpar.run.artefact import Runner, StateSpec
from fastpar.run.stream import OUTSIDE, STREAMS, Generation, Stream, Streams, current_generation, version

log = logging.getLogger("fastpar")


@dataclass
class Kept:
    """Of one stream: how many calls there were, and what the last of them has kept."""

    calls: int = 0
    values: Sequence[torch.Tensor] | None = None
    came: Sequence[torch.Tensor] = ()
    outputs: Sequence[Any] = ()


class _Run:
    """What a sampling run carries for one compiled graph."""

    def __init__(self) -> None:
        self.streams = Streams()
        self.calls = self.place = 0
        self.sample: weakref.ref[torch.Tensor] | None = None
        self.version: int | None = None
        self.ordered = True

    def place_of(self, sample: torch.Tensor | None, streams: int | None) -> int:
        """The place of the next call among those of its step that have the same stable inputs."""
        self.calls += 1
        if streams is not None:
            return (self.calls - 1) % streams
        same = self.sample is not None and sample is not None and self.sample() is sample
        same = same and sample is not None and self.version == version(sample)
        self.place = self.place + 1 if same and self.ordered else 0
        if self.place >= STREAMS:  # a sampler that writes its steps into one tensor, which keeps no count of it
            self.place, self.ordered = 0, False
        if sample is not None:
            self.sample, self.version = weakref.ref(sample), version(sample)
        return self.place


class Displaced:
    """Runs ``first`` until there is something to carry on, then ``steady``.

    ``program`` is the captured one, ``specs`` are what ``steady`` takes after its inputs, ``varying`` names inputs that
    change from step to step.
    """

    def __init__(
        self, first: Runner, steady: Runner, program: Program, specs: Sequence[StateSpec], warmup: int,
        varying: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.first, self.steady, self.specs, self.warmup = first, steady, specs, max(1, warmup)
        self.results = len(program.outputs)
        self.names = tuple(i.name for i in program.inputs)
        varying = guess(program) if varying is None else varying
        users = [i for i, (given, node) in enumerate(zip(program.inputs, program.placeholders, strict=True))
                 if given.kind == "user" and isinstance(node.meta.get("val"), torch.Tensor)]  # fmt: skip
        self.stable = tuple(i for i in users if self.names[i] not in varying)
        sizes = {i: program.placeholders[i].meta["val"].numel() for i in users if i not in self.stable}
        self.sample = max(sizes, key=lambda i: sizes[i]) if sizes else None
        self.told = False

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        generation = current_generation()
        if generation is OUTSIDE:
            if not self.told:
                self.told = True
                log.warning(
                    "a displaced plan carries nothing from call to call outside of fastpar.generation(), or of a "
                    "pipeline that fastpar.parallelize() was given: every call waits for its exchanges"
                )
            return self.first(args)[: self.results]
        kept = self._kept(generation, args)
        values, kept.values = kept.values, None  # nothing is carried over a call that fails
        outputs = self._turn(generation, kept, values, args)
        kept.calls += 1
        return outputs

    def _turn(
        self, generation: Generation, kept: Kept, values: Sequence[torch.Tensor] | None, args: list[Any]
    ) -> Sequence[Any]:
        steady = values is not None and kept.calls >= self.warmup
        outputs = self.steady([*args, *values]) if steady else self.first(args)  # type: ignore[misc]
        came = outputs[self.results :]
        kept.values = values if steady and not came else [
            as_promised(value, spec) for value, spec in zip(came, self.specs, strict=True)
        ]  # fmt: skip
        return outputs[: self.results]

    def _kept(self, generation: Generation, args: list[Any]) -> Kept:
        run = generation.kept(self, _Run)
        inputs = [args[i] for i in self.stable]
        place = run.place_of(None if self.sample is None else args[self.sample], generation.calls_per_step)
        stream = run.streams.find(inputs)
        if stream is not None and stream.values is not None:
            run.streams.came()
        else:
            restless = run.streams.missed(run.streams.unknown(inputs))
            if restless:
                names = [self.names[self.stable[i]] for i in sorted(restless)]
                log.info("%s differ from call to call; calls are told apart without them", ", ".join(names))
                self.stable = tuple(s for i, s in enumerate(self.stable) if i not in restless)
                run.streams = Streams()
                inputs = [args[i] for i in self.stable]
            stream = Stream(inputs, {}, None)
            run.streams.add(stream, inputs)
        kept: Kept = stream.values.setdefault(place, Kept())
        return kept


def specs_of(first: Program, steady: Program) -> tuple[StateSpec, ...]:
    """What the localised program ``steady`` is given of what ``first`` keeps, which is noted at its inputs."""
    nodes = [n for n, i in zip(steady.placeholders, steady.inputs, strict=True) if i.kind == "carried"]
    values = [n.meta["val"] if n.meta.get("came") else value  # first has what was sent in its place
              for n, value in zip(nodes, fake_outputs(first)[len(first.results) :], strict=True)]  # fmt: skip
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    return tuple(StateSpec(n.name, tuple(v.shape), v.stride(), v.dtype) for n, v in zip(nodes, values, strict=True))


def as_promised(value: torch.Tensor, spec: StateSpec) -> torch.Tensor:
    """In the memory order that was compiled for; what collectives give late is waited for."""
    if value.stride() == spec.stride or value.numel() == 0:
        return value
    own = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=value.device)
    return own.copy_(value)
