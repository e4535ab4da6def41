"""Random programs that look like pieces of diffusion transformers, captured in milliseconds.

A ``Recipe`` is plain data: sizes, a start, and a list of blocks with their options. Hypothesis
draws and shrinks it, its ``repr`` is Python, and ``build`` makes of it a captured ``Program``
with arguments and eager's outputs. So a failure is one line that can be pasted into a test.

The blocks are ordinary torch functions (``tests/blocks.py``, ``blocks_tokens.py``); any sequence of them is valid,
because each takes image tokens ``[B, S, C]`` and text tokens ``[B, T, C]`` and leaves such.
Sizes favour what is hard to cut: primes, one token, fewer tokens than ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fastpar.graph.decompose import TABLE
from fastpar.graph.program import Input, Kind, Program
from fastpar.graph.scores import replace_written
from fastpar.graph.tidy import tidy
from tests.blocks import ENDS, STARTS, Option, State
from tests.blocks_tokens import BLOCKS

Step = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What a program is made of. ``width`` is that of one head; ``seed`` is for the numbers in it."""

    batch: int = 1
    tokens: int = 7
    text: int = 1
    heads: int = 1
    width: int = 4
    start: Step = ("tokens", {})
    steps: tuple[Step, ...] = ()
    end: Step = ("tokens_out", {})
    seed: int = 0


@dataclass
class Case:
    """A captured program, arguments for it, and what eager gives for them."""

    recipe: Recipe | None
    program: Program
    args: list[torch.Tensor]
    expected: tuple[torch.Tensor, ...]


class Maker:
    """Hands tensors to the blocks: makes and keeps them on the first run, gives them again on the second.

    Blocks ask for inputs as they go, so that shapes may depend on what came before; tracing needs
    them all at its start. Hence two runs: an eager one, which is the reference too, and the traced one.
    """

    def __init__(self, seed: int, given: Sequence[torch.Tensor] | None = None) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.inputs: list[Input] = []
        self.tensors: list[torch.Tensor] = list(given or ())
        self._next = iter(given) if given is not None else None

    def _input(self, kind: Kind, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._next is not None:
            return next(self._next)
        self.inputs.append(Input(f"{kind}{len(self.inputs)}", kind))
        self.tensors.append(make())
        return self.tensors[-1]

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def weight(self, *shape: int) -> torch.Tensor:
        """A parameter ``[out, in, ...]``, scaled so that a product keeps the size of values."""
        fan = max(1, math.prod(shape[1:])) if len(shape) > 1 else 4
        return self._input("parameter", lambda: self._normal(shape) / fan**0.5)

    def user(self, *shape: int) -> torch.Tensor:
        """What the caller passes: standard normal."""
        return self._input("user", lambda: self._normal(shape))

    def flags(self, *shape: int, blind: bool = False) -> torch.Tensor:
        """A boolean mask; in the last dimension at least the first is set, unless rows may be ``blind``."""

        def make() -> torch.Tensor:
            value = torch.rand(shape, generator=self.random) < (0.3 if blind else 0.7)
            value[..., :1] |= not blind
            return value

        return self._input("user", make)

    def index(self, shape: Sequence[int], below: int) -> torch.Tensor:
        """Row numbers."""
        return self._input("user", lambda: torch.randint(0, below, tuple(shape), generator=self.random))


def run(recipe: Recipe, maker: Maker) -> tuple[torch.Tensor, ...]:
    """The recipe as torch code; its outputs."""
    state = State(maker, recipe.batch, recipe.tokens, recipe.text, recipe.heads, recipe.width)
    for table, (name, options) in itertools.chain(
        [(STARTS, recipe.start)], ((BLOCKS, step) for step in recipe.steps), [(ENDS, recipe.end)]
    ):
        table[name].apply(state, **options)
    return tuple(state.outputs)


def build(recipe: Recipe) -> Case:
    """Run the recipe eagerly, which makes its inputs, and trace it."""
    maker = Maker(recipe.seed)
    with torch.no_grad():
        run(recipe, maker)
    return traced(lambda *args: run(recipe, Maker(recipe.seed, args)), maker.tensors, maker.inputs, recipe)


def traced(
    function: Callable[..., tuple[torch.Tensor, ...]],
    args: Sequence[torch.Tensor],
    inputs: Sequence[Input] = (),
    recipe: Recipe | None = None,
    table: Mapping[Any, Any] = TABLE,
) -> Case:
    """A function of tensors as a Case: the same operators that ``fastpar.graph.capture`` gives, much faster."""
    with torch.no_grad():
        expected = tuple(function(*args))
        gm = make_fx(function, decomposition_table=dict(table), tracing_mode="fake")(*args)
    tidy(gm)
    inputs = inputs or [Input(f"user{i}", "user") for i in range(len(args))]
    placeholders = gm.graph.find_nodes(op="placeholder")
    replace_written(gm, {n for n, i in zip(placeholders, inputs, strict=True) if i.kind != "user"})
    output = gm.graph.output_node()
    output.args = (tuple(output.args[0]),)
    gm.recompile()
    return Case(recipe, Program(gm, tuple(inputs)), list(args), expected)


# -- the strategy -----------------------------------------------------------------------------

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 23, 30)
TEXTS = (1, 1, 2, 3, 4, 5, 7, 8)


def _options(options: Mapping[str, Option]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in options.items()})


def _step(table: Mapping[str, Any]) -> st.SearchStrategy[Step]:
    names = [name for name, one in table.items() for _ in range(one.weight)]
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), _options(table[name].options)))


def recipes(max_steps: int = 4) -> st.SearchStrategy[Recipe]:
    """Random recipes; they shrink to few blocks, few tokens and options' first values."""
    return st.builds(
        Recipe,
        batch=st.sampled_from((1, 2, 3)),
        tokens=st.sampled_from(TOKENS),
        text=st.sampled_from(TEXTS),
        heads=st.sampled_from((1, 2, 3, 4, 5)),
        width=st.sampled_from((4, 2, 6)),
        start=_step(STARTS),
        steps=st.lists(_step(BLOCKS), min_size=1, max_size=max_steps).map(tuple),
        end=_step(ENDS),
        seed=st.integers(0, 3),
    )
