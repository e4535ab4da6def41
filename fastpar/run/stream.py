"""Generations and streams: which run of a sampler a call belongs to, and which call of a step it is.

A *generation* is one sampling run, a *stream* one of the calls of a model within a step (with the prompt, without
it, ...). What outlives a call is kept per generation and stream, and goes with them.

Which generation a call belongs to, the user says (``generation()``); outside of that all calls are one. Which stream
it is, its own arguments say: a prompt is the same tensor in every step, and another one in another stream. So it
does not matter how many calls a step has, whether two models take turns, whether a run was aborted in the middle of a
step, or whether two runs are interleaved.

Where guidance runs as separate calls, ``cfg=2`` deals them: call k is run by
half k mod 2 only, and its result travels to the other half while that one runs its own call; it is waited
for on first use (DistriFusion, section 4.3, and xDiT's CFG parallelism split guidance; both need a pipeline
that passes both branches at once, here it stays as it is). Calls are counted per generation and per frame that
Dynamo compiles, over all shapes: two prompts of different length are two programs, and still two calls of one model.

Every decision here follows from what all ranks have in common: the order of calls, which tensor objects come again,
how often they were written to. Where an allocator has put a tensor is not among these: that is each rank's own
affair, and ranks that decided differently would wait for each other forever.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar, Token
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch._guards import CompileContext
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils import _pytree as pytree

from fastpar.core.errors import FastparError, OptionError
from fastpar.graph.program import Program
from fastpar.run.artefact import Runner

T = TypeVar("T")
_C10D = torch.ops._c10d_functional

STREAMS = 4
"""Streams that one generation keeps for one graph; the one that was not used for longest makes room."""
PATIENCE = 2 * STREAMS
"""An input that was another one in so many calls in a row, none of which could use what was kept, varies."""


class Gathers(Protocol):
    """Puts together of all ranks what each has of its own (``fastpar.run.strided``)."""

    def gather(self, latents: torch.Tensor) -> torch.Tensor: ...


class Generation:
    """One sampling run. A context: calls inside belong to it. It may be entered again, so runs can take turns.

    ``calls_per_step``: of a model, where the user has said it.
    """

    def __init__(self, calls_per_step: int | None = None) -> None:
        self.calls_per_step = calls_per_step
        self.calls: dict[Any, int] = defaultdict(int)  # per frame that Dynamo compiles
        self._kept: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._entered: list[Token[Generation]] = []
        self._rows: Gathers | None = None  # of latents, where each rank steps its own
        self._due = self._apart = False  # whether all ranks have come to the same step, and have other latents
        self.alone = False  # whether this call is one that other ranks do not run

    def kept(self, owner: object, make: Callable[[], T]) -> T:
        """What is kept here for one compiled graph, at first what ``make`` gives; it goes when either goes."""
        if owner not in self._kept:
            self._kept[owner] = make()
        found: T = self._kept[owner]
        return found

    def gather(self, latents: T, now: bool = False) -> T:
        """The latents that a step has led to (a tensor, or several), as all ranks are to have them.

        Under a plan with ``steps`` each rank steps its own rows. At the end of every cycle, when all have come to the
        same step, they are put together here; ``now`` does it at any step, and is needed after the last one. Otherwise,
        and under any other plan, ``latents`` are returned as they are. Call it on every rank, after every step::

            for i, t in enumerate(times):
                latents = run.gather(step(model(latents, t, prompt), latents), now=i == len(times) - 1)

        Raises PlanError for latents that have not the rows of the model's output.
        """
        if self._rows is None or not (now or self._due):
            return latents
        self._apart = False
        found: T = pytree.tree_map_only(torch.Tensor, self._rows.gather, latents)
        return found

    def stepped(self, rows: Gathers, due: bool) -> None:
        """Ranks have gone other steps. ``due``: a cycle ends here, which is when their latents are put together."""
        self._rows, self._due, self._apart = rows, due, True

    def __enter__(self) -> Generation:
        self._entered.append(_current.set(self))
        return self

    def __exit__(self, kind: Any = None, *error: object) -> None:
        _current.reset(self._entered.pop())
        if kind is None and self._apart and not self._entered:
            raise FastparError(
                "the sampling run ended with other latents on every rank: under a plan with 'steps', call "
                "gather(latents, now=True) of the generation after the last step, or give the pipeline to "
                "fastpar.parallelize()"
            )


OUTSIDE = Generation()
"""The calls outside of any generation."""
_current: ContextVar[Generation] = ContextVar("generation", default=OUTSIDE)  # noqa: B039  (one for all)


def generation(streams: int | None = None) -> Generation:
    """A context for one run of your own sampling loop, on every rank alike::

        with fastpar.generation():
            for t in times:
                latents = step(model(latents, t, prompt), latents)

    What is computed once per generation is computed anew inside, and its memory is free when the context is. It
    is never needed for right results: without it, calls find by their inputs what they can use. Runs that take
    turns each enter an object of their own, again and again.

    Displaced plans need it, for what they carry from step to step belongs to one run (``fastpar.run.displaced``).
    ``streams`` says how many calls of a model a step has, where that does not show in their inputs. Raises OptionError
    for less than one.
    """
    if streams is not None and (isinstance(streams, bool) or not isinstance(streams, int) or streams < 1):
        raise OptionError(f"generation: streams is how many calls of a model a step has, 1 or more, not {streams!r}")
    return Generation(streams)


def current_generation() -> Generation:
    """The generation that calls of this thread belong to; one for all calls outside of any."""
    return _current.get()


class Stream:
    """The calls that have the same stable inputs, and what is kept for them.

    The inputs are held weakly: when one goes, no call can come with it any more, and ``values`` are let go.
    """

    def __init__(self, inputs: Sequence[torch.Tensor], values: Any, sums: Any) -> None:
        self.values: Any = values  # None once they are let go
        self.sums = sums
        self.inputs = [(_weakly(t, self), version(t)) for t in inputs]

    def differs(self, inputs: Sequence[torch.Tensor]) -> set[int]:
        """Numbers of the inputs that are other tensors than this stream's, or were written to."""
        pairs = zip(self.inputs, inputs, strict=True)
        return {i for i, ((ref, v), t) in enumerate(pairs) if ref() is not t or v != version(t)}

    def outdated(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Whether one of its inputs has been written to since: no call will come with what it was."""
        pairs = zip(self.inputs, inputs, strict=True)
        return any(ref() is t and v != version(t) for (ref, v), t in pairs)

    def let_go(self) -> None:
        self.values = self.sums = None


class Streams:
    """The streams of one graph in one generation."""

    def __init__(self) -> None:
        self.kept: list[Stream] = []  # the one that was used last stands last
        self._new: Counter[int] = Counter()

    def find(self, inputs: Sequence[torch.Tensor]) -> Stream | None:
        """The stream whose stable inputs are these very tensors."""
        for stream in reversed(self.kept):
            if not stream.differs(inputs):
                self.kept.remove(stream)
                self.kept.append(stream)
                return stream
        return None

    def unknown(self, inputs: Sequence[torch.Tensor]) -> set[int]:
        """Numbers of the inputs that no stream has."""
        out = set(range(len(inputs)))
        for stream in self.kept:
            out &= stream.differs(inputs)
        return out

    def came(self) -> None:
        """A call could use what was kept."""
        self._new.clear()

    def missed(self, new: Collection[int]) -> set[int]:
        """A call could not, for its inputs number ``new`` were new. Returns those that have been so too often."""
        self._new = Counter({i: self._new[i] + 1 for i in new})
        return {i for i, times in self._new.items() if times >= PATIENCE}

    def add(self, stream: Stream, inputs: Sequence[torch.Tensor]) -> None:
        """Keep a stream, in the place of one with the same inputs or with older contents of one of them."""
        # One whose inputs are gone still counts: when they go, the garbage collector of each rank decides.
        others = [s for s in self.kept if s.differs(inputs) and not s.outdated(inputs)]
        self.kept = [*others[-STREAMS + 1 :], stream]


def version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to, by its own account; inference tensors keep none."""
    return None if tensor.is_inference() else tensor._version


def _weakly(tensor: torch.Tensor, stream: Stream) -> weakref.ref[torch.Tensor]:
    mine = weakref.ref(stream)

    def gone(_: object) -> None:
        held = mine()
        if held is not None:
            held.let_go()

    return weakref.ref(tensor, gone)


def frame_counter() -> Callable[[], int]:
    """Number of the next call, within its generation, of the frame that is being compiled, equal on all ranks; every
    use counts one."""
    compiling = CompileContext.current_compile_id()
    frame = compiling.frame_id if compiling is not None else None

    def following() -> int:
        calls = current_generation().calls
        calls[frame] += 1
        return calls[frame] - 1

    return following


def ends_frame(gm: torch.fx.GraphModule) -> bool:
    """Whether the user gets this graph's results: false where Python of the model goes on after a graph break."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


class Dealt:
    """Runs every ``degree``-th call, and receives the results of the others.

    ``me`` is this rank's coordinate along the axis, ``group`` the name of the process group along it, in the
    order of coordinates. ``lazy``: results that travel are waited for on first use, else at once.
    """

    def __init__(
        self, run: Runner, program: Program, me: int, degree: int, group: str, following: Callable[[], int], lazy: bool
    ) -> None:
        self.run, self.me, self.degree, self.group = run, me, degree, group
        self.following, self.lazy = following, lazy
        self.outputs = list(program.outputs)
        self.inputs = {node: i for i, node in enumerate(program.placeholders)}
        self.sent: list[Any] = []

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        owner = self.following() % self.degree
        for work in self.sent:  # what this rank sent of its last call has long gone; its copy may go now
            work.wait()
        self.sent = []
        if owner != self.me:
            return [self._received(out, args, owner) for out in self.outputs]
        results = self.run(args)
        for out, result in zip(self.outputs, results, strict=True):
            if self._travels(out):
                # a copy travels: the caller may write into its result while the others still read
                copy = result.detach().clone(memory_format=torch.contiguous_format)
                group = dist.distributed_c10d._resolve_process_group(self.group)
                self.sent.append(dist.broadcast(copy, group=group, group_src=owner, async_op=True))
        return results

    def _travels(self, out: Any) -> bool:
        return isinstance(out, torch.fx.Node) and out not in self.inputs

    def _received(self, out: Any, args: Sequence[Any], owner: int) -> Any:
        if not self._travels(out):
            return args[self.inputs[out]] if isinstance(out, torch.fx.Node) else out
        value = out.meta["val"]
        with torch.no_grad():
            here = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            coming = _C10D.broadcast_(here, owner, self.group)
        return AsyncCollectiveTensor(coming) if self.lazy else _C10D.wait_tensor(coming)

