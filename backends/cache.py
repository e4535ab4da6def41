"""Compiled code on disk: what Inductor keeps between runs, made to hold for pinned programs and for nothing else.

Inductor's own cache knows a graph by its operators, sizes and settings. Two things are added here. It does not keep
graphs with operators of higher order unless they are said to be safe; the edges of ``pin`` are, but they are in the
step of every plan for several ranks, which would be compiled anew in every run. And its key does not see what our own
operators do, so the key is joined by a digest of what the program was made from: model graph, plan, pipeline,
topology and versions (``Program.origin``), and the traced graph with the bodies of all its operators.

Ranks have to choose the same kernels, or values that all of them compute would differ in their last bits. So with
several ranks nothing is chosen by a benchmark whose result changes numbers (Inductor's deterministic mode): every
rank then comes to the same choice from the same sizes, without a word between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.fx_passes.control_dependencies import control_deps

from fastpar.core.version import source_hash
from fastpar.graph.program import Program


def key(program: Program, traced: fx.GraphModule) -> str:
    """What compiled code of this program is known by, beside what Inductor itself looks at."""
    digest = hashlib.sha256(f"{source_hash()} {program.origin} ".encode())
    digest.update(Program(traced, ()).hash().encode())
    return digest.hexdigest()


@contextmanager
def kept(program: Program, traced: fx.GraphModule) -> Iterator[None]:
    """What is compiled inside is found again by a later process, and is the same on all ranks."""
    safe = {**config.unsafe_marked_cacheable_functions, _name(control_deps): key(program, traced)}
    patches: dict[str, object] = {"unsafe_marked_cacheable_functions": safe}
    if program.mesh is not None and program.mesh.ranks > 1 and hasattr(config, "deterministic"):
        patches["deterministic"] = True
    with config.patch(patches):
        yield


def _name(operator: torch._ops.HigherOrderOperator) -> str:
    return f"{operator.__module__}.{operator.__name__}"
