"""What a compiled program was made from and by, as text: ranks compare it, and code on disk is known by it."""

from __future__ import annotations

import hashlib
import json

import torch

from fastpar.core.version import VERSION, source_hash
from fastpar.run.build import Built


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
        "program": " ".join(b.lowered.hash() for b in (built, built.first) if b is not None),
    }


def origin(given: dict[str, str], built: Built) -> str:
    """One digest of ``fields`` and of the topology that the plan was placed on."""
    box = "" if built.choice is None else repr(built.choice.topology)
    return hashlib.sha256(json.dumps([given, box]).encode()).hexdigest()
