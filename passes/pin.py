"""``pin``: the order is final, and lowerings keep it.

Inductor orders operators anew: left alone it moves a collective to just before its wait, and what ``overlap`` hid is
exposed again. After this pass it is told to keep collectives, waits, and products and attentions that run while an
exchange is under way, in the order that they have (``fastpar.backends.pinned``). Without it only collectives and waits
keep theirs, which all ranks must share. What runs one operator after the other keeps the order anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program


@dataclass(frozen=True)
class Pin(Pass):
    """Marks the program's order as the one to keep."""

    name: ClassVar[str] = "pin"
    stage_in: ClassVar[str] = "scheduled"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        program.gm.meta["pinned"] = True
        return program
