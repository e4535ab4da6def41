"""``steps``: ranks run the model in every step, in every second one, ... (STADI's step strides). Against an account of
it by hand, on real processes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpar
from fastpar.backends.simulate import PerRank, carried, passed_on, run_interleaved, run_local
from fastpar.core.errors import FastparError, PlanError
from fastpar.core.mesh import Mesh, some
from fastpar.plan.predict import predict
from fastpar.plan.topology import Topology, load
from fastpar.plan.workload import workload
from fastpar.run.build import build
from fastpar.run.meeting import joined, meeting, meetings, members, rows_like
from fastpar.run.strided import Strided
from tests.sampling import alone, by_hand, stepped, time, virtually
from tests.test_displaced import GROUPS, Patches
from tests.test_replicas import torchrun


@pytest.fixture(scope="module")
def patches() -> Patches:
    torch.manual_seed(0)
    return Patches().double().eval().requires_grad_(False)


def noise(rows: int = 10) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 2, rows, 6).double()


TIMES = [1.0, 0.9, 0.8, 0.66, 0.5, 0.41, 0.3, 0.2, 0.1, 0.0]


@pytest.mark.parametrize("gn", ["corrected", "stale", "separate"])
@pytest.mark.parametrize(
    "plan, parts, strides",
    [("gather=2", (5, 5), (1, 2)), ("gather=3", (4, 4, 4), (2, 1, 4)), ("gather=3,speeds(1:2:2)", (2, 4, 4), (3, 2, 1)),
     ("gather=2", (5, 5), (1, 1)), ("gather=2", (5, 5), (3, 3))],  # fmt: skip
)
def test_as_by_hand(patches: Patches, gn: str, plan: str, parts: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x = noise(sum(parts))
    text = f"{plan},displaced(warmup=2,gn={gn}),steps({':'.join(map(str, strides))})"
    views = virtually(patches, text, x, TIMES)
    expected = by_hand(patches, x, TIMES, parts, strides, 2, gn, GROUPS)
    assert all(torch.equal(view, views[0]) for view in views)
    assert float((views[0] - expected).abs().max()) < 1e-12
    assert 1e-5 < float((views[0] - alone(patches, x, TIMES)).abs().max()) < 0.5


def test_euler_jumps_over_the_steps_between(patches: Patches) -> None:
    """One rank with a stride of 3 samples as one that steps over three steps at once, behind the warm-up."""
    jumping = [TIMES[0], TIMES[1], TIMES[4], TIMES[7], TIMES[9]]
    [view] = virtually(patches, "gather=1,displaced(warmup=1),steps(3)", noise(), TIMES)
    assert float((view - alone(patches, noise(), jumping)).abs().max()) < 1e-12


def test_strides_of_one_are_a_step_late_and_no_more(patches: Patches) -> None:
    """But for the latents' first rows of others, which are put together in every step."""
    late, strided = (virtually(patches, f"gather=2,displaced(warmup=2){more}", noise(), TIMES)[0]
                     for more in ("", ",steps(1:1)"))  # fmt: skip
    assert float((late - strided).abs().max()) < 1e-12


def test_who_meets() -> None:
    assert [members((1, 2, 4), step) for step in range(4)] == [(0, 1, 2), (0,), (0, 1), (0,)]
    assert meetings((2, 3)) == [(0, 1), (0,), (1,)]
    mesh = Mesh((("cfg", 2), ("gather", 3)), strides=(1, 2, 2) * 2)
    assert mesh.group(4, (some("gather", (1, 2)),)) == (4, 5) and Mesh.parse(str(mesh)) == mesh
    # the first rank sends its share to two that it meets in every second step
    assert (mesh.met(("gather",)), mesh.met(("cfg", "gather")), mesh.met(("cfg",))) == (0.5, 0.6, 1)


@pytest.mark.parametrize("plan", ["gather=2", "cfg=2,gather=2", "gather=2,tp=2", "gather=3,speeds(1:2:3)"])
def test_messages_are_waited_for_where_they_are_needed(patches: Patches, plan: str) -> None:
    """Those of all ranks travel while the model's first layers run; in random interleavings as in lock step."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 12, 6).double()
    recorded = fastpar.capture(patches, (x, time(1.0, 2))).programs[0]
    strides = "1:2:2" if "3" in plan else "1:2"
    built = build(recorded.program, f"{plan},displaced,steps({strides})")
    assert built.first is not None
    ranks = range(built.mesh.ranks)
    first = run_local([built.first.localise(r) for r in ranks], recorded.args)
    who = meetings(built.plan.steps)[0]
    steady = [built.localise(r) for r in ranks]
    programs = [joined(meeting(built.lowered, built.mesh, r, who, wait=False), steady[r]) for r in ranks]
    for program in programs:
        names = [str(node.target) for node in program.graph.nodes]
        products = [i for i, name in enumerate(names) if "convolution" in name or "attention" in name]
        waits = [i for i, name in enumerate(names) if "wait_tensor" in name]
        assert min(products) < min(waits) and max(waits) > products[-2]
    together = run_local(steady, [*recorded.args, *passed_on(built.lowered, first)])
    count = sum(bool(node.meta.get("came")) for node in built.lowered.placeholders)
    for seed in range(4):
        kept = [PerRank(tuple(x.clone() for x in one.values)) for one in carried(built.first.lowered, first)]
        args = [*kept[:count], *kept[:count], *recorded.args, *kept[count:]]  # what came before is not looked at
        found = run_interleaved(programs, args, seed) if seed else run_local(programs, args)
        for mine, others in zip(found, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


# -- reports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, part", [("gather=2,displaced,steps(1:2)", 0.5), ("gather=2,displaced,steps(2:2)", 0.5),
                   ("gather=4,displaced,steps(1:1:2:2)", 2 / 3), ("cfg=2,gather=2,displaced,steps(2:1)", None)],
)  # fmt: skip
def test_figures_are_means_over_a_cycle(patches: Patches, plan: str, part: float | None) -> None:
    batch = 2 if "cfg" in plan else 1
    inputs = (torch.zeros(batch, 2, 16, 6).double(), time(1.0, batch))
    every, some = (fastpar.explain(patches, inputs, plan=text) for text in (plan[: plan.index(",steps")], plan))
    assert some.flops_share <= 1.001 * some.attainable_share
    assert some.flops_share == pytest.approx(every.flops_share / (2 if "2:2)" in plan and "1" not in plan else 1))
    if part is not None:
        assert some.bytes_per_rank <= 1.07 * some.bytes_formula
        assert some.bytes_formula == pytest.approx(part * every.bytes_formula, rel=0.02)
    assert every.carried_bytes < some.carried_bytes <= 2 * every.carried_bytes


def uneven() -> Topology:
    """A machine of two devices, the second of which has half the speed."""
    return replace(load("l40-8"), speeds=(1.0, 0.5) * 4)


def test_a_slow_device_steps_over_steps() -> None:
    """Computing alone: 1, 2/3 and 1/2 of what the fast one takes for everything."""
    with FakeTensorMode():  # so many tokens are not to be attended here
        model, given = Patches().eval().requires_grad_(False), (torch.zeros(1, 2, 480, 480), torch.ones(1, 1))
    captured = fastpar.capture(model, given)
    program = captured.programs[0].program
    work, box = workload(program), uneven()
    even, elastic, strided = (
        predict(work, build(program, f"gather=2,displaced{more}").plan, box).compute
        for more in ("", ",speeds(1:0.5)", ",steps(1:2)")
    )
    assert strided == pytest.approx(0.5 * even, rel=0.02) and elastic == pytest.approx(even * 2 / 3, rel=0.02)
    runs = [
        fastpar.explain(captured, plan=f"gather=2,displaced(warmup=2){more}", topology=box, steps=10)  # type: ignore[arg-type]
        for more in ("", ",speeds(1:0.5)", ",steps(1:2)")
    ]
    even, elastic, strided = (run.generation["seconds"] for run in runs)
    assert strided < elastic < even


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, said",
    [(lambda conv, x: conv(conv(x).roll(5, 2)), "rows move on to other ranks"),
     (lambda conv, x: conv(conv(x).softmax(2)), "extremes of different steps do not go together")],
)  # fmt: skip
def test_models_whose_rows_move_on_or_are_scaled_together(model: Any, said: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)
    with pytest.raises(PlanError, match=f"{said}.*test_strided.py.*leave 'steps' out"):
        fastpar.explain(lambda x: model(conv, x), (noise(),), plan="gather=2,displaced,steps(1:2)")


def test_rows_are_cut_where_none_has_to_move_on() -> None:
    """Rows that are halved and doubled: 14 on 3 ranks are 5, 5 and 4, and 6, 4 and 4 where these have strides."""
    torch.manual_seed(0)
    half, same = nn.Conv2d(2, 2, 3, 2, 1).double(), nn.Conv2d(2, 2, 3, padding=1).double()

    def down_and_up(x: Tensor) -> Tensor:
        return x + nn.functional.interpolate(same(half(x)), scale_factor=2.0)

    x = torch.randn(1, 2, 14, 6).double()
    for plan in ("gather=3,displaced,steps(1:2:1)", "gather=3,displaced"):
        report = fastpar.verify(down_and_up, (x,), plan=plan)
        assert report.ok, (report.notes, report.diverged_at)


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="fastpar", options={"plan": "gather=1,displaced(warmup=1),steps(2)"})


@torch.no_grad()
def test_a_run_that_ends_without_putting_latents_together(patches: Patches) -> None:
    model = compiled(patches)
    with pytest.raises(FastparError, match="ended with other latents on every rank"), fastpar.generation():
        for _ in range(3):
            model(noise(), time(1.0))
    with fastpar.generation() as run:
        outs = [model(noise(), time(t)) for t in (1.0, 0.5, 0.2, 0.1)]
        assert run.gather(noise(), now=True).shape == noise().shape
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2]) and not torch.equal(outs[2], outs[3])  # behind the warm-up, two by two


@torch.no_grad()
def test_outputs_are_the_callers(patches: Patches) -> None:
    """What it writes into them does not come back in the step between."""
    model = compiled(patches)
    with fastpar.generation() as run:
        outs = []
        for t in (1.0, 0.5, 0.2):
            out = model(noise(), time(t))
            outs.append(out.clone())
            out.zero_()
        run.gather(noise(), now=True)
    assert torch.equal(outs[1], outs[2]) and outs[2].abs().max() > 0


@torch.no_grad()
def test_a_call_that_fails_ends_the_run(patches: Patches) -> None:
    model = compiled(patches)
    given = patches.outward.forward
    with fastpar.generation() as run:
        x = stepped(noise(), model(noise(), time(1.0)), 1.0, 0.5)
        def fails(args: Any) -> Any:
            raise RuntimeError("on purpose")

        [runner] = [r for r in run._kept if isinstance(r, Strided)]
        steady, runner.steady = runner.steady, fails
        with pytest.raises(RuntimeError, match="on purpose"):
            model(x, time(0.5))
        runner.steady = steady
        with pytest.raises(FastparError, match="begin another with fastpar.generation"):
            model(x.clone(), time(0.5))
    assert patches.outward.forward == given


def test_latents_of_another_form() -> None:
    rows = [None, ("[2, 4, 8@gather(4*2), 6]", "[2, 4, 8, 6]")]
    src, dst = rows_like(rows, (1, 9, 8, 6))
    assert str(src) == "[1, 9, 8@gather(4*2), 6]" and dst.is_whole
    for shape in ((1, 4, 9, 6), (1, 4, 48)):
        with pytest.raises(PlanError, match=r"have no rows of the model's output, which is \[2, 4, 8, 6\]"):
            rows_like(rows, shape)


# -- processes --------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_on_two_processes() -> None:
    plans = ["gather=2,displaced(warmup=2),steps(1:2)", "gather=2,displaced(warmup=1),steps(3:2)+stops",
             "gather=2,displaced(warmup=1),steps(2:1)+inductor"]  # fmt: skip
    assert torchrun(*plans, script="tests.scripts.strided", ranks=2).count("from virtual ranks") == 2 * len(plans)


@pytest.mark.distributed
def test_on_three_processes() -> None:
    """Some of an axis's ranks meet, and have a process group of their own."""
    plans = ["gather=3,displaced(warmup=1),steps(1:2:1),speeds(2:1:2)"]
    assert torchrun(*plans, script="tests.scripts.strided", ranks=3).count("from virtual ranks") == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_on_four_processes() -> None:
    """Three kinds of meetings, calls that are dealt, columns of weights, one plan behind the other."""
    plans = ["gather=4,displaced(warmup=1),steps(1:1:2:4)", "cfg=2,gather=2,displaced(warmup=2),steps(1:2)+dealt",
             "gather=2,tp=2,displaced(warmup=2),steps(2:1)",
             "gather=4,displaced(warmup=1),steps(3:2:2:1)+stops"]  # fmt: skip
    assert torchrun(*plans, script="tests.scripts.strided", ranks=4).count("from virtual ranks") == 4 * len(plans)
