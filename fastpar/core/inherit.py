"""What of the model a node stands for, kept through the passes.

A node that a pass makes inherits it from the node that it serves, so that reports can name the line and profiles the
module that asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_THE_MODEL = ("stack_trace", "module")
"""Keys of a node's ``meta``: the lines of the model that it comes from (as Dynamo writes them), and the path of the
module whose ``forward`` that was (``blocks.3.attn.to_q``; empty for the model itself)."""


def inherited(meta: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """What a node made for the one with this ``meta`` takes over; ``more`` are further keys."""
    return {key: meta[key] for key in (*OF_THE_MODEL, *more) if key in meta}
