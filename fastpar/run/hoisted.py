"""Running a program whose prologue was hoisted: once per generation and stream, and whenever what it reads changed.

A call that comes with the very tensors of an earlier one (``fastpar.run.stream``) could use what was kept then. But
``dist.broadcast`` into a tensor, a write through ``.data`` and a LoRA that is merged into a weight leave no trace on
the tensor, and a buffer that another graph writes its results to is the same tensor in every step. So every call
also takes checksums, on the device, of all that the prologue reads, weights too, and they are compared with those of
the call that ran it::

    check      launched first
    step       launched behind it, with the kept values: the device does not wait for the answer
               the answer of the check is read; it came long before the step ends
    prologue, step      again, and only where the answer is no: their results are returned

The check reads what the prologue would have read, and never more. Results are right in every case; what a change
costs is time. An input that keeps changing becomes a varying one, and the program is split anew.

All ranks are called with the same inputs and hold the same weights, so all come to the same answers and run the same
collectives in the same order. Of a weight of which each rank reads a part, it checks that part. Then ranks may see
different changes, so they agree (an all-reduce of a few bytes, behind which nothing waits but the answer): what one of
them has to do again, all do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from fastpar.core.errors import FastparError
from fastpar.graph.program import Program, draws
from fastpar.graph.prologue import Parts, apart, checked, local_values, split
from fastpar.ops.checksum import checksums
from fastpar.run.artefact import Artefact, Runner, StateSpec
from fastpar.run.stream import Stream, Streams, current_generation

_C10D = torch.ops._c10d_functional
Compile = Callable[[Program], Runner]
Again = Callable[[Collection[str]], Program]


def artefact_of(local: Program, compile: Compile, again: Again, group: str | None = None) -> Artefact:
    """The artefact of one rank's program: with a prologue where one is marked.

    ``compile`` is a lowering. ``again(names)`` gives this rank's program hoisted anew, with the inputs of these
    names among the varying ones. ``group``: the process group of all ranks that run it together, if there are others.
    """
    parts = split(local)
    if parts is None:
        return Artefact({"step": compile(replace(local, name="step"))})
    artefact = Artefact({}, (), _Hoisted(compile, again, group))
    artefact.select.prepare(artefact, parts)  # type: ignore[attr-defined]
    return artefact


class _Hoisted:
    """Selects the programs of a call; the calls' streams are kept under this object in their generation."""

    def __init__(self, compile: Compile, again: Again, group: str | None) -> None:
        self.compile, self.again, self.group = compile, again, group
        self.reads: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()
        self.sums_of: list[int] = []  # of which input each checksum is
        self.agreeing: str | None = None  # the group, where ranks check different things
        self.random = False

    def prepare(self, artefact: Artefact, parts: Parts) -> None:
        local_values(parts)
        self.reads = parts.reads
        self.names = tuple(i.name for i in parts.prologue.inputs)
        # A step that draws random numbers cannot be tried: it would draw twice.
        self.random = any(map(draws, parts.step.graph.nodes))
        kept = [(n.name, n.meta["val"]) for n in parts.kept]
        artefact.state = tuple(StateSpec(name, tuple(v.shape), v.stride(), v.dtype) for name, v in kept)
        programs = {"prologue": parts.prologue, "step": parts.step}
        if self.reads:
            programs["check"], self.sums_of = _check(parts.prologue)
            self.agreeing = self.group if apart(parts.prologue) else None
        artefact.programs = {name: self.compile(program) for name, program in programs.items()}

    def __call__(self, artefact: Artefact, args: list[Any]) -> Sequence[Any]:
        step, inputs = artefact.programs["step"], [args[i] for i in self.reads]
        generation = current_generation()
        streams = generation.kept(self, Streams)
        # in a step that other ranks do not run nothing is compared: ranks could not agree on what to do again
        sums = artefact.programs["check"](list(inputs))[0] if inputs and not generation.alone else None
        stream = streams.find(inputs)
        if stream is not None and stream.values is not None:
            answer = _Answer(sums, stream.sums, self.sums_of, self.agreeing)
            outputs = None if self.random and answer.changed() else step([*args, *stream.values])
            new = answer.changed()
            if outputs is not None and not new:
                streams.came()
                return outputs
        elif generation.alone:
            raise FastparError("what is computed once per sampling run is gone in the middle of it; begin another with "
                               "fastpar.generation()")  # fmt: skip
        else:
            new = streams.unknown(inputs)
        values = self._kept(artefact, inputs)
        streams.add(Stream(inputs, values, sums), inputs)
        outputs = step([*args, *values])
        restless = streams.missed(new)
        if restless:
            self._split_anew(artefact, {self.names[i] for i in restless})
        return outputs

    def _kept(self, artefact: Artefact, inputs: list[Any]) -> list[torch.Tensor]:
        """The prologue's values, as the step was promised them, and in memory of their own."""
        given = {t.untyped_storage().data_ptr() for t in inputs}
        values = []
        for value, spec in zip(artefact.programs["prologue"](list(inputs)), artefact.state, strict=True):
            if value.stride() != spec.stride or value.untyped_storage().data_ptr() in given:
                own = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=value.device)
                value = own.copy_(value)
            values.append(value)
        return values

    def _split_anew(self, artefact: Artefact, names: set[str]) -> None:
        local = self.again(names)
        parts = split(local)
        if parts is not None:
            # a new object: what was kept is of no use to it
            following = _Hoisted(self.compile, self._also(names), self.group)
            following.prepare(artefact, parts)
            artefact.select = following
        else:
            artefact.programs, artefact.state = {"step": self.compile(replace(local, name="step"))}, ()
            artefact.select = Artefact({}).select

    def _also(self, before: set[str]) -> Again:
        again = self.again
        return lambda names: again({*before, *names})


class _Answer:
    """Which inputs' checksums differ, on any rank of ``group``: on its way while other work is launched."""

    def __init__(
        self, now: torch.Tensor | None, then: torch.Tensor | None, sums_of: Sequence[int], group: str | None
    ) -> None:
        self.sums_of, self.group = sums_of, group
        self.done: Any = None
        self.differ: torch.Tensor | None = None
        self.found: set[int] | None = None
        if now is None or then is None:
            return
        self.differ = now != then
        if group is not None:  # ranks may take several sums of one input, and not equally many
            found = torch.zeros(1 + max(sums_of), dtype=torch.int32, device=now.device)
            self.differ = found.index_add_(0, torch.tensor(sums_of, device=now.device), self.differ.to(torch.int32))
        if self.differ.device.type == "cuda":
            self._to_host()
        elif group is not None:
            self.differ = _C10D.all_reduce(self.differ, "max", group)

    def _to_host(self) -> None:
        assert self.differ is not None
        device, differ = self.differ.device, self.differ
        current = torch.cuda.current_stream(device)
        stream = current if self.group is None else _aside(device)  # the step does not wait for what others find
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            differ.record_stream(stream)
            if self.group is not None:
                differ = _C10D.wait_tensor(_C10D.all_reduce(differ, "max", self.group))
            host = torch.empty(differ.shape, dtype=differ.dtype, pin_memory=True)
            self.differ = host.copy_(differ, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record(stream)

    def changed(self) -> set[int]:
        """Numbers of inputs whose checksums differ. Waits for the check only, not for what was launched after it."""
        if self.differ is not None and self.found is None:
            if self.done is not None:
                self.done.synchronize()
            elif self.group is not None:
                self.differ = _C10D.wait_tensor(self.differ)
            found = self.differ.nonzero().flatten().tolist()
            self.found = set(found) if self.group is not None else {self.sums_of[i] for i in found}
        return self.found or set()


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """A stream for answers, beside the one that computes."""
    return torch.cuda.Stream(device)


def _check(prologue: Program) -> tuple[Program, list[int]]:
    """From the prologue's inputs to checksums of what it reads of them, int64 ``[sums]``; of which input each is."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()

    def copied(node: fx.Node) -> fx.Node:
        if node not in env:
            for below in node.all_input_nodes:
                copied(below)
            env[node] = graph.node_copy(node, lambda n: env[n])
        return env[node]

    for node in prologue.placeholders:  # all of them, in order
        copied(node)
    read = [(i, part) for i, several in enumerate(checked(prologue).values()) for part in several]
    given = [copied(part) for _, part in read]
    out = graph.call_function(checksums, (given,))
    out.meta["val"] = checksums([node.meta["val"] for node in given])
    graph.output((out,))
    gm = fx.GraphModule(torch.nn.Module(), graph, "Check")
    return replace(prologue, gm=gm, name="check", notes=[]), [i for i, _ in read]
