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

Nothing is said between ranks: all are called with the same inputs and hold the same weights (or their parts, which
change together), so all come to the same answers, and run the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fastpar.graph.program import Program
from fastpar.graph.prologue import Parts, local_values, split
from fastpar.ops.checksum import checksums
from fastpar.run.artefact import Artefact, Runner, StateSpec
from fastpar.run.stream import Stream, current_generation

Compile = Callable[[Program], Runner]
Again = Callable[[Collection[str]], Program]


def artefact_of(local: Program, compile: Compile, again: Again) -> Artefact:
    """The artefact of one rank's program: with a prologue where one is marked.

    ``compile`` is a lowering. ``again(names)`` gives this rank's program hoisted anew, with the inputs of these
    names among the varying ones.
    """
    parts = split(local)
    if parts is None:
        return Artefact({"step": compile(replace(local, name="step"))})
    artefact = Artefact({}, (), _Hoisted(compile, again))
    artefact.select.prepare(artefact, parts)  # type: ignore[attr-defined]
    return artefact


class _Hoisted:
    """Selects the programs of a call; the calls' streams are kept under this object in their generation."""

    def __init__(self, compile: Compile, again: Again) -> None:
        self.compile, self.again = compile, again
        self.reads: tuple[int, ...] = ()
        self.names: tuple[str, ...] = ()
        self.random = False

    def prepare(self, artefact: Artefact, parts: Parts) -> None:
        local_values(parts)
        self.reads = parts.reads
        self.names = tuple(i.name for i in parts.prologue.inputs)
        # A step that draws random numbers cannot be tried: it would draw twice.
        self.random = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
                          for n in parts.step.graph.nodes)  # fmt: skip
        kept = [(n.name, n.meta["val"]) for n in parts.kept]
        artefact.state = tuple(StateSpec(name, tuple(v.shape), v.stride(), v.dtype) for name, v in kept)
        programs = {"prologue": parts.prologue, "step": parts.step}
        if self.reads:
            programs["check"] = _check(parts.prologue)
        artefact.programs = {name: self.compile(program) for name, program in programs.items()}

    def __call__(self, artefact: Artefact, args: list[Any]) -> Sequence[Any]:
        step, inputs = artefact.programs["step"], [args[i] for i in self.reads]
        streams = current_generation().streams(self)
        sums = artefact.programs["check"](list(inputs))[0] if inputs else None
        stream = streams.find(inputs)
        if stream is not None and stream.values is not None:
            answer = _Answer(sums, stream.sums)
            outputs = None if self.random and answer.changed() else step([*args, *stream.values])
            new = answer.changed()
            if outputs is not None and not new:
                streams.came()
                return outputs
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
            following = _Hoisted(self.compile, self._also(names))  # a new object: what was kept is of no use to it
            following.prepare(artefact, parts)
            artefact.select = following
        else:
            artefact.programs, artefact.state = {"step": self.compile(replace(local, name="step"))}, ()
            artefact.select = Artefact({}).select

    def _also(self, before: set[str]) -> Again:
        again = self.again
        return lambda names: again({*before, *names})


class _Answer:
    """Which checksums differ: on its way from the device, while other work is launched."""

    def __init__(self, now: torch.Tensor | None, then: torch.Tensor | None) -> None:
        self.done: Any = None
        self.differ: torch.Tensor | None = None
        if now is None or then is None:
            return
        self.differ = now != then
        if self.differ.device.type == "cuda":
            host = torch.empty(self.differ.shape, dtype=torch.bool, pin_memory=True)
            self.differ = host.copy_(self.differ, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def changed(self) -> set[int]:
        """Numbers of inputs whose checksums differ. Waits for the check only, not for what was launched after it."""
        if self.done is not None:
            self.done.synchronize()
        return set(self.differ.nonzero().flatten().tolist()) if self.differ is not None else set()


def _check(prologue: Program) -> Program:
    """From the prologue's inputs to their checksums, int64 ``[inputs]``.

    Whole inputs, also of a weight of which a rank uses a part: ranks that look at different parts could come to
    different answers, and one of them would wait in an exchange for ever.
    """
    graph = fx.Graph()
    given = [graph.node_copy(node) for node in prologue.placeholders]
    out = graph.call_function(checksums, (given,))
    out.meta["val"] = checksums([node.meta["val"] for node in given])
    graph.output((out,))
    return replace(prologue, gm=fx.GraphModule(torch.nn.Module(), graph, "Check"), name="check", notes=[])
