"""One-sided communication: slots, credits and epochs, in interleavings, between threads, and between processes."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

import fastpar
from fastpar.backends.inductor import compile_inductor
from fastpar.backends.onesided import rewrite as rewriting
from fastpar.backends.onesided import skeleton
from fastpar.backends.onesided.order import SPARE, Order, choose, credits
from fastpar.backends.onesided.rewrite import said
from fastpar.backends.onesided.shared import Shared, place
from fastpar.backends.onesided.slots import PUT, READ, Slots, Traffic, assign
from fastpar.backends.simulate import run_calls, run_local
from fastpar.backends.simulate.sided import Heaps, Message
from fastpar.core.errors import AgreementError, CheckError, FastparError, OptionError
from fastpar.core.plan import Plan
from fastpar.graph.program import Program
from fastpar.graph.prologue import split
from fastpar.ops.onesided import HeapSpec, heap_of, is_onesided, put
from fastpar.plan.expand import pipeline_text
from fastpar.run import onesided as running
from fastpar.run.agree import Party
from tests.onesided import (
    Meeting,
    Overwritten,
    dropped,
    in_threads,
    over_shared_memory,
    sided,
    walk,
    without_credits,
)
from tests.symmetric_cases import CASES
from tests.test_cfg import Block, inputs
from tests.test_hoist import denoiser, prompt, sample
from tests.test_replicas import torchrun
from tests.test_schedule import PLANS, Two, built

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 6


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block().double().eval(), inputs(2))


def other(args: Sequence[Any]) -> list[Any]:
    """Arguments of another call, so that what is left of the one before shows."""
    return [a * 1.5 if torch.is_tensor(a) and a.is_floating_point() and a.dim() == 3 else a for a in args]


def same(found: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> bool:
    """Equal bits, rank by rank."""
    return all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


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


# -- shared memory --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert not {name for name in os.listdir("/dev/shm") if "fastpar" in name} - before
    assert not [name for name in map(str, running.ops._live) if name.startswith("t")]


@pytest.mark.parametrize("plan", ["ring=3", "ulysses=3", "torus=2,ring=2", "ulysses=2,ring=2", "tp=3"])
def test_real_heaps_keep_the_bits(captured: fastpar.Captured, plan: str) -> None:
    b = built(captured, plan)
    programs = [b.localise(r) for r in range(b.mesh.ranks)]
    args = captured.programs[0].args
    calls = [args, other(args)] * 3
    for spare in (0, SPARE):
        for found, call in zip(over_shared_memory(b, calls, spare=spare), calls, strict=True):
            assert same(found, run_local(programs, call))


def test_inductor_keeps_the_order_and_the_values() -> None:
    torch.manual_seed(0)
    captured = fastpar.capture(Two(16).double().eval(), (torch.randn(1, 12, 16).double(),))
    b = built(captured, "ulysses=2", "h100-8")
    args = captured.programs[0].args
    codes: list[str] = []

    def lowering(program: Program) -> Any:
        compiled, code = run_and_get_code(compile_inductor, program)
        codes.append("\n".join(code).split("def call(", 1)[1])
        return compiled

    found = over_shared_memory(b, [args, other(args)], lowering)
    programs, one_sided, _ = sided(b)
    for outputs, call in zip(found, [args, other(args)], strict=True):
        assert same(outputs[1:], outputs[:1])
        off = (outputs[0][0] - run_local(programs, call)[0][0]).abs().max()
        assert off.item() < 1e-12
    order = [str(n.target).split(".")[1] for n in one_sided[0].graph.nodes if is_onesided(n)]
    assert order.count("put") == order.count("receive") > 2
    for code in codes:
        assert re.findall(r"ops\.fastpar\.(put|receive)\.default\(", code) == order


def alone(timeout: float = 0.3, ranks: int = 2) -> list[Shared]:
    """Heaps of ranks that all live here."""
    meeting, spec = Meeting(ranks), HeapSpec("t", ("all_to_all over ring", "all_gather over ring"), 256)
    heaps: list[Shared] = in_threads(lambda r: Shared(spec, r, ranks, timeout, meeting.of(r)), ranks)
    for heap in heaps:
        heap.begin()
    return heaps


def test_a_rank_that_never_comes_is_named_in_time() -> None:
    heaps = alone(ranks=3)
    x = torch.arange(4.0)
    heaps[2].put(x, 1, [0, 0, 2, 0], [])
    with pytest.raises(FastparError, match=r"rank 0 waited 0.3 s .* call 1 for ranks \[1\], first for the message of "
                       r"rank 1 in channel 1 \(all_gather over ring\)"):  # fmt: skip
        heaps[0].receive(x, 1, [1, 2], [], 0, 4, torch.clone)
    heaps[0].begin()
    with pytest.raises(FastparError, match="ranks \\[2\\], first for rank 2 to say that it has read channel 0"):
        heaps[0].put(x, 1, [1, 0, 4, 0], [2, 0, 1])


def test_messages_belong_to_their_call() -> None:
    a, b = alone()
    x = torch.arange(4.0)
    a.put(x, 0, [1, 0, 4, 0], [])
    assert torch.equal(b.receive(x, 0, [0], [0], 0, 4, torch.clone), x)
    b.begin()
    with pytest.raises(FastparError, match="waited"):  # the flag of the first call is still there
        b.receive(x, 0, [0], [], 0, 4, torch.clone)
    a.begin()
    a.put(2 * x, 0, [1, 0, 4, 0], [1, 0, 1])  # its credit came with the first call
    assert torch.equal(b.receive(x, 0, [0], [], 0, 4, torch.clone), 2 * x)
    a.begin()
    a.put(x, 0, [1, 0, 4, 0], [])
    with pytest.raises(FastparError, match="overwritten by that of a later call"):
        b.receive(x, 0, [0], [], 0, 4, torch.clone)


def test_what_is_received_is_no_view_of_the_heap() -> None:
    from tests.onesided import _names  # a heap of its own name

    name = f"t{next(_names)}"
    a, b = alone()
    running.ops.register(name, b)
    try:
        x = torch.arange(4.0)
        a.put(x, 0, [1, 0, 4, 0], [])
        token = torch.empty(1, dtype=torch.uint8)
        (out,) = torch.ops.fastpar.receive(token, x, name, 0, [0], [], 0, 4, [1, 4], [0, 1, 0, 4])
        total = torch.ops.fastpar.receive_sum(token, x, name, 0, [0], [], 0, 1, 4, "sum")
        a.put(-x, 0, [1, 0, 4, 0], [])
        assert torch.equal(out, x) and torch.equal(total, x)
    finally:
        running.ops.release(name)
    with pytest.raises(FastparError, match=f"no heap '{name}': the program that it belongs to was freed"):
        heap_of(name)


def test_heaps_are_freed_with_their_program(captured: fastpar.Captured) -> None:
    heaps = alone()
    attended = running.Attended(lambda args: args, [heaps[0]])
    assert heap_of("t") is heaps[0]
    with pytest.raises(FastparError, match="there is a heap 't' already"):
        running.Attended(lambda args: args, [heaps[1]])
    assert heap_of("t") is heaps[0]  # which is not the second one's to let go
    del attended
    with pytest.raises(FastparError, match="no heap 't'"):
        heap_of("t")
    assert heaps[0].memory == []


# -- who can --------------------------------------------------------------------------------------


class _Store(dict):  # type: ignore[type-arg]
    """A store within this process."""

    def add(self, key: str, n: int) -> int:
        self[key] = self.get(key, 0) + n
        return int(self[key])

    def set(self, key: str, text: str) -> None:
        self[key] = text.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def asked(monkeypatch: pytest.MonkeyPatch, places: list[str], device: str = "cpu", timeout: float = 5.0) -> list[Any]:
    """What every rank is told whose places are these; ``None`` for a rank that does not come."""
    store, local = _Store(), threading.local()
    monkeypatch.setattr(running, "world", lambda group: (local.rank, len(places)))
    monkeypatch.setattr(running, "party_of", lambda group: Party(store, local.rank, tuple(range(len(places)))))
    monkeypatch.setattr(running, "_place", lambda device: places[local.rank])

    def run(rank: int) -> Any:
        local.rank = rank
        return running.one_sided("group", torch.device(device), timeout) if places[rank] else None

    return in_threads(run, len(places))


def test_all_ranks_say_the_same_of_machines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = place()
    assert all(sided is not None for sided, _ in asked(monkeypatch, [here, here]))
    apart = asked(monkeypatch, [here, here, '["elsewhere"]'])
    assert [sided for sided, _ in apart] == [None] * 3
    assert {reason.split(":")[0] for _, reason in apart} == {"ranks 0 and 2 do not share memory"}
    for _, reason in asked(monkeypatch, [here, "no Triton, whose kernel waits for flags"]):
        assert reason == "no Triton, whose kernel waits for flags"


def test_a_gpu_without_symmetric_memory_says_so_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter(["ok", "RuntimeError: no peer access"])
    monkeypatch.setattr(running, "_probe", lambda device, group: next(probes))
    told = asked(monkeypatch, [place()] * 2, "cuda")
    assert {(sided, re.sub(r"rank \d", "rank N", reason)) for sided, reason in told} == {
        (None, "rank N has no symmetric memory: RuntimeError: no peer access")
    }


def test_a_rank_that_does_not_come_to_the_decision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AgreementError, match=r"for ranks \[1\] to come to the one-sided transport \(place\)"):
        asked(monkeypatch, [place(), ""], timeout=0.2)


def test_one_rank_has_nobody_to_share_with() -> None:
    assert running.one_sided(None, torch.device("cpu"), 1.0) == (None, "there is one rank")


# -- processes ------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_late_processes_get_the_bits_of_two_sided_ones() -> None:
    printed = torchrun("ring=2", script="tests.scripts.onesided", ranks=2)
    assert printed.count("bits equal") == 2
    assert "one-sided: " in printed


@pytest.mark.distributed
def test_a_process_that_dies_is_named_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPAR_TIMEOUT", "6")
    printed = torchrun("--dies", "ring=2", script="tests.scripts.onesided", ranks=2)
    assert re.search(r"rank 0: after [67]\.\d s: .*for ranks \[1\].*in channel|read channel", printed), printed


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "plans"),
    [(3, ["ring=3", "ulysses=3"]), (4, ["torus=2,ring=2", "ulysses=2,ring=2"]), (3, ["--inductor", "ring=3", "tp=3"])],
)
def test_late_processes_under_more_plans(ranks: int, plans: list[str]) -> None:
    printed = torchrun(*plans, script="tests.scripts.onesided", ranks=ranks)
    assert printed.count("bits equal") == ranks * len([p for p in plans if not p.startswith("--")])


# -- GPUs -----------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton is not installed (pip install 'fastpar[test]' on Linux), or TRITON_INTERPRET is set for all tests",
)


@interpreted
def test_symmetric_heaps_in_the_interpreter() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.symmetric_cases", *CASES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should be") == len(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_symmetric_heaps_on_a_gpu(case: str) -> None:
    CASES[case]("cuda")


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "plans"), [(2, ["ring=2", "ulysses=2", "torus=2"]), (4, ["ulysses=2,ring=2", "torus=2,ring=2"])]
)
def test_processes_on_one_gpu_keep_the_bits(ranks: int, plans: list[str]) -> None:
    printed = torchrun("--cuda", *plans, script="tests.scripts.onesided", ranks=ranks)
    assert printed.count("bits equal") == ranks * len(plans)
    assert "two-sided, though" not in printed


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "plan"), [(2, "ring=2"), (2, "ulysses=2"), (4, "torus=2,ring=2")])
def test_replays_of_a_captured_step_keep_the_bits(ranks: int, plan: str) -> None:
    printed = torchrun("--cuda", "--captured", plan, script="tests.scripts.onesided", ranks=ranks)
    assert printed.count("replayed, bits equal") == ranks
