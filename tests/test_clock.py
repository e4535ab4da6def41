"""The virtual clock: links that are shared, ranks that are slower, whole generations, and how all that is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastpar
from fastpar.core.errors import CheckError, OptionError
from fastpar.core.plan import Plan
from fastpar.graph.prologue import split
from fastpar.plan import clock
from fastpar.plan.engine import Engine, Op, Start, Wait
from fastpar.plan.expand import pipeline_text
from fastpar.plan.generation import generation
from fastpar.plan.links import Link, Load, load, speeds
from fastpar.plan.picture import BETWEEN, COLOURS, GAP, LATE, MARGIN, ROW, WIDTH, draw
from fastpar.plan.predict import predict
from fastpar.plan.timeline import COMMUNICATION, COMPUTE, WAIT, Timeline
from fastpar.plan.topology import Device, Level, Topology
from fastpar.plan.topology import load as topology_of
from fastpar.plan.trace import chrome_trace, trace_text
from fastpar.plan.workload import workload
from fastpar.run.build import build
from tests.test_cfg import Block, inputs
from tests.test_hoist import denoiser, prompt, sample
from tests.test_planner import PLANS, slower

torch.set_num_threads(1)

GB = 1e9
LATENCY = 0.25


def machine(*levels: tuple[int, float], latency: float = 0.0) -> Topology:
    """(members, GB/s) of each level, from the inside out."""
    made = tuple(Level(f"level {i}", n, speed * GB, latency, 1.0) for i, (n, speed) in enumerate(levels))
    return Topology("box", "", Device("card", 1e12, 1e12, 1e9), made)


BOX = machine((4, 1.0))


def exchange(number: int, axes: str, sends: dict[tuple[int, int], float], box: Topology = BOX) -> dict[int, Start]:
    """What each rank comes to: an exchange in which (from, to) send so many GB."""
    group = tuple(sorted({rank for pair in sends for rank in pair}))
    src, dst = np.array(list(sends)).T
    found = load(box, (src, dst, GB * np.array(list(sends.values()))))
    return {r: Start(number, group, axes, found, "exchange", "model.py:1", int(GB)) for r in group}


def play(call: list[list[Any]], box: Topology = BOX, calls: int = 1, **options: Any) -> Timeline:
    slow = options.pop("slowdown", {})
    factors = [slow.get(r, 1.0) for r in range(len(call))]
    return Engine([call] * calls, [level.bandwidth for level in box.levels], factors, **options).run()


def spans(line: Timeline, stream: str, axes: str = "") -> list[tuple[float, ...]]:
    """(rank, start, end) of the events of a stream."""
    found = [e for e in line.events if e.stream == stream and (not axes or e.axes == axes)]
    return [(e.rank, pytest.approx(e.start), pytest.approx(e.end)) for e in found]


# -- links that are shared ------------------------------------------------------------------------


def several(*exchanges: dict[int, Start], ranks: int = 4) -> list[list[Any]]:
    """Every rank starts all exchanges that it is in, and then waits for all."""
    call: list[list[Any]] = []
    for rank in range(ranks):
        own = [e[rank] for e in exchanges if rank in e]
        call.append([*own, *(Wait(s.number) for s in own)])
    return call


def test_two_exchanges_over_one_link_take_twice_as_long() -> None:
    line = play(several(exchange(0, "a", {(0, 1): 1}), exchange(1, "b", {(0, 2): 1})))
    assert line.seconds == pytest.approx(2)
    assert spans(line, COMMUNICATION) == [(0, 0, 2), (0, 0, 2), (1, 0, 2), (2, 0, 2)]


def test_over_two_links_they_do_not() -> None:
    """Neither by other devices, nor in the other direction."""
    assert play(several(exchange(0, "a", {(0, 1): 1}), exchange(1, "b", {(2, 3): 1}))).seconds == pytest.approx(1)
    assert play(several(exchange(0, "a", {(0, 1): 1}), exchange(1, "b", {(1, 0): 1}))).seconds == pytest.approx(1)


def test_what_one_leaves_the_other_gets() -> None:
    """1 GB and 2 GB share a link until the first is through, at 2 s; the rest of the second then has it alone."""
    line = play(several(exchange(0, "a", {(0, 1): 1}), exchange(1, "b", {(0, 2): 2})))
    assert spans(line, COMMUNICATION, "a")[0] == (0, 0, 2)
    assert spans(line, COMMUNICATION, "b")[0] == (0, 0, 3)


def test_one_that_comes_later_slows_down_what_is_under_way() -> None:
    """1 s alone, then both at half speed: 2 GB end at 3 s with 1 GB that came at 1 s."""
    first, second = exchange(0, "a", {(0, 1): 2}), exchange(1, "b", {(0, 2): 1})
    op = Op(1, "op")
    line = play([[first[0], op, second[0], Wait(0), Wait(1)], [first[1], Wait(0)], [op, second[2], Wait(1)]])
    assert spans(line, COMMUNICATION, "a")[0] == (0, 0, 3) and spans(line, COMMUNICATION, "b")[0] == (0, 1, 3)


def test_a_latency_takes_nothing_of_a_link() -> None:
    box = machine((4, 1.0), latency=LATENCY)
    line = play(several(exchange(0, "a", {(0, 1): 1}, box), exchange(1, "b", {(0, 2): 1}, box)), box)
    assert line.seconds == pytest.approx(2 + LATENCY)


def test_exchanges_over_the_same_axes_come_one_after_the_other() -> None:
    line = play(several(exchange(0, "a", {(0, 1): 1}), exchange(1, "a", {(0, 1): 1})))
    assert spans(line, COMMUNICATION)[:2] == [(0, 0, 1), (0, 1, 2)]


def test_groups_share_a_machines_link() -> None:
    """Two pairs between machines, each pair a group: the link between is halved; a pair inside is not."""
    box = machine((2, 10.0), (2, 1.0))
    pairs = [exchange(0, "a", {pair: 1}, box) for pair in ((0, 2), (1, 3))]
    assert play(several(*pairs), box).seconds == pytest.approx(2)
    inside = exchange(1, "b", {(0, 1): 1}, box)
    line = play(several(*pairs, inside), box)
    assert line.seconds == pytest.approx(2) and spans(line, COMMUNICATION, "b")[0] == (0, 0, pytest.approx(1 / 9.5))


def test_who_needs_less_than_an_equal_share_leaves_the_rest() -> None:
    """The textbook's case: the tightest link is shared first, and what its flows cannot use goes to others."""
    one, two = (0, 0, True), (1, 0, True)
    a, b = Load(0, 1, {one: 1.0}), Load(0, 1, {one: 1.0, two: 0.1})
    c, d = Load(0, 1, {two: 1.0}), Load(0, 1, {two: 1.0})
    assert speeds([a, b, c, d], [1.0, 10.0]) == pytest.approx([0.5, 0.5, 0.475, 0.475])
    assert speeds([a, c], [1.0, 10.0]) == [1.0, 1.0]


_loads = st.lists(
    st.dictionaries(st.tuples(st.integers(0, 1), st.integers(0, 2), st.booleans()), st.floats(0.01, 1), min_size=1),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(_loads)
def test_no_link_carries_more_than_it_can_and_none_of_its_users_could_have_more(found: list[dict[Link, float]]) -> None:
    loads = [Load(0, 1, {link: x / max(links.values()) for link, x in links.items()}) for links in found]
    got = speeds(loads, [1.0, 3.0])
    assert all(0 < s <= 1 for s in got)
    used: dict[Link, float] = {}
    for s, one in zip(got, loads, strict=True):
        for link, share in one.links.items():
            used[link] = used.get(link, 0) + s * share
    assert all(total <= 1 + 1e-6 for total in used.values())
    assert max(used.values()) >= 1 - 1e-6  # somebody's busiest link is busy


# -- ranks that are slower ------------------------------------------------------------------------


def pair(seconds: float = 1.0) -> list[list[Any]]:
    """Two ranks that compute, exchange 1 GB and wait for it."""
    both = exchange(0, "a", {(0, 1): 1, (1, 0): 1})
    return [[Op(seconds, "op"), both[r], Wait(0)] for r in (0, 1)]


def test_others_wait_for_a_straggler() -> None:
    """A factor of 2: rank 0 waits a second for rank 1 to come, and one for the exchange."""
    line = play(pair(), slowdown={1: 2.0})
    assert line.seconds == pytest.approx(3)
    waits = [(e.rank, e.start, e.end, e.late, e.name) for e in line.events if e.stream == WAIT]
    assert waits == [(0, 1, 2, 1, "wait for rank 1"), (0, 2, 3, -1, "wait"), (1, 2, 3, -1, "wait")]


def test_ranks_flow_from_call_to_call() -> None:
    """No barrier between calls: a rank that is slower computes on while the other has long begun the next call."""
    call = [[*rank, Op(1, "after")] for rank in pair()]
    line = play(call, calls=2, slowdown={1: 2.0})
    assert line.calls == pytest.approx([5, 10]) and line.seconds == pytest.approx(10)
    second = [e.start for e in line.events if e.rank == 0 and e.name == "op"]
    assert second == pytest.approx([0, 4])


def test_jitter_is_seeded() -> None:
    plain, first, again, other = (play(pair(), jitter=j, seed=s) for j, s in ((0, 0), (0.5, 1), (0.5, 1), (0.5, 2)))
    assert first == again and first != other
    assert plain.seconds < first.seconds < 1.5 + 1


def test_ranks_that_come_to_other_exchanges_are_an_error() -> None:
    both = exchange(0, "a", {(0, 1): 1})
    with pytest.raises(CheckError, match="never reach: number 0 of call 0, over a among ranks .0, 1.; missing: 1"):
        play([[both[0], Wait(0)], []])


# -- programs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block().double().eval(), inputs(2))


def programs_of(captured: fastpar.Captured, plan: str, **options: Any) -> list[Any]:
    own = build(captured.programs[0].program, plan, **options)
    return [own.localise(r) for r in range(own.mesh.ranks)]


@pytest.mark.parametrize("plan", PLANS)
def test_the_clock_and_the_prediction_agree(captured: fastpar.Captured, plan: str) -> None:
    box = topology_of("l40-8")
    line = clock.run(programs_of(captured, plan, passes=pipeline_text(Plan.parse(plan), schedule=False)), box)
    found = predict(workload(captured.programs[0].program), Plan.parse(plan), box)
    assert line.seconds == pytest.approx(found.seconds, rel=0.1)
    assert line.exposed <= 1.01 * line.communication  # a rank may wait for a busier one, too
    assert line.seconds == pytest.approx(line.compute + line.exposed)


def test_worse_links_are_never_faster(captured: fastpar.Captured) -> None:
    programs = programs_of(captured, "ulysses=2,ring=2")
    base = topology_of("h100-8")
    boxes = (base, slower(base, 1e-4), slower(base, 1e-6), slower(base, 1e-6, 50))
    times = [clock.run(programs, box).seconds for box in boxes]
    assert times == sorted(times) and times[-1] > 2 * times[0]
    assert {e.stream for e in clock.run(programs, base).events} == {"compute", "communication", "wait"}


def test_bytes_are_those_that_reports_count(captured: fastpar.Captured) -> None:
    for plan in ("ulysses=4", "gather=3", "tp=2", "torus=2,ring=2"):
        line = clock.run(programs_of(captured, plan), topology_of("h100-8"))
        sent: dict[int, int] = {}
        for e in line.events:
            sent[e.rank] = sent.get(e.rank, 0) + e.bytes
        assert max(sent.values()) == fastpar.explain(captured, plan=plan).bytes_per_rank


def test_exchanges_over_different_axes_are_under_way_at_once(captured: fastpar.Captured) -> None:
    """A torus pulls from the next machine while a ring turns inside; with one link for both nothing is gained."""
    programs = programs_of(captured, "torus=2,ring=2")
    line = clock.run(programs, topology_of("l40-8"))
    own = [e for e in line.events if e.rank == 0 and e.stream == COMMUNICATION]
    assert len({e.axes for e in own}) > 1
    assert any(a.axes != b.axes and a.start < b.end and b.start < a.end for a in own for b in own)
    assert line.exposed <= 1.01 * line.communication


def test_a_slow_rank_slows_down_all(captured: fastpar.Captured) -> None:
    programs, box = programs_of(captured, "ulysses=2"), topology_of("h100-8")
    even, uneven = clock.run(programs, box), clock.run(programs, box, slowdown={1: 3.0})
    assert uneven.seconds > even.seconds + 1.9 * even.compute
    assert {(e.rank, e.late) for e in uneven.events if e.late >= 0} == {(0, 1)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slowdown": {2: 1.5}}, "there is no rank 2; valid: 0 to 1"),
        ({"slowdown": {1: 0.0}}, "a number above 0"),
        ({"jitter": -0.1}, "jitter is a share"),
    ],
)
def test_bad_values_are_named(captured: fastpar.Captured, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        clock.run(programs_of(captured, "ulysses=2"), topology_of("h100-8"), **options)


# -- generations ----------------------------------------------------------------------------------


def test_a_generation_is_its_first_step_and_the_others() -> None:
    """The prologue runs once per stream; with every rank as fast, a step takes what it takes alone."""
    box = topology_of("h100-8")
    programs = programs_of(fastpar.capture(denoiser(refine=True), (*sample(), prompt(0, 64))), "ulysses=2")
    parts = [p for p in map(split, programs) if p is not None]
    once, step = (clock.run([getattr(p, name) for p in parts], box).seconds for name in ("prologue", "step"))
    for streams in (1, 2):
        found = generation(programs, box, steps=5, streams=streams)
        assert found.seconds == pytest.approx(found.first + 4 * found.step)
        assert found.steps[1:] == pytest.approx([found.step] * 4)
        assert len(found.timeline.calls) == 2 * 5 * streams + streams
        check = next(e.end - e.start for e in found.timeline.events if e.name == "check")
        assert found.step == pytest.approx(streams * (check + step))
        assert found.first == pytest.approx(streams * (check + once + step))
    short = generation(programs, box, steps=1)
    assert short.step == short.first == short.seconds


def test_a_generation_without_a_prologue(captured: fastpar.Captured) -> None:
    programs = programs_of(captured, "ulysses=2", passes=pipeline_text(Plan.parse("ulysses=2")).replace(",hoist", ""))
    box = topology_of("h100-8")
    found = generation(programs, box, steps=3, keep=1)
    assert found.seconds == pytest.approx(3 * clock.run(programs, box).seconds)
    assert max(e.end for e in found.timeline.events) == pytest.approx(found.first)
    with pytest.raises(OptionError, match="steps is a whole number above 0, not 0"):
        generation(programs, box, steps=0)


# -- traces and pictures --------------------------------------------------------------------------


def test_a_trace_is_json_and_a_threads_events_do_not_overlap(captured: fastpar.Captured) -> None:
    line = clock.run(programs_of(captured, "torus=2,ring=2"), topology_of("l40-8"), {2: 1.7})
    read = json.loads(trace_text(line))
    assert read == chrome_trace(line)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in read["traceEvents"] if e["name"] == "thread_name"}
    assert {rank for rank, _ in names} == {0, 1, 2, 3}
    assert names[0, 0] == "compute" and names[0, 1].startswith("communication over ")
    threads: dict[tuple[int, int], list[Any]] = {}
    for e in read["traceEvents"]:
        if e["ph"] == "X":
            threads.setdefault((e["pid"], e["tid"]), []).append(e)
    assert set(threads) == set(names) and sum(map(len, threads.values())) == len(line.events)
    for events in threads.values():
        ends = [(round(1e3 * e["ts"]), round(1e3 * (e["ts"] + e["dur"]))) for e in events]
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
    sent = [e for e in read["traceEvents"] if e.get("cat") == COMMUNICATION]
    assert all(e["args"]["bytes"] > 0 and e["args"]["axes"] for e in sent)
    assert any(".py:" in e["args"]["source"] for e in sent)
    assert any(e["args"].get("late") == 2 for e in read["traceEvents"] if e.get("cat") == WAIT)


def test_a_picture_has_every_kind_in_its_colour(tmp_path: Path) -> None:
    """Rank 0 computes for a third of the time, waits a third for rank 1 and a third for the exchange."""
    line = play(pair(), slowdown={1: 2.0})
    draw(line, tmp_path / "new" / "line.png", "two ranks")
    pixels = np.array(Image.open(tmp_path / "new" / "line.png").convert("RGB"))
    left, top = pixels.shape[1] - MARGIN - WIDTH, MARGIN + 50
    own, link = top + ROW // 2, top + ROW + GAP + ROW // 2
    other = top + 2 * (ROW + GAP) + BETWEEN + ROW // 2

    def colours(y: int) -> list[tuple[int, ...]]:
        return [tuple(map(int, pixels[y, left + int(WIDTH * share)])) for share in (0.17, 0.5, 0.83)]

    assert colours(own) == [COLOURS[COMPUTE], COLOURS[LATE], COLOURS[WAIT]]
    assert colours(link)[2] == COLOURS[COMMUNICATION] and colours(link)[0] not in COLOURS.values()
    assert colours(other) == [COLOURS[COMPUTE], COLOURS[COMPUTE], COLOURS[WAIT]]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["line.png"]
    with pytest.raises(OptionError, match="less than end"):
        draw(line, tmp_path / "none.png", begin=2.0, end=2.0)
    assert not (tmp_path / "none.png").exists()
