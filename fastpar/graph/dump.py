"""Dumps: one runnable file per pass, numbered, in a folder per rank and graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpar.graph.pipeline import Callback
from fastpar.graph.program import Program


def text(program: Program) -> str:
    """The program as Python: one line per node with its layout, source lines above."""
    names = {}
    lines = [f"# {program.name}: {program.stage}, {program.num_nodes} nodes, mesh {program.mesh}"]
    for node in program.graph.nodes:
        names[node] = node.name
        layout = node.meta.get("layout")
        note = f"  # {layout}" if layout is not None else _shape(node.meta.get("val"))
        lines.append(f"{node.format_node()}{note}")
    return "\n".join(lines) + "\n"


def code(program: Program) -> str:
    """The program as a runnable ``forward``."""
    program.gm.recompile()
    return program.gm.print_readable(print_output=False)


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"  # {list(shape)}" if shape is not None else ""


def dumper(folder: Path) -> Callback:
    """A callback that writes ``NN.<pass>.py`` (runnable) and ``NN.<pass>.txt`` (with layouts) after every pass."""
    state = {"count": 0}

    def call(previous: Any, program: Program, next: Any, seconds: float, /) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = previous.name if previous is not None else program.stage
        stem = folder / f"{state['count']:02d}.{name}"
        stem.with_suffix(stem.suffix + ".txt").write_text(text(program))
        stem.with_suffix(stem.suffix + ".py").write_text(code(program))
        state["count"] += 1

    return call
