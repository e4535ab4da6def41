"""Names of the model's modules as ranges in a profile, while a profiler runs and at no other time.

A program is run by other code under a profiler: the same operators in the same order, and between them calls of
``enter``, which ends the range before and begins one. Without a profiler the code is what it would be without this
file; the only thing added to a call is one look at torch's flag, the one that Inductor's kernels look at too.

Eager programs get a copy of their graph with the calls in it. Inductor's wrapper, the Python that launches kernels,
gets them at its comments that tell kernels apart (provenance handles, ``config.trace.provenance_tracking_level``).
Inductor keeps with a compiled graph which lines of source each kernel comes from, also on disk; every node of a traced
program is given its number in place of a line, and the numbers are looked up in the program at hand. So nothing is
fused or ordered otherwise, and code that an earlier process compiled has names as well.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import getitem
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import fx
from torch._inductor.codecache import PyCodeCache
from torch.autograd import profiler

from fastpar.backends.pinned import STARTS, WAITS
from fastpar.graph.modules import joint, label
from fastpar.graph.program import copy_module

log = logging.getLogger("fastpar")

Runner = Callable[[list[Any]], Sequence[Any]]
PROVENANCE = 2
"""Inductor's level at which kernels have handles and sources, and nothing is noted of its own passes."""
_NUMBER = "fastpar node "
_HANDLE = re.compile(r"^(?P<indent>\s+)# \[Provenance debug handles\] (?P<kernel>\S+)\s*$")
_ENTER = "_fastpar_enter"

_thread = threading.local()


def enter(name: str | None) -> None:
    """End this thread's range, and begin one called ``name`` unless it is None. Does nothing outside of ``program``."""
    if not getattr(_thread, "depth", 0):
        return
    if _thread.range is not None:
        _thread.range.__exit__(None, None, None)
    _thread.range = None if name is None else torch.profiler.record_function(name).__enter__()


@contextmanager
def program(name: str) -> Iterator[None]:
    """A range around a whole program, in which ``enter`` makes others."""
    outer = getattr(_thread, "depth", 0), getattr(_thread, "range", None)
    with torch.profiler.record_function(f"fastpar: {name}"):
        _thread.depth, _thread.range = outer[0] + 1, None
        try:
            yield
        finally:
            enter(None)
            _thread.depth, _thread.range = outer


def running() -> bool:
    """Whether a profiler runs (torch's, or ``emit_nvtx``)."""
    return profiler._is_profiler_enabled


def under_profilers(name: str, run: Runner, ranged: Callable[[], Runner]) -> Runner:
    """``run``, and under a profiler what ``ranged()`` gives, which is made when it is first needed."""
    made: list[Runner] = []

    def call(args: list[Any]) -> Sequence[Any]:
        if not profiler._is_profiler_enabled:
            return run(args)
        if not made:
            made.append(ranged())
        with program(name):
            return made[0](args)

    return call


def marked(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that enters a range wherever the name of a node is another one than that of the node before."""
    gm = copy_module(gm)
    last: str | None = None
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is not getitem and (name := label(node)) != last:
            with gm.graph.inserting_before(node):
                gm.graph.call_function(enter, (name,))
            last = name
    gm.recompile()
    return gm


@dataclass
class Names:
    """What the nodes of a traced program are called in a profile.

    ``nodes``: by number, the name and how much it says of a kernel that was made from several nodes: of those that say
    most (0) all are named. ``exchanges``: by operator, the names of all its calls in order, which is pinned.
    """

    nodes: dict[int, tuple[str, int]] = field(default_factory=dict)
    exchanges: dict[str, list[str]] = field(default_factory=dict)


def numbered(gm: fx.GraphModule) -> tuple[fx.GraphModule, Names]:
    """A copy whose nodes have numbers in place of stack traces, and what their numbers stand for.

    Equal graphs have equal numbers, whatever their modules are called.
    """
    gm, names = copy_module(gm), Names()
    for number, node in enumerate(gm.graph.nodes):
        if node.op == "call_function":
            talks = node.target in STARTS or node.target in WAITS
            # a kernel also counts the exchange that reads what it writes, and views of what it reads
            names.nodes[number] = label(node), 1 if talks else 2 if getattr(node.target, "is_view", False) else 0
            if node.target in STARTS:
                names.exchanges.setdefault(f"torch.ops.{node.target}", []).append(label(node))
            node.meta = {**{k: v for k, v in node.meta.items() if k == "val"}, "stack_trace": f"{_NUMBER}{number}"}
    return gm, names


def wrapper_with_ranges(function: Any, compiled: Any, names: Names, run: Runner) -> Runner:
    """``run``, which calls what Inductor compiled, with ranges around its kernels.

    The body of the wrapper's ``function`` is exchanged for the call, so all that Inductor has put around it stays.
    Where its code is not what is expected, ranges are left out and a warning says so.
    """
    sites = sites_of(compiled, names)
    code = _marked_code(compiled.source_code, sites, function) if function is not None and sites else None
    if function is None or code is None:
        log.warning("profiles show no modules of this program: Inductor's code has no handles of kernels")
        return run
    function.__globals__[_ENTER] = enter
    plain = function.__code__

    def ranged(args: list[Any]) -> Sequence[Any]:
        function.__code__ = code
        try:
            return run(args)
        finally:
            function.__code__ = plain

    return ranged


def sites_of(compiled: Any, names: Names) -> dict[str, str]:
    """Handle of a kernel's call (``triton_poi_fused_add_0:7``) -> the name of its range, in order of the calls."""
    found, calls = {}, dict[str, list[str]]()
    # Inductor notes kernels per process: those of graphs that were compiled before are among them
    here = {m["kernel"] for m in map(_HANDLE.match, compiled.source_code.split("\n")) if m}
    noted = json.loads(getattr(compiled, "inductor_provenance_stack_traces_str", None) or "{}")
    for kernel, sources in noted.items():
        if kernel not in here:
            continue
        numbers = sorted({int(n) for text in sources for n in re.findall(rf"{_NUMBER}(\d+)", text)})
        known = [names.nodes[n] for n in numbers if n in names.nodes]
        if known:
            most = min(rank for _, rank in known)
            found[kernel] = joint([name for name, rank in known if rank == most])
        calls.setdefault(kernel.rpartition(":")[0], []).append(kernel)
    for operator, given in names.exchanges.items():  # Inductor counts the start among what made the wait, only
        if len(given) == len(calls.get(operator, ())):
            found.update(zip(calls[operator], given, strict=True))
    return found


def wrapper_of(compiled: Any) -> Any:
    """The function that launches the kernels of a graph that was just compiled, or None."""
    key = getattr(compiled, "cache_key", None)
    module = next((m for m in reversed(PyCodeCache.modules) if getattr(m, "key", None) == key), None)
    call = getattr(module, "call", None) if isinstance(module, ModuleType) else None
    return getattr(call, "__func__", call)


def _marked_code(source: str, sites: Mapping[str, str], function: Any) -> CodeType | None:
    """The code of ``function`` with a call of ``enter`` at every handle; line numbers stay."""
    lines = source.split("\n")
    for i, line in enumerate(lines):
        if match := _HANDLE.match(line):
            lines[i] = f"{match['indent']}{_ENTER}({sites.get(match['kernel'])!r})"
    wanted = function.__code__
    stack = [compile("\n".join(lines), wanted.co_filename, "exec")]
    while stack:
        code = stack.pop()
        if code.co_qualname == wanted.co_qualname and code.co_firstlineno == wanted.co_firstlineno:
            return code if code.co_freevars == wanted.co_freevars else None
        stack += [const for const in code.co_consts if isinstance(const, CodeType)]
    return None
