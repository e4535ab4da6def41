"""What ranks are called with is compared in the first call of a program: what must be noticed, and what may differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpar
from fastpar.run import alike
from fastpar.run.agree import Party
from tests.test_agree import Outcome, Ranks


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = torch.nn.Embedding(5, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.proj(x * self.embed(label)[:, None])


@pytest.fixture(scope="module")
def recorded() -> Any:
    torch.manual_seed(0)
    captured = fastpar.capture(Model().eval(), (torch.randn(1, 6, 8), torch.tensor([3])))
    return captured.programs[0]


def changed(recorded: Any, name: str, change: Any) -> list[Any]:
    return [change(a) if i.name == name else a for i, a in zip(recorded.program.inputs, recorded.args, strict=True)]


def called(recorded: Any, *calls: list[Any], held: bool = False) -> list[Outcome]:
    """Three ranks, of which the last one is called with these in turn, the others with what was recorded."""

    def work(rank: int, party: Party) -> None:
        run = alike.alike(lambda args: ["ran"], recorded.program, party, 5.0, held)
        for args in calls:
            assert run(args if rank == 2 else list(recorded.args)) == ["ran"]

    return Ranks([dist.HashStore()] * 3).run(work)


def test_equal_values_pass_and_only_the_first_call_asks(recorded: Any) -> None:
    assert called(recorded, list(recorded.args), changed(recorded, "x", torch.randn_like)) == [None] * 3


@pytest.mark.parametrize(
    ("name", "change"),
    [("x", torch.randn_like), ("x", lambda a: a.roll(1, 1)), ("x", lambda a: a * float("nan")),
     ("label", lambda a: a - 1), ("proj.weight", lambda a: a * (1 + 1e-6)), ("embed.weight", torch.zeros_like)],
)  # fmt: skip
def test_other_values_raise_on_all_ranks(recorded: Any, name: str, change: Any) -> None:
    torch.manual_seed(1)
    for message in called(recorded, changed(recorded, name, change)):
        assert message is not None and message.endswith(alike._VALID), message
        assert message.startswith(f"AgreementError: ranks do not agree on 'the values of {name}': ranks 0, 1 have")


def test_roundings_of_what_the_user_passes_are_taken(recorded: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert called(recorded, changed(recorded, "x", lambda a: a * (1 + 1e-3))) == [None] * 3
    assert caplog.text.count("as if rounded differently") == 1


def test_weights_that_are_parts_are_not_compared(recorded: Any) -> None:
    assert called(recorded, changed(recorded, "proj.weight", lambda a: a + 1), held=True) == [None] * 3


def test_who_draws_random_numbers_must_draw_the_same(recorded: Any) -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)

    drawing = fastpar.capture(noisy, (torch.zeros(3),)).programs[0]
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(alike.values(drawing.program, drawing.args)["the state of the random generator"])
    assert texts[0] == texts[1] != texts[2]
    assert "the state of the random generator" not in alike.values(recorded.program, recorded.args)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([torch.float64, torch.bfloat16, torch.complex64]), st.integers(8, 5000), st.integers(1, 999))
def test_noise_of_another_seed_is_never_taken_for_rounding(dtype: torch.dtype, size: int, seed: int) -> None:
    def text(seed: int) -> str:
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return f"{alike._samples((x * 100).to(dtype))} (checksum {seed})"

    assert alike.near(text(0), text(0)) and not alike.near(text(0), text(seed))


@pytest.mark.parametrize(("a", "b"), [("1000", "1001"), ("'a'", "'b'"), (" (checksum 1)", " (checksum 2)")])
def test_numbers_texts_and_integers_are_equal_or_not(a: str, b: str) -> None:
    assert alike.near(a, a) and not alike.near(a, b)


def test_who_has_nobody_to_compare_with_does_not(recorded: Any) -> None:
    def run(args: list[Any]) -> list[Any]:
        return args

    assert alike.alike(run, recorded.program, None, 5.0) is run
