"""What a compiled program was made from and by, as text: ranks compare it, and code on disk is known by it."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import torch

import fastpar.backends
import fastpar.passes
from fastpar.core.version import VERSION
from fastpar.run.build import Built

PACKAGES = (Path(__file__).parents[1], Path(fastpar.passes.__path__[0]), Path(fastpar.backends.__path__[0]))


def fields(built: Built, lowering: str, transport: str = "two-sided") -> dict[str, str]:
    """What ranks must have in common, most telling first: a mismatch is reported by the first that differs.

    ``lowering`` says how the program is run, captured or not; ``transport`` is the option.
    """
    inputs = ", ".join(
        f"{i.name}: {str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
        for i, n in zip(built.captured.inputs, built.captured.placeholders, strict=True)
        if isinstance(v := n.meta.get("val"), torch.Tensor)
    )
    return {
        "versions": f"fastpar {VERSION} ({source_hash()[:12]}), torch {torch.__version__}",
        "plan": str(built.plan),
        "pipeline": str(built.pipeline),
        "mesh": str(built.mesh),
        "lowering": lowering,
        "transport": transport,
        "inputs": inputs,
        "graph": built.captured.hash(),
        "program": built.lowered.hash(),
    }


def origin(given: dict[str, str], built: Built) -> str:
    """One digest of ``fields`` and of the topology that the plan was placed on."""
    box = "" if built.choice is None else repr(built.choice.topology)
    return hashlib.sha256(json.dumps([given, box]).encode()).hexdigest()


@functools.cache
def source_hash() -> str:
    """Hash of this package's source: what one state of it compiled, another does not take for its own."""
    digest = hashlib.sha256()
    for root in PACKAGES:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{root.name}/{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
