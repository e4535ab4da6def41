"""One-sided transport of a compile: whether it is possible, the heaps, and who pays attention to them.

Ranks come to one decision through the process group's store: each says where it is and what it can do, and all judge
the same answers. Where it is not possible, exchanges stay two-sided, and the reason is said.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpar.backends.onesided.heap import Heap
from fastpar.backends.onesided.rewrite import of_all, planned, rewrite, said
from fastpar.core.errors import AgreementError
from fastpar.graph.program import Program
from fastpar.ops import onesided as ops
from fastpar.run.agree import Party, party_of
from fastpar.run.build import Built
from fastpar.run.groups import world

log = logging.getLogger("fastpar")

Compile = Callable[[Program], Callable[[list[Any]], Sequence[Any]]]
DISPLACED = "what a displaced plan keeps of a message outlives the call, and a heap's slot does not"
"""Why such plans are two-sided."""
_OK = "ok"
_PAUSE = 0.002  # seconds between two looks into the store
_names = itertools.count()


class OneSided:
    """Heaps for the programs of one process group and device."""

    def __init__(self, group: str, party: Party, device: torch.device, timeout: float) -> None:
        self.group, self.party, self.device, self.timeout = group, party, device, timeout
        self.rank, self.ranks = world(group)

    def localise(self, built: Built) -> Program:
        """This rank's program with every exchange one-sided; what that takes is added to ``built.notes``."""
        heaps = planned(of_all(built.lowered, built.mesh), f"heap{next(_names)}")
        note = said(heaps)
        built.notes.append(note)
        log.debug("%s", note)
        return rewrite(built.localise(self.rank), self.rank, heaps)

    def compile(self, lowering: Compile) -> Compile:
        """``lowering``, with the heaps that a program uses: made with it, begun by each of its calls, and let go when
        nobody holds the program any more."""

        def compiled(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
            used = {str(n.args[1]) for n in program.graph.nodes if ops.is_onesided(n) and n.target is ops.put}
            if not used:
                return lowering(program)
            specs = program.gm.meta["heaps"]
            return Attended(lowering(program), [self.heap(specs[name]) for name in sorted(used)])

        return compiled

    def heap(self, spec: ops.HeapSpec) -> Heap:
        """All ranks make the same heaps in the same order. Raises AgreementError where one does not come."""
        gather = gathering(self.group, self.party, self.timeout)
        if self.device.type == "cuda":
            from fastpar.backends.onesided.symmetric import Symmetric, allocator

            gather("heap", spec.name)  # rendezvous has no message for ranks that do not come
            return Symmetric(
                spec, self.rank, self.ranks, self.timeout, self.device, allocator(self.device, self.group)
            )
        from fastpar.backends.onesided.shared import Shared

        return Shared(spec, self.rank, self.ranks, self.timeout, gather)


class Attended:
    """A program that uses heaps, and says to them when a call begins and ends."""

    def __init__(self, runner: Callable[[list[Any]], Sequence[Any]], heaps: Sequence[Heap]) -> None:
        self.runner = runner
        self.heaps: list[Heap] = []
        for heap in heaps:
            ops.register(heap.spec.name, heap)
            self.heaps.append(heap)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        for heap in self.heaps:
            heap.begin()
        outputs = self.runner(args)
        for heap in self.heaps:
            heap.end()
        return outputs

    def close(self) -> None:
        """Let go of the heaps; the program cannot be called any more."""
        for heap in self.heaps:
            ops.release(heap.spec.name)
            heap.close()
        self.heaps = []

    def __del__(self) -> None:
        self.close()


def one_sided(group: str | None, device: torch.device, timeout: float) -> tuple[OneSided | None, str]:
    """One-sided transport among the ranks of ``group``, or None and the reason why there is none: the same on all.

    Raises AgreementError where a rank does not come.
    """
    if group is None or world(group)[1] == 1:
        return None, "there is one rank"
    party = party_of(group)
    if party is None:
        return None, "one process stands for all ranks"
    gather = gathering(group, party, timeout)
    places = gather("place", _place(device))
    reason = next((text for text in places if not text.startswith("[")), None)
    if reason is None and len(set(places)) > 1:
        first = next(rank for rank, text in enumerate(places) if text != places[0])
        reason = f"ranks 0 and {first} do not share memory: {places[0]} and {places[first]}"
    if reason is None and device.type == "cuda":
        outcomes = gather("probe", _probe(device, group))
        bad = [rank for rank, text in enumerate(outcomes) if text != _OK]
        reason = f"rank {bad[0]} has no symmetric memory: {outcomes[bad[0]]}" if bad else None
    return (OneSided(group, party, device, timeout), "") if reason is None else (None, reason)


def _place(device: torch.device) -> str:
    if device.type == "cpu":
        from fastpar.backends.onesided.shared import place

        return place()
    if device.type == "cuda":
        from fastpar.backends.onesided.symmetric import place as on_gpu

        return on_gpu(device)
    return f"no transport for tensors on {device.type}"


def _probe(device: torch.device, group: str) -> str:
    """Whether torch gives symmetric memory here: asked for by doing."""
    from fastpar.backends.onesided.symmetric import allocator

    try:
        allocator(device, group)(1024)
    except (RuntimeError, ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return _OK


def gathering(group: str, party: Party, timeout: float) -> Callable[[str, str], list[str]]:
    """``gather(what, mine)``: the texts of all ranks of ``group``, by rank, through the store.

    All ranks make their gatherings in the same order. Raises AgreementError that names the ranks whose text does not
    come within ``timeout`` seconds.
    """
    rank, ranks = world(group)
    number = party.store.add(party.key("onesided", "count", party.rank), 1)

    def gather(what: str, mine: str) -> list[str]:
        keys = [party.key("onesided", number, what, other) for other in range(ranks)]
        party.store.set(keys[rank], f"={mine}")  # never empty, which some stores do not keep
        until = time.monotonic() + timeout
        while not party.store.check(keys):
            if time.monotonic() > until:
                missing = [other for other, key in enumerate(keys) if not party.store.check([key])]
                raise AgreementError(
                    f"rank {rank} waited {timeout:g} s (FASTPAR_TIMEOUT) for ranks {missing} to come to the one-sided "
                    f"transport ({what})"
                )
            time.sleep(_PAUSE)
        return [party.store.get(key).decode()[1:] for key in keys]

    return gather


__all__ = ["Attended", "OneSided", "gathering", "one_sided"]
