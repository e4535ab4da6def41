"""Emulated links: times are those of the link model, shapes are right, and whatever uses torch.distributed runs.

Lower bounds on times are exact (an exchange is never over too early), upper ones leave room for a busy machine; a
measurement that another process may have disturbed is repeated before it counts as a failure.
"""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh

import fastpar
from fastpar.backends.emulate import dynamo
from fastpar.backends.emulate.channel import ThreadChannel
from fastpar.backends.emulate.group import repeat
from fastpar.backends.emulate.traffic import everywhere, ring, rooted, shifts, sisters
from fastpar.core.errors import AgreementError, OptionError
from fastpar.core.mesh import Mesh
from fastpar.plan.topology import parse
from fastpar.run.agree import Party, agree, party_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # names that torch 2.11 has

TWO_LEVELS = """
[device]
name = "a card"
flops = 1e14
bandwidth = 1e12
memory = 1e10
[[level]]
name = "switch"
size = 4
bandwidth = {inner}
latency = {latency}
efficiency = 1
[[level]]
name = "network"
size = 2
bandwidth = {outer}
latency = {latency}
efficiency = 1
"""


def slow(inner: float = 1e8, outer: float = 2.5e7, latency: float = 1e-4) -> Any:
    """Two machines of four with links so slow that a CPU's clock can measure them."""
    return parse(TWO_LEVELS.format(inner=inner, outer=outer, latency=latency), "slow")


@pytest.fixture
def emulated() -> Iterator[Callable[..., Any]]:
    started = []

    def start(*args: Any, **options: Any) -> Any:
        started.append(fastpar.emulate.start(*args, **options))
        return started[-1]

    yield start
    for one in started:
        one.stop()
    assert not dist.is_initialized()


def timed(run: Callable[[], Any], below: float) -> float:
    """Seconds of a call; the shortest of up to eight, until one is below what it should be."""
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        if best < below:
            break
    return best


# -- what is asked of the links -----------------------------------------------------------------


def test_messages() -> None:
    def listed(messages: Any) -> list[tuple[int, int, float]]:
        return sorted(zip(*(a.tolist() for a in messages), strict=True))

    assert listed(ring(3, 5)) == [(0, 1, 5), (1, 2, 5), (2, 0, 5)]
    assert listed(ring(1, 5)) == []
    assert listed(shifts([1, 0, 7])) == [(0, 0, 1), (0, 2, 7), (1, 0, 7), (1, 1, 1), (2, 1, 7), (2, 2, 1)]
    assert listed(rooted(3, 1, 4, True)) == [(0, 1, 4), (2, 1, 4)]
    assert listed(rooted(3, 1, 4, False)) == [(1, 0, 4), (1, 2, 4)]
    assert listed(everywhere(ring(2, 5), [(0, 4), (1, 5)])) == [(0, 4, 5), (1, 5, 5), (4, 0, 5), (5, 1, 5)]


@pytest.mark.parametrize("mesh", [Mesh((("a", 2), ("b", 3), ("c", 4))), Mesh((("a", 8), ("b", 64)))])
def test_sisters_are_the_groups_of_a_mesh(mesh: Mesh) -> None:
    for axes in [(n,) for n in mesh.names] + [mesh.names[:2], mesh.names[::2]]:
        groups = {mesh.group(r, axes) for r in range(mesh.ranks)}
        assert all(set(sisters(g, mesh.ranks)) == groups for g in groups)


def test_a_group_that_does_not_tile_the_world_is_alone() -> None:
    assert sisters((0, 1, 3), 8) == [(0, 1, 3)]
    assert sisters((5, 6, 7), 8) == [(5, 6, 7)]
    assert sisters((2,), 4) == [(0,), (1,), (2,), (3,)]


# -- times --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100_000, 500_000, 2_000_000])
def test_collectives_take_the_link_model_s_time(emulated: Any, size: int) -> None:
    """Bytes over bandwidth by hand, per collective; never shorter, and at most 10% and 5 ms longer."""
    emulated(slow(), ranks=4)
    x, latency, link = torch.randn(size // 4), 1e-4, 1e8
    runs = {
        "all_reduce": (lambda: dist.all_reduce(x), 2 * size * 3 / 4),
        "all_gather": (lambda: dist.all_gather_into_tensor(torch.empty(size), x), 3 * size),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(torch.empty(size // 16), x), size * 3 / 4),
        "all_to_all": (lambda: dist.all_to_all_single(torch.empty_like(x), x), size * 3 / 4),
        "broadcast": (lambda: dist.broadcast(x, 0), size),
        "send": (lambda: dist.send(x, 1), size),
    }
    for name, (run, moved) in runs.items():
        wanted = latency + moved / link
        took = timed(run, 1.1 * wanted + 0.005)
        assert wanted <= took < 1.1 * wanted + 0.005, (name, took, wanted)


def test_latency_alone_and_the_cost_of_emulating(emulated: Any) -> None:
    emulated(slow(inner=1e15, outer=1e15, latency=1e-9), ranks=8)
    x = torch.randn(16)
    assert timed(lambda: [dist.all_reduce(x) for _ in range(20)], 0.02) < 0.1


def test_groups_across_machines_share_the_network(emulated: Any) -> None:
    """All four groups of two machines want the one link between them."""
    emulation = emulated(slow(), ranks=8)
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("out", "in"))
    x = torch.randn(25_000)
    dist.all_to_all_single(torch.empty_like(x), x, group=mesh.get_group("out"))
    assert emulation.tallies["all_to_all"].seconds == pytest.approx(1e-4 + 4 * 50_000 / 2.5e7)
    emulation.reset()
    dist.all_to_all_single(torch.empty_like(x), x, group=mesh.get_group("in"))
    assert emulation.tallies["all_to_all"].seconds == pytest.approx(1e-4 + 75_000 / 1e8)


def test_moving_to_other_links(emulated: Any) -> None:
    emulation = emulated(slow(), ranks=8)
    x = torch.randn(1000)
    found = []
    for inner in (1e8, 1e7):
        emulation.move(slow(inner, inner))
        emulation.reset()
        dist.all_reduce(x)
        found.append(emulation.tallies["all_reduce"].seconds)
    assert found == pytest.approx([1e-4 + 7e-5, 1e-4 + 7e-4])
    with pytest.raises(OptionError, match="has 4 devices, the plan needs 8"):
        emulation.move("rtxpro5000-4")


def test_computing_beside_a_collective_takes_the_longer_of_the_two(emulated: Any) -> None:
    emulated(slow(), ranks=4)
    x = torch.randn(1_250_000)  # 75 ms
    wanted = 1e-4 + 2 * 5e6 * 3 / 4 / 1e8

    def beside() -> None:
        work = dist.all_reduce(x, async_op=True)
        assert not work.is_completed()
        end = time.perf_counter() + 0.06
        while time.perf_counter() < end:  # busy, as what computes is
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        work.wait()

    took = timed(beside, wanted + 0.02)
    assert wanted <= took < wanted + 0.06  # the sum is 135 ms


def test_two_groups_at_once_and_one_after_the_other(emulated: Any) -> None:
    emulated(slow(), ranks=8)
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("out", "in"))
    x, y = torch.randn(250_000), torch.randn(250_000)
    one = 1e-4 + 2 * 1e6 * 3 / 4 / 1e8

    def both(first: Any, second: Any) -> None:
        works = [dist.all_reduce(t, group=g, async_op=True) for t, g in ((x, first), (y, second))]
        for work in works:
            work.wait()

    inside, other = mesh.get_group("in"), dist.new_group(dist.get_process_group_ranks(mesh.get_group("in")))
    assert 2 * one <= timed(lambda: both(inside, inside), 2 * one + 0.003)  # one channel
    took = timed(lambda: both(inside, other), 1.5 * one)
    assert one <= took < 2 * one


def test_sending_and_receiving_go_beside_each_other(emulated: Any) -> None:
    emulated(slow(), rank=1, ranks=4)
    x, y = torch.randn(500_000), torch.empty(500_000)
    one = 1e-4 + 2e6 / 1e8

    def step() -> None:
        ops = [dist.P2POp(dist.isend, x, 2), dist.P2POp(dist.irecv, y, 0)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    took = timed(step, 1.5 * one)
    assert one <= took < 1.9 * one
    assert torch.equal(x, y)


def test_coalesced_collectives_are_one_exchange(emulated: Any) -> None:
    emulation = emulated(slow(), ranks=4)
    group, xs = dist.group.WORLD, [torch.randn(1000), torch.randn(3000)]
    group._start_coalescing(torch.device("cpu"))
    for x in xs:
        group.allreduce([x])
    group._end_coalescing(torch.device("cpu")).wait()
    assert list(emulation.tallies) == ["coalesced"] and emulation.tallies["coalesced"].count == 1
    assert emulation.tallies["coalesced"].seconds == pytest.approx(1e-4 + 2 * 16_000 * 3 / 4 / 1e8)


# -- what arrives -------------------------------------------------------------------------------


def test_repeat() -> None:
    x = torch.arange(3.0)
    for shape in ((7,), (3,), (2,), (2, 3), (4, 3)):
        out = torch.full(shape, float("nan"))
        repeat(out, x)
        assert torch.equal(out.flatten(), x.repeat(5)[: out.numel()])
    strided = torch.full((4, 6), float("nan"))[:, ::2]
    repeat(strided, x)
    assert torch.equal(strided, x.expand(4, 3))
    empty = torch.full((2,), float("nan"))
    repeat(empty, x[:0])
    assert torch.equal(empty, torch.ones(2))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_collective(emulated: Any, ranks: int, dtype: torch.dtype) -> None:
    """Shapes are the caller's, numbers are this rank's own; plain, functional and over objects."""
    emulated("h100-8", rank=ranks - 1, ranks=ranks)
    x = torch.arange(1, 12 * ranks + 1).to(dtype).view(ranks * 2, 6)
    nan = torch.zeros if dtype == torch.int64 else lambda *a, **k: torch.full(*a, float("nan"), **k)

    def blank(*shape: int) -> torch.Tensor:
        return nan(shape, dtype=dtype)

    def filled(*outs: torch.Tensor) -> None:
        for out in outs:
            assert out.dtype == dtype and torch.isin(out, torch.cat([x.flatten(), torch.ones(1, dtype=dtype)])).all()

    outs = [blank(ranks * 2, 6) for _ in range(ranks)]
    dist.all_gather(outs, x)
    filled(*outs)
    dist.all_gather_into_tensor(out := blank(ranks * ranks * 2, 6), x)
    filled(out)
    dist.all_to_all_single(out := blank(ranks * 2, 6), x)
    filled(out)
    dist.all_to_all_single(out := blank(ranks, 6), x, [1] * ranks, [2] * ranks)
    filled(out)
    dist.all_to_all(outs := [blank(2, 6) for _ in range(ranks)], list(x.chunk(ranks)))
    filled(*outs)
    dist.reduce_scatter_tensor(out := blank(2, 6), x)
    assert torch.equal(out, x.chunk(ranks)[-1])
    dist.reduce_scatter(out := blank(2, 6), list(x.chunk(ranks)))
    filled(out)
    for run in (dist.all_reduce, lambda t: dist.reduce(t, 0), lambda t: dist.broadcast(t, ranks - 1)):
        run(y := x.clone())
        assert torch.equal(x, y)
    if ranks > 1:
        dist.broadcast(out := blank(3), 0)
        filled(out)
        dist.gather(x, None, 0)
        dist.scatter(out := blank(3), None, 0)
        filled(out)
    dist.gather(x, outs := [blank(ranks * 2, 6) for _ in range(ranks)], ranks - 1)
    filled(*outs)
    dist.scatter(out := blank(2, 6), list(x.chunk(ranks)), ranks - 1)
    assert torch.equal(out, x.chunk(ranks)[-1])
    objects: list[Any] = [None] * ranks
    dist.all_gather_object(objects, {"rank": 1})
    assert objects == [{"rank": 1}] * ranks
    dist.barrier()
    for made in (
        funcol.all_gather_tensor(x, 0, dist.group.WORLD),
        funcol.all_to_all_single(x, None, None, dist.group.WORLD),
        funcol.all_reduce(x, "sum", dist.group.WORLD),
        funcol.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD),
    ):
        filled(funcol.wait_tensor(made))


def test_inference_tensors_and_callbacks(emulated: Any) -> None:
    emulated(ranks=2)
    with torch.inference_mode():
        x = torch.randn(4)
        dist.all_gather_into_tensor(out := torch.empty(8), x)
    assert torch.equal(out, x.repeat(2))
    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    assert torch.equal(future.then(lambda f: f.value()[0] * 2).wait(), torch.full((3,), 2.0))


def test_compiled_callers_see_a_process_group(emulated: Any) -> None:
    emulated(ranks=4)
    group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")).get_group("b")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: torch.Tensor) -> torch.Tensor:
        return funcol.wait_tensor(funcol.all_to_all_single(x, None, None, group)) + 1

    x = torch.randn(4, 3)
    assert torch.equal(run(x), x + 1)


def test_dynamo_is_told_where_it_knows_exact_types() -> None:
    """As of torch 2.11: a class with a static method that looks at the type."""

    class Base: ...

    class Ours(Base): ...

    class ProcessGroupVariable:
        @staticmethod
        def is_process_group(value: object) -> bool:
            return type(value) is Base

    old = types.SimpleNamespace(ProcessGroupVariable=ProcessGroupVariable)
    assert not ProcessGroupVariable.is_process_group(Ours())
    assert dynamo.tell(Ours, old) and not dynamo.tell(Ours, old)
    assert [ProcessGroupVariable.is_process_group(x) for x in (Base(), Ours(), 3)] == [True, True, False]
    assert not dynamo.tell(Ours, types.SimpleNamespace())


@pytest.mark.parametrize("ranks", [64, 512])
def test_many_ranks(emulated: Any, ranks: int) -> None:
    rows = TWO_LEVELS.replace("size = 2", f"size = {ranks // 4}").format(inner=4e11, outer=1e11, latency=1e-5)
    begin = time.perf_counter()
    emulation = emulated(parse(rows, "large"), rank=ranks - 1, ranks=ranks)
    mesh = init_device_mesh("cpu", (ranks // 8, 2, 4), mesh_dim_names=("x", "y", "z"))
    x = torch.randn(ranks, 8)
    dist.all_to_all_single(out := torch.empty_like(x), x)
    dist.all_reduce(x, group=mesh.get_group("x"))
    assert mesh.get_group("x").size() == ranks // 8 and tuple(mesh.get_coordinate() or ()) == (ranks // 8 - 1, 1, 3)
    assert torch.isfinite(out).all() and emulation.tallies["all_to_all"].bytes == (ranks - 1) * 32
    assert time.perf_counter() - begin < 30


def test_agreement_is_with_oneself_here_and_only_here(emulated: Any) -> None:
    """Nobody is there to disagree. What holds for the backend must not hold for other backends of this process."""
    emulated(ranks=4)
    assert party_of() is None
    agree({"plan": "one"}, timeout=0.1)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(AgreementError, match="did not come within"):
            agree({"plan": "one"}, Party(dist.HashStore(), 0, (0, 1)), timeout=0.05)
    finally:
        dist.destroy_process_group()


# -- beginning and end --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(topology="h200"), "unknown topology 'h200'"),
        (dict(ranks=9), "'h100-8' has 8 devices, the plan needs 9"),
        (dict(rank=8), "rank 8 of 8; valid"),
        (dict(rank=-1), "rank -1 of 8; valid"),
        (dict(ranks=0), "rank 0 of 0; valid"),
        (dict(ctas=0), "ctas=0"),
        (dict(timeout=0), "timeout=0"),
    ],
)
def test_bad_starts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fastpar.emulate.start(**arguments)
    assert not dist.is_initialized()


def test_one_world_at_a_time_and_again_after_it(emulated: Any) -> None:
    first = emulated(ranks=2)
    with pytest.raises(OptionError, match="destroy the one that there is first"):
        fastpar.emulate.start()
    group = dist.group.WORLD
    first.stop()
    first.stop()
    with pytest.raises(RuntimeError, match="has been destroyed"):
        group.allreduce([torch.ones(1)])
    emulated(ranks=3)
    assert dist.get_world_size() == 3


def test_without_start_there_are_no_links() -> None:
    with fastpar.emulate.start(ranks=2):
        pass
    with pytest.raises(OptionError, match="inside of fastpar.emulate.start"):
        dist.init_process_group("emulate", store=dist.HashStore(), rank=0, world_size=2)
    assert not dist.is_initialized()


def test_waiting_has_an_end_and_errors_arrive() -> None:
    channel = ThreadChannel("test", patience=0.05)
    work = channel.occupy(0.3, lambda: None, [], [])
    with pytest.raises(RuntimeError, match="not over within 0.05 s"):
        work.wait()

    def broken() -> None:
        raise ValueError("a copy failed")

    failed = ThreadChannel("test", patience=10).occupy(0.0, broken, [], [])
    with pytest.raises(ValueError, match="a copy failed"):
        failed.wait()
    assert not failed.is_success() and isinstance(failed.exception(), ValueError)
    channel.close()


def test_a_process_ends_while_exchanges_are_under_way() -> None:
    """Nothing keeps the interpreter from leaving: no hang, exit status 0."""
    code = (
        "import torch, torch.distributed as dist, fastpar.emulate\n"
        "fastpar.emulate.start(ranks=4)\n"
        "work = dist.all_to_all_single(torch.empty(1 << 26), torch.empty(1 << 26), async_op=True)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
