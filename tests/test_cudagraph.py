"""Captured programs: what a captured graph reads, gives and outlives, on a device that is played by the CPU.

``Played`` captures as a GPU does: nothing is executed, results have memory and no values yet, and a replay runs what
was captured on the very tensors that it was captured with, into the same results. So a stale input, a result that
the next replay overwrites, and a call that executes twice or not at all show here. What only a GPU can show is in the
tests marked ``gpu``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpar
import fastpar.run.capturing as capturing_module
from fastpar.backends.cudagraph import captured as captured_module
from fastpar.backends.cudagraph import obstacles, release
from fastpar.backends.cudagraph.captured import MOVES, Captured
from fastpar.backends.cudagraph.cuda import Watch
from fastpar.backends.cudagraph.obstacles import obstacle, scalars_on
from fastpar.graph.program import Input, Program
from fastpar.run.artefact import Artefact
from fastpar.run.capturing import capturing
from tests.test_hoist import Watched, denoiser, made, prompt, sample

__all__ = ["made"]  # the fixture

torch.set_num_threads(1)


class Played:
    """A device on which ``capture`` executes nothing: it counts what really ran, and where."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.did: Counter[str] = Counter()
        self.refuses = ""

    def aside(self, run: Callable[[], Sequence[Any]], reads: Sequence[Tensor]) -> Sequence[Any]:
        self.did["run"] += 1
        return run()

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.did["capture"] += 1
        state = torch.random.get_rng_state()
        results = [r.clone() if isinstance(r, Tensor) else r for r in run()]
        torch.random.set_rng_state(state)
        for r in results:
            if isinstance(r, Tensor) and r.is_floating_point():
                r.fill_(float("nan"))

        def replay() -> None:
            self.did["replay"] += 1
            for there, now in zip(results, run(), strict=True):
                if isinstance(there, Tensor):
                    there.copy_(now)

        return replay, results

    def launched(self, what: str) -> None:
        self.did["launched"] += 1


def program(forward: Callable[..., Any], kinds: str, *values: Tensor) -> Program:
    """A program of an fx trace; ``kinds``: p(arameter), u(ser), s(tate) or c(arried) per input."""
    gm = torch.fx.symbolic_trace(forward)
    names = {"p": "parameter", "u": "user", "s": "state", "c": "carried"}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta["val"] = value
    out = gm.graph.output_node()
    out.args = (tuple(out.args[0]) if isinstance(out.args[0], (tuple, list)) else (out.args[0],),)
    gm.recompile()
    inputs = tuple(Input(f"{kind}{i}", names[kind]) for i, kind in enumerate(kinds))  # type: ignore[arg-type]
    return Program(gm, inputs, name="step")


def played(forward: Callable[..., Any], kinds: str, *values: Tensor, **options: Any) -> tuple[Captured, Played]:
    made, device = program(forward, kinds, *values), Played()
    return Captured(made, lambda args: tuple(made.gm(*args)), device, torch.device("cpu"), **options), device


def test_each_call_executes_once_and_results_may_be_kept() -> None:
    w = torch.randn(3)
    run, device = played(lambda w, x: (w * x, x + 1), "pu", w, w)
    kept = []
    for _ in range(4):
        x = torch.randn(3)
        kept.append((x, run([w, x])))
    for x, (a, b) in kept:  # also after later replays
        assert torch.equal(a, w * x) and torch.equal(b, x + 1)
    assert device.did == {"run": 1, "capture": 1, "replay": 3}


def test_what_is_carried_from_call_to_call_is_copied_and_may_be_kept() -> None:
    """The next call is given what this one gave, at another address every time: that is no reason to capture again."""
    run, device = played(lambda x, old: (x + old, x * 2), "uc", torch.ones(3), torch.ones(3))
    old, expected = torch.zeros(3), torch.zeros(3)
    for _ in range(5):
        x = torch.randn(3)
        now, kept = run([x, old])
        assert torch.equal(now, x + expected)
        old, expected = kept, 2 * x
    assert device.did["capture"] == 1


def test_weights_are_read_where_they_are_and_seen_when_written_to() -> None:
    w = torch.randn(3)
    run, device = played(lambda w, x: w * x, "pu", w, w)
    x = torch.ones(3)
    for _ in range(3):
        w.data += 1  # leaves no trace on the tensor
        assert torch.equal(run([w, x])[0], w)
    assert run.own.keys() == {1}


def test_a_weight_that_moves_is_captured_again_and_copied_in_the_end() -> None:
    run, device = played(lambda w, x: w * x, "pu", torch.ones(3), torch.ones(3))
    weights = [torch.full((3,), float(i)) for i in range(MOVES + 4)]  # all alive: all at other addresses
    for w in weights:
        x = torch.randn(3)
        assert torch.equal(run([w, x])[0], w * x)
    assert device.did["run"] == 1 and device.did["replay"] == len(weights) - 1
    assert device.did["capture"] == 1 + MOVES
    assert run.own.keys() == {0, 1}


def test_state_is_copied_only_when_it_is_another() -> None:
    run, _ = played(lambda s, x: s * x, "su", torch.ones(3), torch.ones(3))
    x, states = torch.ones(3), [torch.full((3,), float(i)) for i in range(6)]
    for s in states:
        assert torch.equal(run([s, x])[0], s)
    filled = run.own[0]
    filled.fill_(7.0)  # would be overwritten if it were copied again
    assert torch.equal(run([states[-1], x])[0], filled)
    assert torch.equal(run([states[0], x])[0], states[0])


def test_an_input_that_is_a_result_comes_back_itself() -> None:
    run, _ = played(lambda w, x: (x, w, w * x), "pu", torch.ones(3), torch.ones(3))
    for _ in range(3):
        w, x = torch.ones(3), torch.randn(3)
        a, b, _c = run([w, x])
        assert a is x and b is w


def test_expanded_inputs() -> None:
    wide = torch.randn(1, 3).expand(4, 3)
    run, _ = played(lambda x: x * 2, "u", wide)
    for _ in range(3):
        x = torch.randn(1, 3).expand(4, 3)
        assert torch.equal(run([x])[0], x * 2)
        assert torch.equal(run([torch.randn(4, 3).fill_(2)[:1].expand(4, 3)])[0], torch.full((4, 3), 4.0))


def test_numbers_on_the_cpu_are_read_anew_by_every_replay() -> None:
    there, here = torch.device("meta"), torch.device("cpu")
    with FakeTensorMode():
        number, rows = torch.empty(()), torch.empty(3, device=there)
    p = graph_of((ATEN.mul.Tensor, (2,), number), inputs=[number, rows])
    t, x = p.placeholders
    (double,) = p.graph.find_nodes(op="call_function", target=ATEN.mul.Tensor)
    with p.graph.inserting_before(p.graph.output_node()):
        cast = p.graph.call_function(ATEN._to_copy.default, (double,), {"device": here})
        result = p.graph.call_function(ATEN.mul.Tensor, (x, cast))
    cast.meta["val"], result.meta["val"] = number, rows
    assert scalars_on(p, there) == [0]
    assert [n.meta["val"].device for n in (t, x, double, cast, result)] == [there] * 5
    assert cast.kwargs["device"] == there
    run, device = played(lambda x, t: x * t, "uu", torch.ones(3), torch.ones(()), moved=[1])
    for i in range(4):
        assert torch.equal(run([torch.ones(3), torch.tensor(float(i))])[0], torch.full((3,), float(i)))


def test_where_capturing_fails_the_program_runs_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    run, device = played(lambda x: x + 1, "u", torch.ones(3))
    device.refuses = "operation not permitted when stream is capturing\nmore"
    with caplog.at_level(logging.WARNING, "fastpar"):
        for _ in range(4):
            x = torch.randn(3)
            assert torch.equal(run([x])[0], x + 1)
    assert [r.message for r in caplog.records] == [
        "'step' is not captured as a CUDA graph: operation not permitted when stream is capturing"
    ]
    assert device.did == {"run": 1}


# -- why not --------------------------------------------------------------------------------------


def fake(*shape: int, device: str = "cuda") -> Any:
    """A fake tensor that says it is on that device, with or without such a device."""
    with FakeTensorMode():
        value = torch.empty(shape, device="meta" if device == "cuda" else device)
    return _On(value, device)


class _On(torch.Tensor):
    """Only its place is asked for."""

    @staticmethod
    def __new__(cls, value: Tensor, device: str) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=device)

    def __init__(self, value: Tensor, device: str) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def graph_of(*nodes: tuple[Any, Any, Any], inputs: Sequence[Any]) -> Program:
    """Placeholders with these values, all of them read, and (operator, further arguments, value) on the first one."""
    graph = torch.fx.Graph()
    given = []
    for i, value in enumerate(inputs):
        node = graph.placeholder(f"x{i}")
        node.meta["val"] = value
        given.append(node)
    for target, args, value in nodes:
        node = graph.call_function(target, (given[0], *args))
        node.meta["val"] = value
    graph.output(tuple(given))
    kinds = tuple(Input(f"x{i}", "user") for i in range(len(inputs)))
    return Program(torch.fx.GraphModule(nn.Module(), graph), kinds)


ATEN = torch.ops.aten
OBSTACLES = [
    ([], [fake(2, device="cpu")], "its inputs are not on a GPU"),
    ([], [fake(2), 3], "input 'x1' is a Python number, which a captured graph would keep; pass it as a tensor"),
    ([], [fake(2), fake(2, device="cpu")], "input 'x1' is on cpu; move it to the GPU"),
    ([(ATEN._local_scalar_dense.default, (), None)], [fake(2)], "gives what depends on values"),
    ([(ATEN.nonzero.default, (), fake(2))], [fake(2)], "gives what depends on values"),
    ([(ATEN._to_copy.default, (), fake(2, device="cpu"))], [fake(2)], "brings a tensor to the CPU"),
    ([(torch.ops._c10d_functional.all_reduce.default, ("sum", "slow"), fake(2))], [fake(2)],
     "runs over a group of backend 'gloo'; only those of nccl, emulate, fake can be captured"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "inputs", "reason"), OBSTACLES, ids=[r[:30] for _, _, r in OBSTACLES])
def test_reasons(nodes: Any, inputs: Any, reason: str) -> None:
    found = obstacle(graph_of(*nodes, inputs=inputs), lambda name: {"slow": "gloo", "fast": "nccl"}[name])
    assert found is not None and reason in found


@pytest.mark.parametrize(("asked", "found"), [("emulate", "emulate"), ("cpu:gloo,cuda:fake", "fake"), ("gloo", "gloo")])
def test_backends_of_groups(asked: str, found: str) -> None:
    """What torch calls a group's backend, however it was asked for."""
    if asked == "emulate":
        fastpar.emulate.start("h100-8", ranks=2)
    else:
        dist.init_process_group(asked, store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert obstacles._backend_of(dist.group.WORLD.group_name) == found
        assert (found in obstacles.CAPTURABLE) == (found != "gloo")
    finally:
        dist.destroy_process_group()


def test_nothing_stands_against_a_plain_program() -> None:
    reduce = (torch.ops._c10d_functional.all_reduce.default, ("sum", "fast"), fake(2))
    nodes = [reduce, (ATEN.add.Tensor, (1,), fake(2))]
    assert obstacle(graph_of(*nodes, inputs=[fake(2), fake(3)]), lambda name: "nccl") is None


def test_on_the_cpu_the_reason_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model = denoiser()
    run = torch.compile(model, backend="fastpar", options={"plan": "ulysses=1", "cudagraphs": True})
    with caplog.at_level(logging.WARNING, "fastpar"), torch.no_grad():
        args = (*sample(), prompt(0))
        assert torch.allclose(run(*args), model(*args))
    assert "'step' is not captured as a CUDA graph: its inputs are not on a GPU" in caplog.text


# -- with all that is around it -------------------------------------------------------------------


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Played]]:
    """The backend captures, on devices that are played."""
    found: list[Played] = []

    def make(device: torch.device) -> Played:
        found.append(Played())
        return found[-1]

    monkeypatch.setattr(capturing_module, "obstacle", lambda program: None)
    import fastpar.backend as backend

    monkeypatch.setattr(backend, "capturing", lambda c, device, timeout: capturing(c, device, timeout, make))
    yield found


@pytest.fixture
def watched(made: list[Artefact], devices: list[Played]) -> Watched:
    found = Watched(denoiser(), made, cudagraphs=True)
    found(*sample(), prompt(99))
    return found


def test_a_sampler_with_hoisted_values(watched: Watched, devices: list[Played]) -> None:
    """Two prompts in turn, then new ones: state comes from other places, results stay right, steps are replayed."""
    for generation in range(4):
        one, other = prompt(2 * generation), prompt(2 * generation + 1)
        for _ in range(5):
            watched(*sample(), one)
            watched(*sample(), other)
    assert sum(d.did["run"] for d in devices) == 3  # prologue, check and step, once each
    assert sum(d.did["replay"] for d in devices) > 80


def test_weights_written_to_and_replaced(watched: Watched, devices: list[Played]) -> None:
    p = prompt(0)
    for i in range(6):
        watched(*sample(), p)
        with torch.no_grad():
            watched.model.caption.weight.data.mul_(1.1)  # read by the prologue
            watched.model.out[0].weight.data.mul_(1.1)  # read by every step
            if i == 3:
                watched.model.q[0].weight.data = watched.model.q[0].weight.data.clone() * 1.5


def test_another_shape_is_another_program(watched: Watched, devices: list[Played]) -> None:
    before = len(devices)
    for rows in (9, 7, 9, 7, 9, 7):
        watched(*sample(rows), prompt(rows))
    assert len(devices) == 2 * before
    assert all(d.did["capture"] >= 1 for d in devices if d.did["run"] and d.did["replay"])


def test_released_graphs_are_captured_again() -> None:
    run, device = played(lambda x: x + 1, "u", torch.ones(3), talks=True)
    quiet, _ = played(lambda x: x - 1, "u", torch.ones(3))
    for _ in range(3):
        run([torch.ones(3)]), quiet([torch.ones(3)])
    assert release(talking=True) == 1 and run.replay is None and quiet.replay is not None
    x = torch.randn(3)
    assert torch.equal(run([x])[0], x + 1)
    assert device.did == {"run": 1, "capture": 2, "replay": 3, "launched": 3}
    del run, quiet
    release()


def test_graphs_go_before_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: order.append(f"destroy {group}"))
    monkeypatch.setattr(dist.distributed_c10d, "destroy_process_group", dist.destroy_process_group)
    monkeypatch.setattr(capturing_module, "release", lambda talking: order.append("release"))
    capturing_module.release_before_destroy()
    capturing_module.release_before_destroy()  # wraps once
    dist.destroy_process_group("mine")  # type: ignore[arg-type]
    dist.distributed_c10d.destroy_process_group()
    assert order == ["release", "destroy mine", "release", "destroy None"]


# -- the watch ------------------------------------------------------------------------------------


class Event:
    def __init__(self, done: bool = False) -> None:
        self.done = done

    def query(self) -> bool:
        return self.done


def test_a_replay_that_does_not_end_is_told() -> None:
    told: list[tuple[str, float]] = []
    came = threading.Event()

    def late(what: str, seconds: float) -> None:
        told.append((what, seconds))
        came.set()

    watch = Watch(0.2, late, pause=0.01)
    done = [Event(True), Event()]
    watch.add(done[0], "first")
    watch.add(done[1], "second")
    assert came.wait(20)
    assert told == [("second", 0.2)]


def test_steps_that_queue_up_have_the_limit_each() -> None:
    told: list[Any] = []
    watch = Watch(1.0, lambda *late: told.append(late), pause=0.01)
    events = [Event() for _ in range(6)]
    for event in events:
        watch.add(event, "step")
    for event in events:  # 1.8 s in all, 0.3 s each
        time.sleep(0.3)
        event.done = True
    time.sleep(0.3)
    assert not told


def test_nothing_stays_alive() -> None:
    run, _ = played(lambda x: x + 1, "u", torch.ones(3))
    count = len(captured_module._alive)
    del run
    assert len(captured_module._alive) <= count - 1


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_on_the_gpu(lowering: str) -> None:
    torch._dynamo.reset()
    model = denoiser().float().cuda()
    options = {"plan": "ulysses=1", "lowering": lowering, "cudagraphs": True}
    run = torch.compile(model, backend="fastpar", options=options)
    kept = []
    with torch.no_grad():
        for step in range(12):
            if step % 4 == 0:
                p = prompt(step).float().cuda()
            if step == 6:
                model.out[0].weight.data.mul_(1.5)  # leaves no trace on the tensor
            x, t = (value.float() for value in sample())
            expected = model(x.cuda(), t.cuda(), p)
            kept.append((run(x.cuda(), t.cuda(), p), expected))
    for found, expected in kept:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sum(c.replay is not None for c in captured_module._alive) >= 2  # check and step
    assert release() >= 2


@pytest.mark.gpu
def test_a_replayed_step_is_few_launches() -> None:
    torch._dynamo.reset()
    model = denoiser().float().cuda()
    run = torch.compile(model, backend="fastpar", options={"plan": "ulysses=1", "cudagraphs": True})
    p = prompt(0).float().cuda()
    with torch.no_grad():
        for _ in range(4):
            x, t = (value.float().cuda() for value in sample())
            run(x, t, p)
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            run(x, t, p)
            torch.cuda.synchronize()
    launched = Counter(e.name for e in profile.events() if "Launch" in e.name)
    assert launched["cudaGraphLaunch"] == 2, launched  # check and step
    assert sum(launched.values()) <= 12, launched  # copies in and out, the comparison of checksums
    release()


@pytest.mark.gpu
def test_a_number_on_the_cpu_is_read_anew() -> None:
    torch._dynamo.reset()
    model = nn.Linear(4, 4).cuda().requires_grad_(False)
    options = {"plan": "ulysses=1", "cudagraphs": True}
    run = torch.compile(lambda x, t: model(x) * t.sin(), backend="fastpar", options=options)
    with torch.no_grad():
        for step in range(5):
            x, t = torch.randn(2, 4, device="cuda"), torch.tensor(float(step))
            torch.testing.assert_close(run(x, t), model(x) * t.sin())
    release()
