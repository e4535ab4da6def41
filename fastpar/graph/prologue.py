"""A program in two: the *prologue*, which the pass ``hoist`` has marked, and the *step*, which takes what it gives.

The runtime runs the first once per generation and stream and the second on every call; reports count them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastpar.core.layout import Layout
from fastpar.graph.program import Input, Program, module_of
from fastpar.graph.roofline import local_shape, node_bytes
from fastpar.ops.collectives import local
from fastpar.rules import is_view


@dataclass(frozen=True)
class Parts:
    """``prologue`` takes the program's inputs number ``reads`` and gives the values that are kept; ``step`` takes all
    the program's inputs, and then those values (kind ``state``), and gives the program's outputs."""

    prologue: Program
    step: Program
    reads: tuple[int, ...]

    @property
    def kept(self) -> list[fx.Node]:
        """The step's placeholders for values of the prologue."""
        return self.step.placeholders[len(self.step.inputs) - len(self.prologue.outputs) :]


def split(program: Program) -> Parts | None:
    """The two parts of a lowered or localised program; None where nothing is marked."""
    marked = {n for n in program.graph.nodes if n.meta.get("hoisted")}
    if not marked:
        return None
    kept = [n for n in program.graph.nodes if n in marked and any(user not in marked for user in n.users)]
    given = program.placeholders
    read = {n for node in marked for n in node.all_input_nodes if n.op == "placeholder"}
    reads = tuple(i for i, n in enumerate(given) if n in read)

    first = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants = {n for node in marked for n in node.all_input_nodes if n.op == "get_attr"}
    for node in program.graph.nodes:
        if node in marked or node in constants or node in read:
            env[node] = first.node_copy(node, lambda n: env[n])
    first.output(tuple(env[n] for n in kept))

    second, env = fx.Graph(), {}
    for node in given:
        env[node] = second.node_copy(node)
    for i, node in enumerate(kept):
        env[node] = second.placeholder(f"kept_{i}")
        env[node].meta = {k: v for k, v in node.meta.items() if k != "hoisted"}
    for node in program.graph.nodes:
        if node not in marked and node not in env:
            env[node] = second.node_copy(node, lambda n: env[n])
    state = tuple(Input(n.name, "state") for n in kept)
    return Parts(
        _part(program, first, tuple(program.inputs[i] for i in reads), "Prologue"),
        _part(program, second, (*program.inputs, *state), "Step"),
        reads,
    )


def parts_read(given: fx.Node, inside: Container[fx.Node], size: Callable[[fx.Node], int]) -> list[fx.Node]:
    """What operators ``inside`` read of an input: the input itself, or views of it that are less than it, where they
    take nothing else (a rank's columns of a weight). ``size`` is a value's bytes."""
    users = [user for user in given.users if user in inside]
    if not users or not all(is_view(user) or user.target is local for user in users):
        return [given]
    parts = list(dict.fromkeys(part for user in users for part in parts_read(user, inside, size)))
    return parts if sum(map(size, parts)) < size(given) else [given]


def checked(prologue: Program) -> dict[fx.Node, list[fx.Node]]:
    """By input, what a prologue reads of it: what a check has to look at."""
    inside = {n for n in prologue.graph.nodes if n.op == "call_function"}
    return {x: parts_read(x, inside, lambda n: max(bytes_on_ranks(prologue, n))) for x in prologue.placeholders}


def apart(prologue: Program) -> bool:
    """Whether ranks check different things: parts of a weight that are not the same on all of them."""
    layouts = (part.meta.get("layout") for several in checked(prologue).values() for part in several)
    return any(isinstance(layout, Layout) and bool(layout.split_axes) for layout in layouts)


def bytes_on_ranks(program: Program, node: fx.Node) -> list[int]:
    """Bytes that every rank has of a value."""
    return [node_bytes(node, local_shape(node, program.mesh, rank)) for rank in range(program.mesh.ranks)]


def _part(program: Program, graph: fx.Graph, inputs: tuple[Input, ...], name: str) -> Program:
    gm = module_of(program.gm, graph, name)
    carries = program.carries if name == "Step" else 0
    return replace(program, gm=gm, inputs=inputs, name=name.lower(), notes=list(program.notes), carries=carries)


def local_values(parts: Parts) -> None:
    """Give the step of a localised program the shapes and strides that this rank's values of the prologue have.

    (``meta["val"]`` is global, also in the program of one rank.)
    """
    given = [n.meta.get("val") for n in parts.step.placeholders]
    mode = next((v.fake_mode for v in given if isinstance(v, FakeTensor)), None)
    for node, value in zip(parts.kept, fake_outputs(parts.prologue, mode), strict=True):
        node.meta["val"] = value


def fake_outputs(program: Program, mode: FakeTensorMode | None = None) -> tuple[Any, ...]:
    """What a localised program gives, as fake tensors (of ``mode``, by default that of its inputs): the shapes and
    strides that this rank will have."""
    values = [n.meta["val"] for n in program.placeholders]
    mode = mode or next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    with mode, torch.no_grad():
        return tuple(_Fake(program.gm, mode).run(*values))


class _Fake(fx.Interpreter):
    """Runs a graph on fake tensors; its constants are real."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        super().__init__(gm)
        self.mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
