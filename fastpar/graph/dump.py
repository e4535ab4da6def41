"""Dumps: one runnable file per pass, numbered, in a folder per rank and graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx

from fastpar.graph.pipeline import Callback
from fastpar.graph.program import Program, source_line, target_name


def text(program: Program) -> str:
    """The program for reading: a line per node with dtype and layout, below the model's line it comes from."""
    lines = [f"# {program.name}: {program.stage}, {program.num_nodes} nodes, mesh {program.mesh or 'none yet'}"]
    inputs = iter(program.inputs)
    last = ""
    for node in program.graph.nodes:
        source = source_line(node)
        if source and source != last:
            lines.append(f"\n# {source}")
            last = source
        value = _value(node)
        if node.op == "placeholder":
            given = next(inputs)
            lines.append(f"{node.name} = input({given.name!r})  # {given.kind}: {value}")
        elif node.op == "output":
            lines.append(f"\nreturn {_text(node.args[0])}")
        else:
            kind = "self." if node.op == "get_attr" else ""
            call = "" if node.op == "get_attr" else f"({_arguments(node)})"
            lines.append(f"{node.name} = {kind}{target_name(node.target)}{call}  # {value}")
    return "\n".join(lines) + "\n"


def code(program: Program) -> str:
    """The program as a runnable ``forward``."""
    program.gm.recompile()
    return program.gm.print_readable(print_output=False)


def _arguments(node: fx.Node) -> str:
    return ", ".join([*map(_text, node.args), *(f"{key}={_text(value)}" for key, value in node.kwargs.items())])


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    return repr(value)  # a node's is its name


def _value(node: fx.Node) -> str:
    """dtype and layout (the shape, while there is none) of what a node gives."""
    value, layout = node.meta.get("val"), node.meta.get("layout")
    if isinstance(value, torch.Tensor):
        said = layout if layout is not None else list(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')} {said}"
    if isinstance(value, list | tuple):
        return " and ".join(map(str, layout)) if layout is not None else f"{len(value)} values"
    return type(value).__name__


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
