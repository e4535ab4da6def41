"""Rows by index where ranks hold some of them: looked up, added up over ranks; written where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import elements_sent, scattered
from fastpar.graph.count import bytes_per_rank
from fastpar.ops.held import gather_held, held_text, read_held, scatter_held, write_held
from fastpar.ops.redistribute import assemble, take
from fastpar.run.build import Built, build
from tests.programs import traced
from tests.prove import Way, prove

MESH = Mesh((("sp", 3),))
HELD = ["[9@sp(3,3,3), 4]", "[11@sp(5,0,6), 4]", "[2*5@sp(2,2,1), 4]", "[4@sp(2,1,1)+7@sp(3,2,2), 4]",
        "[3*2@sp(1,1,0)*3, 4]"]  # fmt: skip
N, C = 13, 8


def parts(x: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    return [take(x, layout, MESH, rank) for rank in range(MESH.ranks)]


@pytest.mark.parametrize("text", HELD)
def test_reads_add_up_and_writes_stay(text: str) -> None:
    torch.manual_seed(0)
    layout = Layout.parse(text)
    rows, size = layout.dims[0], layout.shape[0]
    x, source = torch.randn(layout.shape), torch.randn(6, 4)
    index = torch.randperm(size)[:6]
    index[::2] -= size  # from the end
    held = [held_text(rows, MESH, rank) for rank in range(MESH.ranks)]
    local = parts(x, layout)

    def added(function: Callable[[torch.Tensor, str], torch.Tensor]) -> torch.Tensor:
        return torch.stack([function(part, here) for part, here in zip(local, held, strict=True)]).sum(0)

    def whole(function: Callable[[torch.Tensor, str], torch.Tensor]) -> torch.Tensor:
        return assemble([function(part, here) for part, here in zip(local, held, strict=True)], layout, MESH)[0]

    assert added(lambda part, here: read_held(part, [index], here)).equal(x[index])
    columns = torch.tensor([3, 0, -1, 1, 2, 0])
    assert added(lambda part, here: read_held(part, [index, columns], f"{here} -")).equal(x[index, columns])
    among = index[:, None].expand(6, 4) % size
    assert added(lambda part, here: gather_held(part, 0, among, here)).equal(x.gather(0, among))

    written = x.clone()
    written[index] = source
    assert whole(lambda part, here: write_held(part, [index], source, False, here)).equal(written)
    found = whole(lambda part, here: write_held(part, [index], source, True, here))
    torch.testing.assert_close(found, x.index_add(0, index % size, source))
    for how, want in {
        "set": x.scatter(0, among, source),
        "add": x.scatter_add(0, among, source),
        "reduce amax": x.scatter_reduce(0, among, source, "amax"),
        "only prod": x.scatter_reduce(0, among, source, "prod", include_self=False),
    }.items():
        found = whole(lambda part, here, how=how: scatter_held(part, 0, among, source, how, here))
        torch.testing.assert_close(found, want)


def test_a_row_that_does_not_exist_is_an_error_on_every_rank() -> None:
    x = torch.randn(9, 4)
    for held, part in (("9[0:5]", x[:5]), ("9[5:9]", x[5:]), ("9[]", x[:0])):
        for bad in (9, -10, 1000):
            with pytest.raises(IndexError):
                read_held(part, [torch.tensor([0, bad])], held)
        assert read_held(part, [torch.tensor([8])], held).equal(x[8:] if held == "9[5:9]" else torch.zeros(1, 4))


def attended(x: torch.Tensor) -> torch.Tensor:
    """Rows that are split where this comes from."""
    q = x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)
    return x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape)


def step(then: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """Tokens, a step on them with row numbers and values, and something heavy behind it."""

    def function(x: torch.Tensor, w: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor]:
        return (then(attended(x), index, values) @ w,)

    return function


def forced(built: Built) -> list[str]:
    return [f"{f.operator}: {f.reason}" for f in built.lowered.gm.meta.get("fallbacks", []) if f.kind == "gather"]


aten = torch.ops.aten
READS: dict[str, Callable[..., torch.Tensor]] = {
    "index_select": lambda x, i, v: x.index_select(1, i),
    "index": lambda x, i, v: x[:, i],
    "index from the end": lambda x, i, v: x[:, i - N],
    "index two dimensions": lambda x, i, v: x[torch.zeros_like(i), i],
    "index with channels": lambda x, i, v: x[:, i, (i % C)[:, None]],
    "gather": lambda x, i, v: x.gather(1, i[None, :, None].expand(2, len(i), C)),
    "embedding": lambda x, i, v: F.embedding(i, x[0]),
    "one row": lambda x, i, v: x[:, i[:1]],
}
WRITES: dict[str, Callable[..., torch.Tensor]] = {
    "index_put": lambda x, i, v: aten.index_put(x, [None, i], v),
    "index_put one value": lambda x, i, v: aten.index_put(x, [None, i], v[0, 0, 0]),
    "index_put added": lambda x, i, v: aten.index_put(x, [None, i], v, True),
    "index_put two dimensions": lambda x, i, v: aten.index_put(x, [i % 2, i], v[0]),
    "mask": lambda x, i, v: aten.index_put(x, [x[..., 0] > 0], v[0, 0]),
    "mask behind": lambda x, i, v: aten.index_put(x, [None, torch.arange(N) > 4], v[:, :1] * 2),
    "mask of channels": lambda x, i, v: aten.index_put(x, [None, None, v[0, 0] > 0], v.flatten()[:1]),
    "index_copy": lambda x, i, v: x.index_copy(1, i, v),
    "index_add": lambda x, i, v: x.index_add(1, i, v),
    "scatter": lambda x, i, v: x.scatter(1, i[None, :, None].expand(v.shape), v),
    "scatter_add": lambda x, i, v: x.scatter_add(1, i[None, :, None].expand(v.shape), v),
    "scatter amax": lambda x, i, v: x.scatter_reduce(1, i[None, :, None].expand(v.shape), v, "amax"),
}
PLANS = ("gather=3", "cfg=2,ulysses=2")


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_programs_with_rows_by_index(name: str) -> None:
    torch.manual_seed(0)
    then = {**READS, **WRITES}[name]
    values = torch.randn(2, 5, C).double()
    x, w = torch.randn(2, N, C).double(), torch.randn(C, C if name != "index with channels" else 5).double()
    if name == "index with channels":
        then, w = (lambda x, i, v: x[:, i[:, None], (i % C)[None, :]]), torch.randn(5, 3).double()
    case = traced(step(then), [x, w, torch.tensor([12, 0, 7, 3, 5]), values])
    for plan in (*PLANS, "ring=16") if name in ("index_select", "index_put") else PLANS:  # or ranks without rows, too
        prove(case, Way.of(plan, case.program))
        assert not forced(build(case.program, plan)), plan


def test_a_value_for_each_marked_row_needs_the_whole_mask() -> None:
    def function(x: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor]:
        mask = (torch.arange(2 * N) % 5 == 0).view(2, N)
        return (attended(aten.index_put(attended(x), [mask], values)),)

    torch.manual_seed(0)
    case = traced(function, [torch.randn(2, N, C).double(), torch.randn(6, C).double()])
    prove(case, Way.of("gather=3", case.program))
    assert {f.split(":")[2] for f in forced(build(case.program, "gather=3"))} == {"index_put"}


def test_a_few_rows_are_added_up_and_many_are_not() -> None:
    """What travels is the smaller: the table, or the rows that were asked for."""
    torch.manual_seed(0)

    def moved(count: int) -> tuple[int, int]:
        function = step(lambda x, i, v: x[:, i])
        case = traced(function, [torch.randn(2, N, C).double(), torch.randn(C, C).double(),
                                 torch.arange(count) % N, torch.zeros(1)])  # fmt: skip
        prove(case, Way.of("gather=2", case.program))
        built = build(case.program, "gather=2")
        return max(bytes_per_rank(built.lowered)), len(forced(built))

    few, many = moved(3), moved(3 * N)
    assert few[1] == 0 and many[1] == 1
    # keys and values of the attention, the rows that were asked for, and the output
    assert few[0] < many[0]


def test_a_sum_over_ranks_of_which_each_keeps_rows_is_one_exchange() -> None:
    """A reduce-scatter of parts that are not equal: (N-1)/N of the value leaves each rank, an all-reduce's half."""
    src, dst = Layout.parse("[7, 4] partial(sum:sp)"), Layout.parse("[7@sp(3,2,2), 4]")
    assert elements_sent(src, dst, MESH) == (16, 20, 20)
    assert scattered(src, Layout.whole((7, 4)), MESH) is None
    assert scattered(src, src, MESH) is None
    assert max(elements_sent(src, Layout.whole((7, 4)), MESH)) == 38
