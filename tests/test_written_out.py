"""Operators without a function of ours are what torch says that they are made of; those on stacks keep them split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastpar.run.build import build
from tests.programs import traced
from tests.prove import Way, prove
from tests.test_index import attended, forced

B, N, C = 2, 12, 8
aten = torch.ops.aten


def loop(x: torch.Tensor) -> torch.Tensor:
    """A recurrence over the rows, one after the other."""
    state, rows = x[:, 0] * 0, []
    for i in range(N):
        state = 0.5 * state + x[:, i]
        rows.append(state)
    return torch.stack(rows, 1)


def square(x: torch.Tensor) -> torch.Tensor:
    """A matrix for every token, far from singular."""
    return x.reshape(B, N, 2, 4)[..., :2] + 4 * torch.eye(2, dtype=x.dtype)


TURNED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fft of rows": lambda x: torch.fft.fft(x.to(torch.complex128), dim=1).abs(),
    "sorted rows": lambda x: x.sort(dim=1).values,
    "products of rows": lambda x: x.cumprod(1),
    "products of rows beside rows": lambda x: x.cumprod(1) * x,
    "one after the other": loop,
    "rows by index": lambda x: x.gather(1, torch.arange(N).flip(0)[None, :, None].expand(B, N, C)) * 2,
}
OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    # pointwise, but not by torch's tags
    "hardswish": F.hardswish,
    "glu": lambda x: F.glu(x, -1),
    "prelu": lambda x: F.prelu(x, x[0, 0, :1]),
    "logsigmoid": F.logsigmoid,
    "floor_divide": lambda x: x // 0.3,
    "complex": lambda x: torch.complex(x, x * 2).abs(),
    # rows and columns of which some are hidden
    "tril": lambda x: x.tril(-1),
    "triu": lambda x: x.triu(2),
    # norms with numbers from training
    "batch norm": lambda x: F.batch_norm(x.view(B * N, C), *(x[0, i] ** 2 + 1 for i in range(4))).view(x.shape),
    "batch norm of pictures": lambda x: aten._native_batch_norm_legit_no_training(
        x.view(B, 3, 4, C), *(x[0, i, :3] ** 2 + 1 for i in range(4)), 0.1, 1e-5)[0].view(x.shape),
    # the first of the largest
    "argmax": lambda x: (x * 2).round().argmax(1, keepdim=True) + x,
    "argmin of ends": lambda x: x * (x * 2).round().argmin(1)[:, None],
    "max": lambda x: x + sum((x * 2).round().max(1, keepdim=True)),
    "min": lambda x: torch.cat([y[:, None] for y in (x * 2).round().min(1)] + [x], 1),
    # stacks
    "cross": lambda x: torch.cross(x[..., :3], x[..., 3:6], dim=-1),
    "inverse": lambda x: torch.linalg.inv(square(x)).flatten(2),
    "solve": lambda x: torch.linalg.solve(square(x), x[..., :2]),
    "det": lambda x: torch.linalg.det(square(x))[..., None].expand(B, N, 4),
    "qr": lambda x: torch.linalg.qr(square(x)).R.flatten(2),
    "fft of channels": lambda x: torch.fft.fft(x.to(torch.complex128), dim=-1).abs(),
    "fft of real channels": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 2, dim=-1),
    "cdist": lambda x: torch.cdist(x, torch.ones_like(x[:, :4])),
    "searchsorted": lambda x: torch.searchsorted(x[0, 0].sort().values, x).to(x.dtype),
}  # fmt: skip
NEED_ALL: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "solve one for all": (lambda x: torch.linalg.solve(square(x), x[0, :2, :3] * 0 + 1).flatten(2), "_linalg_solve_ex"),
    "cdist of all pairs": (lambda x: torch.cdist(x, x), "_cdist_forward"),
}


def proved(operator: Callable[[torch.Tensor], torch.Tensor], plan: str = "ulysses=3") -> list[str]:
    torch.manual_seed(0)
    x = torch.randn(B, N, C).double()
    w = torch.randn(operator(x).shape[-1], C).double()
    case = traced(lambda x, w: (operator(attended(x)) @ w,), [x, w])
    prove(case, Way.of(plan, case.program))
    return forced(build(case.program, plan))


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_stay_split(name: str) -> None:
    assert proved(OPERATORS[name]) == []


@pytest.mark.parametrize("name", TURNED)
def test_what_needs_all_rows_is_done_for_some_channels_on_each_rank(name: str) -> None:
    """Two all-to-alls, there and back, instead of all rows on all ranks."""
    assert proved(TURNED[name]) == []


def test_on_two_ranks_there_and_back_is_no_less_than_all_rows() -> None:
    assert len(proved(TURNED["products of rows"], "ulysses=2")) == 1


@pytest.mark.parametrize("name", NEED_ALL)
def test_rows_that_are_needed_by_all_are_reported(name: str) -> None:
    operator, culprit = NEED_ALL[name]
    found = proved(operator)
    assert found and all(f.startswith(f"aten::{culprit}: ") for f in found)
