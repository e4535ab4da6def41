"""One program of an artefact, captured on its second call and replayed from then on.

The whole program is one CUDA graph, its collectives included: a step is a single launch (FastUSP, section 3, finds
that launches and not bytes bound fast machines). What a call does::

    first call     runs as it is, on the stream that will capture: communicators, workspaces and kernels come to be
    second call    is captured, which executes nothing, and replayed
    later calls    copy what the user passes, replay, and copy the results out

**A call executes the program exactly once on each of these roads**, so ranks may be on different ones (one of them
captures again because an allocator gave a weight another address) and still start the same collectives in the same
order.

**Inputs.** Parameters, buffers and state are read where they are: nothing is copied, and where one of them has moved,
the program is captured again. One that keeps moving is copied from then on, like what the user passes, into memory
that belongs to the graph; state only when it is another tensor than the time before. **Results** are copied out of the
graph's memory, so the caller may keep them, and so all captured programs of a device can share one pool: what one
leaves there, nobody reads after the next begins. Shapes are fixed per program: another shape is another program.

Where a program cannot be captured, the reason is logged once and it runs as it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from fastpar.backends import ranges
from fastpar.graph.program import Input, Program

log = logging.getLogger("fastpar")

MOVES = 3
"""An input that has moved so often is copied instead."""

Runner = Callable[[list[Any]], Sequence[Any]]


class Device(Protocol):
    """What capturing needs of a GPU; ``fastpar.backends.cudagraph.cuda`` is the one, tests have another."""

    def aside(self, run: Callable[[], Sequence[Any]], reads: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Run on the stream that captures, ordered as if it were the current one."""
        ...

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        """(replay, the results whose memory each replay fills). Executes nothing."""
        ...

    def launched(self, what: str) -> None:
        """Called behind every replay of a program that communicates: it has to end some day."""
        ...


class Captured:
    """Runs a program by CUDA graphs. ``run`` is what its lowering made of it, ``moved`` its inputs that come from the
    CPU and are read on the device ``home`` (``obstacles.scalars_on``); ``talks``: whether it has collectives."""

    def __init__(
        self,
        program: Program,
        run: Runner,
        device: Device,
        home: torch.device,
        moved: Sequence[int] = (),
        talks: bool = False,
    ) -> None:
        self.run, self.device, self.home, self.talks, self.name = run, device, home, talks, program.name
        self.inputs: Sequence[Input] = program.inputs
        self.passed = {i: k for k, i in _passed_through(program)}  # result's number -> the input's that it is
        self.moved = frozenset(moved)
        # a size that was specialised is still passed, as a number that nothing reads
        self.tensors = [i for i, n in enumerate(program.placeholders) if isinstance(n.meta["val"], torch.Tensor)]
        self.copied = {i for i in self.tensors if self.inputs[i].kind in ("user", "carried") or i in self.moved}
        self.moves = [0] * len(self.inputs)
        self.warm = self.refused = False
        self.forget()
        _alive.add(self)

    def forget(self) -> None:
        """Let the graph and its memory go; the next call captures again."""
        self.replay: Callable[[], None] | None = None
        self.results: Sequence[Any] = ()
        self.own: dict[int, torch.Tensor] = {}
        self.seen: dict[int, weakref.ref[torch.Tensor]] = {}
        self.where: dict[int, int] = {}

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self.refused:
            return self.run(self._on_device(args))
        if not self.warm:
            self.warm = True
            given = self._on_device(args)
            return self.device.aside(lambda: self.run(given), [given[i] for i in self.tensors])
        if self.replay is not None and self._moved_since(args):
            self.forget()
        if self.replay is None and not self._capture(args):
            return self.run(self._on_device(args))
        self._fill(args)
        assert self.replay is not None
        with ranges.program(f"{self.name}, replayed") if ranges.running() else nullcontext():
            self.replay()
        results = [self._out(i, result, args) for i, result in enumerate(self.results)]
        if self.talks:
            self.device.launched(self.name)
        return results

    def _capture(self, args: list[Any]) -> bool:
        for i in self.copied:
            self.own[i] = torch.empty_strided(args[i].shape, args[i].stride(), dtype=args[i].dtype, device=self.home)
        static = [self.own.get(i, a) for i, a in enumerate(args)]
        self.where = {i: args[i].data_ptr() for i in self.tensors if i not in self.copied}
        try:
            self.replay, self.results = self.device.capture(lambda: self.run(list(static)))
        except Exception as error:  # whatever a library raises where it cannot be captured
            self.forget()
            self.refused = True
            log.warning("%r is not captured as a CUDA graph: %s", self.name, str(error).strip().split("\n")[0])
            return False
        return True

    def _moved_since(self, args: list[Any]) -> bool:
        moved = [i for i, address in self.where.items() if args[i].data_ptr() != address]
        for i in moved:
            self.moves[i] += 1
            if self.moves[i] >= MOVES:
                log.info("%r: input %r moves; it is copied for every call", self.name, self.inputs[i].name)
                self.copied.add(i)
        return bool(moved)

    def _fill(self, args: list[Any]) -> None:
        for i, own in self.own.items():
            if self.inputs[i].kind == "state":  # nobody writes to what a prologue has left
                if i in self.seen and self.seen[i]() is args[i]:
                    continue
                self.seen[i] = weakref.ref(args[i])
            _once(own).copy_(_once(args[i]))

    def _out(self, i: int, result: Any, args: list[Any]) -> Any:
        if i in self.passed:
            return args[self.passed[i]]
        return result.clone() if isinstance(result, torch.Tensor) else result

    def _on_device(self, args: list[Any]) -> list[Any]:
        return [a.to(self.home) if i in self.moved else a for i, a in enumerate(args)] if self.moved else args


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """Every element once: of a dimension that was expanded, its first row."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor[index] if index else tensor


def _passed_through(program: Program) -> list[tuple[int, int]]:
    numbers = {node: i for i, node in enumerate(program.placeholders)}
    return [(numbers[out], k) for k, out in enumerate(program.outputs)
            if isinstance(out, torch.fx.Node) and out in numbers]  # fmt: skip


_alive: weakref.WeakSet[Captured] = weakref.WeakSet()


def release(talking: bool = False) -> int:
    """Let all captured graphs go, or those that hold communicators only; returns how many there were.

    A process group cannot end while a graph holds its communicators, so this comes before its end. Whoever calls a
    released program again captures it again.
    """
    gone = [c for c in list(_alive) if c.replay is not None and (c.talks or not talking)]
    for captured in gone:
        captured.forget()
    return len(gone)
