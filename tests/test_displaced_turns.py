"""Displaced plans: whose turn it is. Which calls of a sampler belong together, and what each of them is given."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import fastpar
from fastpar.core.errors import OptionError
from fastpar.graph.program import Input, Program
from fastpar.run.artefact import StateSpec
from fastpar.run.displaced import Displaced
from fastpar.run.stream import PATIENCE, generation


@dataclass
class Turns:
    """A displaced program that only notes which of its two is run, and what with."""

    varying: tuple[str, ...] = ("x", "t")
    warmup: int = 1
    ran: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = torch.fx.Graph()
        nodes = []
        for name, size in (("w", 9), ("x", 8), ("t", 1), ("prompt", 5)):
            nodes.append(graph.placeholder(name))
            nodes[-1].meta["val"] = torch.empty(size)
        graph.output((nodes[1],))
        kinds = {"w": "parameter"}
        given = tuple(Input(n.name, kinds.get(n.name, "user")) for n in nodes)  # type: ignore[arg-type]
        program = Program(torch.fx.GraphModule(nn.Module(), graph), given)
        specs = [StateSpec("carried_0", (1,), (1,), torch.float32)]
        self.run = Displaced(self._first, self._steady, program, specs, self.warmup, self.varying)
        self.w = torch.zeros(9)

    def _first(self, args: list[Any]) -> list[Any]:
        self.ran.append("first")
        return [args[1], torch.tensor([float(len(self.ran))])]

    def _steady(self, args: list[Any]) -> list[Any]:
        self.ran.append(int(args[4]))  # which call kept what this one is given
        return [args[1], torch.tensor([float(len(self.ran))])]

    def __call__(self, x: torch.Tensor, prompt: torch.Tensor) -> None:
        assert len(self.run([self.w, x, torch.zeros(1), prompt])) == 1


def test_streams_are_told_apart_by_their_prompts() -> None:
    turns, with_prompt, without = Turns(), torch.ones(5), torch.zeros(5)
    with generation():
        for _ in range(3):
            x = torch.randn(8)
            turns(x, with_prompt)
            turns(x.clone(), without)
    assert turns.ran == ["first", "first", 1, 2, 3, 4]


def test_calls_with_the_same_sample_are_of_one_step() -> None:
    """Class labels change nothing that stays the same from step to step."""
    turns = Turns(varying=("x", "t", "prompt"))
    with generation():
        for _ in range(3):
            x = torch.randn(8)
            turns(x, torch.ones(1))
            turns(x, torch.zeros(1))
    assert turns.ran == ["first", "first", 1, 2, 3, 4]


def test_a_sample_that_is_written_to_is_another_step() -> None:
    turns, x = Turns(varying=("x", "t", "prompt")), torch.zeros(8)
    with generation():
        for _ in range(3):
            turns(x, torch.ones(1))
            x.add_(1)
    assert turns.ran == ["first", 1, 2]


def test_a_sample_that_keeps_no_count_of_writes_is_given_up_as_a_sign() -> None:
    with torch.inference_mode():
        turns, x = Turns(varying=("x", "t", "prompt")), torch.zeros(8)
        with generation():
            for _ in range(8):
                turns(x, torch.ones(1))
                x.add_(1)
    assert turns.ran == ["first"] * 4 + [1, 5, 6, 7]


def test_streams_that_the_user_counts() -> None:
    turns = Turns(varying=("x", "t", "prompt"))
    with generation(streams=2):
        for _ in range(3):
            turns(torch.randn(8), torch.ones(1))
            turns(torch.randn(8), torch.zeros(1))
    assert turns.ran == ["first", "first", 1, 2, 3, 4]


def test_nothing_crosses_a_generation() -> None:
    turns, prompt, other = Turns(warmup=2), torch.ones(5), generation()
    for run in (generation(), other, other):
        with run:
            turns(torch.randn(8), prompt)
            turns(torch.randn(8), prompt)
    assert turns.ran == ["first", "first", "first", "first", 4, 5]


def test_outside_of_a_generation_every_call_waits_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns()
    with caplog.at_level(logging.WARNING, "fastpar"):
        for _ in range(3):
            turns(torch.randn(8), torch.ones(5))
    assert turns.ran == ["first"] * 3
    assert [m for m in caplog.messages if "outside of fastpar.generation()" in m] == [caplog.messages[0]]


def test_what_was_kept_goes_with_its_prompt() -> None:
    turns, prompt = Turns(), torch.ones(5)
    with generation() as run:
        turns(torch.randn(8), prompt)
        [stream] = next(iter(run._kept.values())).streams.kept
        assert stream.values
        del prompt
        gc.collect()
        assert stream.values is None


def test_an_input_that_is_new_in_every_call_tells_nothing() -> None:
    turns = Turns()
    with generation():
        for _ in range(PATIENCE + 3):
            turns(torch.randn(8), torch.ones(5))
    assert turns.ran == ["first"] * PATIENCE + [PATIENCE, PATIENCE + 1, PATIENCE + 2]


def test_a_call_that_fails_carries_nothing_on() -> None:
    turns, prompt = Turns(), torch.ones(5)

    def fails(args: list[Any]) -> list[Any]:
        raise RuntimeError("lost")

    with generation():
        turns(torch.randn(8), prompt)
        turns.run.steady, steady = fails, turns.run.steady
        with pytest.raises(RuntimeError, match="lost"):
            turns(torch.randn(8), prompt)
        turns.run.steady = steady
        turns(torch.randn(8), prompt)
        turns(torch.randn(8), prompt)
    assert turns.ran == ["first", "first", 2]


@pytest.mark.parametrize("streams", [0, True, 1.5])
def test_a_step_has_a_call_or_more(streams: Any) -> None:
    with pytest.raises(OptionError, match="1 or more"):
        fastpar.generation(streams=streams)
