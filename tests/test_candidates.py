"""What to split, and into which parts: merged rows, windows, and segments that are even together."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fastpar
from fastpar.core.layout import even_parts, filling_parts
from fastpar.rules import Pos
from fastpar.sharding.candidates import Seed, Walk

WIDTH = 12


class FeedForward(nn.Module):
    """Gated, over rows that its products merge with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, 40), nn.Linear(WIDTH, 40)
        self.down = nn.Linear(40, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)) * self.gate(x))


def attend(x: torch.Tensor, heads: int = 2) -> torch.Tensor:
    q = k = v = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Windows(FeedForward):
    """Attention within windows of five rows, each with a row of its own for what it is about."""

    def __init__(self) -> None:
        super().__init__()
        self.about = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        x = x.reshape(batch * rows // 5, 5, width)
        x = torch.cat([self.about.expand(len(x), 1, width), x], 1)
        x = x + attend(super().forward(x))
        return x[:, 0].reshape(batch, rows // 5, width)


class Segments(FeedForward):
    """Joint attention over several inputs, concatenated."""

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        x = torch.cat(parts, 1)
        return x + attend(super().forward(x))


def check(model: nn.Module, plan: str, *inputs: torch.Tensor) -> fastpar.Report:
    report = fastpar.verify(model.double(), tuple(x.double() for x in inputs), plan=plan)
    assert report.ok and not report.fallbacks, str(report)
    return report


@pytest.mark.parametrize("plan", ["ulysses=4", "gather=3", "ring=5", "ulysses=2,ring=2"])
def test_rows_that_a_product_merges_with_the_batch(plan: str) -> None:
    report = check(FeedForward(), plan, torch.randn(2, 23, WIDTH))
    assert not report.replicated
    assert report.flops_share == -(-23 // report.ranks) / 23
    assert [c.why for c in report.collectives] == ["output"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", ["ulysses=4", "gather=3", "ring=2", "torus=3"])
def test_windows_are_shared_out_whole(plan: str, batch: int) -> None:
    report = check(Windows(), plan, torch.randn(batch, 40, WIDTH))
    assert report.flops_share == pytest.approx(-(-8 // report.ranks) / 8)
    assert [c.why for c in report.collectives] == ["output"]


def test_a_window_is_cut_where_there_are_too_few() -> None:
    report = check(Windows(), "gather=4", torch.randn(1, 10, WIDTH))
    assert report.flops_share < 0.5


@pytest.mark.parametrize("rows", [(1, 1, 1, 5), (5, 6), (1, 9, 7, 1, 2), (3, 3, 3, 3), (6, 1)])
@pytest.mark.parametrize("plan", ["ulysses=4", "gather=3", "ring=4", "ulysses=2,ring=2"])
def test_segments_are_even_together(plan: str, rows: tuple[int, ...]) -> None:
    report = check(Segments(), plan, *(torch.randn(1, n, WIDTH) for n in rows))
    products = -(-sum(rows) // report.ranks) / sum(rows)  # the busiest rank's share of what is not attention
    assert report.flops_share <= products + 1e-9


def test_parts_behind_others_and_parts_that_fill_up() -> None:
    for n in range(1, 8):
        for first, second in ((5, 6), (1, 1), (1025, 77), (2, 3)):
            rows = [a + b for a, b in zip(even_parts(first, n), even_parts(second, n, before=first), strict=True)]
            assert sum(rows) == first + second and max(rows) - min(rows) <= 1
            held = even_parts(first, n)
            rows = [a + b for a, b in zip(held, filling_parts(second, (Fraction(1, n),) * n, held), strict=True)]
            assert sum(rows) == first + second and max(rows) - min(rows) <= 1
    assert even_parts(24, 2, unit=8, before=8) == (8, 16)


class Factorised(FeedForward):
    """Attention among the rows of a frame, then, on what that made of them, among frames."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, frames, high, wide, width = x.shape
        rows = high * wide
        x = F.silu(x.reshape(batch * frames, rows, width))
        x = x + attend(super().forward(x))
        x = x.reshape(batch, frames, rows, width).transpose(1, 2).reshape(batch * rows, frames, width)
        x = x + attend(super().forward(x))
        return x.reshape(batch, rows, frames, width).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [(5, 4, 3), (12, 5, 1)])
@pytest.mark.parametrize("plan", ["ulysses=4", "gather=3", "ring=4"])
def test_frames_and_rows_are_alternatives(plan: str, shape: tuple[int, ...], batch: int) -> None:
    report = check(Factorised(), plan, torch.randn(batch, *shape, WIDTH))
    assert report.flops_share == pytest.approx(1 / report.ranks)  # twelve of either divide, five do not


class Tail(nn.Module):
    """Takes what it works on out of an input that has more rows; ``all`` of them are keys."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self.keys, self.out = keys, nn.Linear(WIDTH, WIDTH)

    def forward(self, joint: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q = joint[:, 5:] * (1 + scale[:-1, None])
        k = joint if self.keys == "all" else q
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0])


@pytest.mark.parametrize("keys", ["own", "all"])
@pytest.mark.parametrize("plan", ["gather=4", "cfg=2", "cfg=2,gather=2"])
def test_of_an_input_these_rows_are_even_that_are_taken(plan: str, keys: str) -> None:
    """20 of 25 tokens, and 2 of 3 rows of a table: a rank has 5 tokens, or one batch item with its row."""
    torch.manual_seed(0)
    given = torch.randn(2, 25, WIDTH), torch.randn(3, WIDTH)
    report = fastpar.verify(Tail(keys).double(), tuple(x.double() for x in given), plan=plan)
    assert report.ok and not report.fallbacks
    assert report.flops_share == pytest.approx(report.attainable_share)
    assert {c.why for c in report.collectives} <= {"output", "attention"}


class Two(FeedForward):
    """Attention over some rows, and a network of its own over others, which nothing leads to from the first.

    ``meet``: the others are keys of the rows' attention (a prompt); else a result.
    """

    def __init__(self, wide: int, meet: bool) -> None:
        super().__init__()
        self.meet = meet
        self.other = nn.Sequential(nn.Linear(WIDTH, wide), nn.SiLU(), nn.Linear(wide, WIDTH))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, y = x + attend(super().forward(x)), self.other(y)
        if not self.meet:
            return x, y
        q, k = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in (x, y))
        return (x + F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2),)


@pytest.mark.parametrize("plan", ["ulysses=4", "ring=3", "cfg=2,gather=2"])
def test_a_network_of_its_own_is_split_too(plan: str) -> None:
    report = check(Two(400, False), plan, torch.randn(2, 12, WIDTH), torch.randn(2, 24, WIDTH))
    assert report.flops_share == pytest.approx(report.attainable_share) and not report.replicated


@pytest.mark.parametrize(("wide", "meet"), [(8, False), (400, True)])
def test_what_is_little_or_a_prompt_stays_whole(wide: int, meet: bool) -> None:
    """Another candidate takes time to try; and keys that are the same in every step are made once, with ``hoist``."""
    report = check(Two(wide, meet), "gather=3", torch.randn(1, 48, WIDTH), torch.randn(1, 6, WIDTH))
    assert report.replicated and not any("tried" in n for n in report.notes)
    assert sum(c.count for c in report.collectives if c.why == "attention") == 1


class Encoder(nn.Module):
    """Convolutions that take a picture down to one place."""

    def __init__(self) -> None:
        super().__init__()
        taps = [(3, 1), (3, 2), (3, 2), (2, 1)]  # and strides: of 8 rows 8, 4, 2 and 1
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, k, stride=s, padding=k // 2 * (k % 2)) for k, s in taps)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            picture = conv(picture)
        return self.out(picture.squeeze(-1).squeeze(-1))


@pytest.mark.parametrize("plan", ["gather=2", "gather=4", "cfg=2,ring=2"])
def test_rows_that_come_down_to_one(plan: str) -> None:
    """Which a rank has, and all need: it travels by itself, and is no gather."""
    report = check(Encoder(), plan, torch.randn(2, WIDTH, 8, 8))
    row = 2 * WIDTH * 8
    assert 0 < sum(c.bytes for c in report.collectives if c.why == "rows") <= row * (report.ranks - 1)
    assert report.flops_share < 0.7


def test_seeds_have_one_order() -> None:
    """They come as a set, which every process has in another order; ranks must come to the same program."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    seeds = [Seed(x, Pos(1, 1, 24, 1)), Seed(x, Pos(2, 1, 10, 4)), Seed(x, Pos(2, 1, 5, 8)), Seed(x, Pos(2, 2, 5, 4)),
             Seed(y, Pos(0, 1, 7, 1))]  # fmt: skip
    for given in permutations(seeds):
        found = Walk().candidate(graph, given).seeds
        assert found == (*seeds[:2], seeds[3], seeds[2], seeds[4])  # of one dimension the finest first
