"""One-sided communication: slots, credits and epochs, in interleavings of virtual ranks; what must be noticed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpar
from fastpar.backends.onesided import rewrite as rewriting
from fastpar.backends.onesided import skeleton
from fastpar.backends.onesided.order import SPARE, Order, choose, credits
from fastpar.backends.onesided.rewrite import said
from fastpar.backends.onesided.slots import PUT, READ, Slots, Traffic, assign
from fastpar.backends.simulate import run_calls, run_local
from fastpar.backends.simulate.sided import Heaps, Message
from fastpar.core.errors import CheckError, OptionError
from fastpar.core.plan import Plan
from fastpar.graph.program import Program
from fastpar.graph.prologue import split
from fastpar.ops.onesided import put
from fastpar.plan.expand import pipeline_text
from fastpar.run import onesided as running
from tests.onesided import Overwritten, dropped, other, same, sided, walk, without_credits
from tests.test_cfg import Block, inputs
from tests.test_hoist import denoiser, prompt, sample
from tests.test_schedule import PLANS, Two, built

torch.set_num_threads(1)

SEEDS = 6


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block().double().eval(), inputs(2))


def survives(programs: Sequence[Program], calls: Sequence[Any], expected: Sequence[Any], seeds: int = SEEDS) -> bool:
    """Whether in every interleaving every call gives the expected bits."""
    try:
        return all(
            same(found, wanted)
            for seed in range(seeds)
            for found, wanted in zip(run_calls(programs, calls, seed), expected, strict=True)
        )
    except CheckError:
        return False


# -- every plan -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*PLANS, "ring=4", "ulysses=4", "torus=3"])
def test_every_plan_keeps_its_bits_in_every_interleaving(captured: fastpar.Captured, plan: str) -> None:
    programs, one_sided, _ = sided(built(captured, plan), spare=len(plan) % 2 * SPARE)
    args = captured.programs[0].args
    calls = [args, other(args), args]
    expected = [run_local(programs, call) for call in calls]
    assert not torch.equal(expected[0][0][0], expected[1][0][0])
    assert survives(one_sided, calls, expected)
    targets = {str(n.target) for p in one_sided for n in p.graph.nodes}
    assert not any("_c10d_functional" in name for name in targets)


@pytest.mark.parametrize("whole", [0, 1 << 30])
@pytest.mark.parametrize("plan", ["tp=3", "tp=2,ulysses=2"])
def test_sums_in_two_halves_and_in_one(plan: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way all ranks have the bits of lock step, which sums in rank order; pieces need not be equal."""
    torch.manual_seed(0)
    captured = fastpar.capture(Two().double().eval(), (torch.randn(1, 11, 16).double(),))
    monkeypatch.setattr(skeleton, "WHOLE", whole)
    programs, one_sided, heaps = sided(built(captured, plan))
    halves = sum(phase for _, phase in heaps["step"].keys)
    assert (halves > 0) == (whole == 0 and plan == "tp=3")  # of two ranks one half is as many bytes
    args = captured.programs[0].args
    assert survives(one_sided, [args, other(args)], [run_local(programs, a) for a in (args, other(args))])


def test_what_is_hoisted_has_a_heap_of_its_own() -> None:
    model = denoiser(refine=True)
    x, t = sample()
    captured = fastpar.capture(model, (x, t, prompt(0)))
    programs, one_sided, heaps = sided(built(captured, "ulysses=2"))
    assert set(heaps) == {"prologue", "step"}
    parts = split(one_sided[0])
    assert parts is not None
    for name, part in (("prologue", parts.prologue), ("step", parts.step)):
        used = {n.args[1] for n in part.graph.nodes if n.target is put}
        assert used == {heaps[name].spec.name}
    args = captured.programs[0].args
    assert survives(one_sided, [args, args], [run_local(programs, args)] * 2)


# -- what the others exchange -----------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*PLANS, "cfg=2,ring=2", "ulysses=2,fp8(qvo)", "tp=3"])
def test_all_ranks_exchanges_are_known_without_their_programs(captured: fastpar.Captured, plan: str) -> None:
    """Kinds, groups, sizes, and the order of starts and waits, which differs where ranks use results in another one."""
    b = built(captured, plan)
    found = skeleton.of_all(b.lowered, b.mesh)
    programs = [b.localise(rank) for rank in range(b.mesh.ranks)]
    assert found == [skeleton.of_program(p, rank)[0] for rank, p in enumerate(programs)]
    assert found[0].exchanges and sorted(found[0].order) == sorted(
        (kind, i) for kind in (skeleton.START, skeleton.WAIT) for i in range(len(found[0].exchanges))
    )


def test_another_program_than_was_planned_for_is_refused(captured: fastpar.Captured) -> None:
    b = built(captured, "ulysses=2")
    heaps = rewriting.planned(skeleton.of_all(b.lowered, b.mesh), "h")
    program = b.localise(0)
    rewriting.rewrite(program, 0, heaps)
    first, *rest = heaps["step"].skeletons
    turned = (replace(first, order=first.order[::-1]), *rest)
    with pytest.raises(CheckError, match="rank 0: exchanges are started or waited for in another order"):
        rewriting.rewrite(program, 0, {"step": replace(heaps["step"], skeletons=turned)})
    other = built(captured, "ring=2")
    with pytest.raises(CheckError, match="rank 0: exchange 0 is .* and was planned as"):
        rewriting.rewrite(other.localise(0), 0, heaps)


def test_a_compile_localises_its_own_rank_only(captured: fastpar.Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    b = built(captured, "ring=3")
    asked: list[int] = []
    real = type(b).localise
    monkeypatch.setattr(type(b), "localise", lambda self, rank, groups=None: asked.append(rank) or real(self, rank))
    monkeypatch.setattr(running, "world", lambda group: (1, 3))
    one = running.OneSided(None, None, torch.device("cpu"), 1.0).localise(b)  # type: ignore[arg-type]
    assert asked == [1] and any(n.target is put for n in one.graph.nodes)
    assert b.notes[-1].startswith("one-sided: ")


# -- slots and credits ----------------------------------------------------------------------------


def ring(ranks: int, steps: int, size: int = 256) -> Traffic:
    """Each rank puts to the next one; each message is read before the next is put."""
    events = tuple((kind, c) for c in range(steps) for kind in (PUT, READ))
    members = tuple(tuple(range(ranks)) for _ in range(ranks))
    bytes_ = tuple(tuple(size * (s == (r - 1) % ranks) for s in range(ranks)) for r in range(ranks))
    return Traffic((events,) * ranks, (members,) * steps, (bytes_,) * steps)


def dense(ranks: int, steps: int, size: int = 256) -> Traffic:
    """All-to-alls one after the other."""
    events = tuple((kind, c) for c in range(steps) for kind in (PUT, READ))
    members = tuple(tuple(range(ranks)) for _ in range(ranks))
    return Traffic((events,) * ranks, (members,) * steps, (((size,) * ranks,) * ranks,) * steps)


def test_dense_exchanges_on_two_slots_need_no_credits() -> None:
    """What a rank has received says that all others have read what came before: that is a barrier already."""
    for ranks in (2, 4):
        order = choose(dense(ranks, 8))
        assert order.credits == ()
        assert order.slots.size == 2 * ranks * 256
    alone = choose(dense(3, 1))  # its slot is its own successor's, of which nobody has heard
    others = {(r, w, 1) for r in range(3) for w in range(3) if r != w}
    assert {(c.reader, c.writer, c.lag) for c in alone.credits} == others


def test_a_ring_needs_credits_or_as_many_slots_as_ranks() -> None:
    """News of the next rank comes all the way round: it is old by as many messages as there are ranks."""
    for ranks in (2, 3, 4):
        traffic = ring(ranks, 12)
        one = choose(ring(ranks, 1), 0)
        assert one.slots.size == 256 and len(one.credits) == ranks
        assert len(credits(traffic, assign(traffic, 0))) == ranks * 12  # each put waits for the read before it
        assert len(credits(traffic, assign(traffic, ranks - 2))) >= ranks * (12 - ranks)
        enough = choose(traffic)
        assert enough.slots.size == ranks * 256 and enough.credits == ()
        twice = choose(traffic, spare=0)  # at most two slots: of four ranks each waits for the read of the last but one
        assert twice.slots.size == 2 * 256
        assert (len(twice.credits) == 0) == (ranks == 2)
        assert {c.put - c.read for c in twice.credits if c.lag == 0} <= {2}


def test_every_credit_is_needed() -> None:
    """Without any one of them there is an order of events in which a slot is overwritten."""
    for traffic in (ring(3, 4), ring(4, 5), dense(3, 1), dense(2, 3)):
        order = Order(assign(traffic, 0), credits(traffic, assign(traffic, 0)), 0)
        assert order.credits
        walk(traffic, order, random.Random(0))
        for number, credit in enumerate(order.credits):
            with pytest.raises(Overwritten):
                walk(traffic, dropped(order, number), random.Random(0), lazy=credit.reader)


def test_what_a_put_waits_for_is_not_known_to_the_program_yet() -> None:
    """Rank 0's put (channel 2) waits beside the program for rank 1 to have read channel 0. Meanwhile rank 0 reads
    channel 1 and says so to rank 2: from which that one must not conclude that rank 1 has read."""
    everyone = ((0, 1, 2),) * 3

    def piece(source: int, to: int, size: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(size * ((r, s) == (to, source)) for s in range(3)) for r in range(3))

    sizes = (piece(2, 1, 512), piece(2, 0, 256), piece(0, 1, 256), piece(2, 0, 256), piece(2, 1, 256))
    order = [(PUT, 0), (READ, 0), (PUT, 1), (PUT, 2), (READ, 1), (PUT, 3), (PUT, 4), (READ, 2), (READ, 3), (READ, 4)]
    traffic = Traffic((tuple(order),) * 3, (everyone,) * 5, sizes)
    slots = Slots((0, 512, 0, 512, 256), 768)  # 2 and 4 on halves of 0, 3 on 1
    found = Order(slots, credits(traffic, slots), 0)
    within = {(c.reader, c.read, c.writer, c.put): i for i, c in enumerate(found.credits) if c.lag == 0}
    assert set(within) == {(1, 0, 0, 2), (0, 1, 2, 3), (1, 0, 2, 4)}
    for seed in range(20):
        walk(traffic, found, random.Random(seed), lazy=1)
    with pytest.raises(Overwritten):
        walk(traffic, dropped(found, within[1, 0, 2, 4]), random.Random(0), lazy=1)


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    """Programs of exchanges among groups, some under way at once, with pieces of all sizes and none."""
    ranks, channels = draw(st.integers(2, 4)), draw(st.integers(1, 7))
    members, sizes = [], []
    for _ in range(channels):
        step = draw(st.sampled_from([s for s in (1, 2, 4) if ranks % s == 0]))  # groups of ``step`` neighbours
        groups = [tuple(range(r - r % step, r - r % step + step)) for r in range(ranks)]
        everyone = draw(st.booleans())
        groups = [tuple(range(ranks))] * ranks if everyone else groups
        piece = st.sampled_from([0, 0, 8, 64, 200])
        sizes.append(tuple(tuple(draw(piece) for _ in g) for g in groups))
        members.append(tuple(groups))
    order: list[tuple[str, int]] = []
    waiting: list[int] = []
    for c in range(channels):
        order.append((PUT, c))
        waiting.append(c)
        for _ in range(draw(st.integers(0, len(waiting)))):
            order.append((READ, waiting.pop(draw(st.integers(0, len(waiting) - 1)))))
    order += [(READ, c) for c in waiting]
    return Traffic((tuple(order),) * ranks, tuple(members), tuple(sizes))


@settings(max_examples=60)
@given(traffics(), st.integers(0, 10**6))
def test_no_order_of_events_overwrites_what_is_unread(traffic: Traffic, seed: int) -> None:
    """Held against a checker that only looks at bytes; for one slot or several, whatever was chosen."""
    for order in (choose(traffic), Order(s := assign(traffic, 0), credits(traffic, s), 0)):
        for lazy in (None, *range(traffic.ranks)):
            walk(traffic, order, random.Random(seed), lazy=lazy)


def test_slots_that_overlap_are_refused() -> None:
    events = ((PUT, 0), (PUT, 1), (READ, 0), (READ, 1))
    both = replace(dense(2, 2), events=(events, events))
    assert assign(both).size == 2 * 512
    with pytest.raises(CheckError, match="channels 0 and 1 share bytes while both"):
        credits(both, Slots((0, 128), 1024))
    with pytest.raises(CheckError, match="exactly once"):
        replace(dense(2, 2), events=(events, events[:3]))


def test_the_report_says_what_it_takes(captured: fastpar.Captured) -> None:
    heaps = sided(built(captured, "ulysses=3"))[2]
    assert re.fullmatch(
        r"one-sided: \d+ exchanges in the step through a heap of 0\.\d\d MB, no credits needed", said(heaps)
    )
    assert re.search(r"[1-9]\d* credits on 3 ranks", said(sided(built(captured, "ring=3"), spare=0)[2]))
    assert said({}) == "one-sided: nothing is exchanged"


@pytest.mark.parametrize("plan", ["ulysses=3", "ring=3"])
def test_verify_runs_the_one_sided_programs(captured: fastpar.Captured, plan: str) -> None:
    report = fastpar.verify(captured, plan=plan, transport="one-sided")
    assert report.ok and report.max_rel_err < 1e-12
    (note,) = [n for n in report.notes if n.startswith("one-sided: ")]
    assert note in fastpar.explain(captured, plan=plan, transport="one-sided").notes
    assert note not in fastpar.explain(captured, plan=plan).notes
    with pytest.raises(OptionError, match="unknown transport 'one'; valid: two-sided, one-sided"):
        fastpar.explain(captured, plan=plan, transport="one")


# -- what must be noticed -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def circle() -> tuple[list[Program], list[Any], list[Any]]:
    """A ring of three over two blocks, which needs credits: programs, calls, expected."""
    torch.manual_seed(0)
    captured = fastpar.capture(Two().double().eval(), (torch.randn(1, 12, 16).double(),))
    programs, one_sided, heaps = sided(built(captured, "ring=3"), spare=0)
    assert heaps["step"].order.credits
    args = captured.programs[0].args
    calls = [args, other(args), args]
    return one_sided, calls, [run_local(programs, call) for call in calls]


def test_the_circle_as_it_is(circle: Any) -> None:
    assert survives(*circle)


def test_a_missing_credit_is_noticed(circle: Any) -> None:
    programs, calls, expected = circle
    assert not survives([without_credits(p) for p in programs], calls, expected)


def test_a_flag_before_its_data_is_noticed(circle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    travel = Heaps.travel

    def early(self: Heaps, message: Message) -> Any:
        if message.data is not None and message.flag is not None:
            self.flags[message.heap, message.to, message.flag] = message.epoch
        return travel(self, message)

    # the receiver no longer waits for its own puts to leave, which would hide it among so few ranks
    monkeypatch.setattr(Heaps, "travel", _flag_first)
    assert not survives(*circle)
    monkeypatch.setattr(Heaps, "travel", early)
    assert survives(*circle)  # with the bytes, in one moment: as good as after them


def _flag_first(self: Heaps, message: Message) -> Any:
    if message.data is not None and message.flag is not None:
        self.flags[message.heap, message.to, message.flag] = message.epoch
        message.flag = None
        return None
    if message.data is not None:
        self.memory[message.heap][message.to].narrow(0, message.offset, len(message.data)).copy_(message.data)
    elif message.flag is not None:
        self.flags[message.heap, message.to, message.flag] = message.epoch
    self.under_way.remove(message)
    return None


def test_a_flag_of_the_call_before_is_not_taken(circle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if flags were set, and never told of which call they are."""
    can = Heaps.can

    def stale(self: Heaps, node: Any, rank: int, epoch: int) -> bool:
        if node.target is put:
            return can(self, node, rank, epoch)
        try:
            return any(can(self, node, rank, e) for e in range(1, epoch + 1))
        except CheckError:
            return True

    monkeypatch.setattr(Heaps, "can", stale)
    assert not survives(*circle)


@pytest.mark.parametrize("shift", [8, -8, 64])
def test_a_wrong_offset_is_noticed(circle: Any, shift: int) -> None:
    programs, calls, expected = circle
    broken = [p.copy() for p in programs]
    node = [n for n in broken[1].graph.nodes if n.target is put][1]
    sends = list(node.args[3])
    sends[3] = max(0, sends[3] + shift) if sends[3] + shift >= 0 else sends[3] + 8
    node.args = (*node.args[:3], sends, node.args[4])
    assert not survives(broken, calls, expected, 4)


def test_slots_that_overlap_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nothing had refused them."""
    torch.manual_seed(0)
    captured = fastpar.capture(Two().double().eval(), (torch.randn(1, 12, 16).double(),))
    several = pipeline_text(Plan.parse("ulysses=2")).replace("overlap", "overlap{pack=false}")  # messages at once
    whole = built(captured, "ulysses=2", "h100-8", passes=several)

    def stacked(traffic: Traffic, spare: int) -> Order:
        return Order(Slots((0,) * traffic.channels, assign(traffic).size), choose(traffic).credits, 0)

    programs, fine, _ = sided(whole)
    calls = [captured.programs[0].args]
    expected = [run_local(programs, calls[0])]
    assert survives(fine, calls, expected)
    monkeypatch.setattr(rewriting, "choose", stacked)
    assert not survives(sided(whole)[1], calls, expected)
