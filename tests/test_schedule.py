"""Schedules: what a program takes in its order, a better order, messages joined, and interleavings that prove it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.testing import FileCheck

import fastpar
from fastpar.backends.simulate import run_interleaved, run_local
from fastpar.core.errors import CheckError, OptionError
from fastpar.core.plan import Plan
from fastpar.graph.check import check_order
from fastpar.graph.program import Program
from fastpar.graph.schedule import calls, listed, parts, play
from fastpar.ops.collectives import COLLECTIVES
from fastpar.plan import clock
from fastpar.plan.durations import durations
from fastpar.plan.expand import pipeline_text
from fastpar.plan.topology import Topology, load, parse
from fastpar.run.build import Built, build
from tests.test_cfg import Block, inputs

torch.set_num_threads(1)

SEEDS = 50
PLANS = ["ulysses=2", "ulysses=3", "ring=3", "ulysses=2,ring=2", "torus=2", "torus=2,ring=2", "gather=3", "tp=2",
         "cfg=2,ulysses=2"]  # fmt: skip


class Two(torch.nn.Module):
    """A parallel block (attention beside an MLP) with norms before queries and keys, as FLUX's single blocks."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (torch.nn.Linear(width, width) for _ in range(3))
        self.up, self.out = torch.nn.Linear(width, 4 * width), torch.nn.Linear(5 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
            q, k = (F.layer_norm(y, y.shape[-1:]) for y in (q, k))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.out(torch.cat([attended, F.gelu(self.up(x))], -1))
        return x


def two(width: int = 16, tokens: int = 12, dtype: torch.dtype = torch.float64) -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Two(width).to(dtype).eval(), (torch.randn(1, tokens, width, dtype=dtype),))


def built(captured: fastpar.Captured, plan: str, topology: str | None = None, **options: Any) -> Built:
    return build(captured.programs[0].program, plan, topology=topology, **options)


def written(plan: str) -> str:
    """Up to the order in which exchanges stand where they are needed, nothing hoisted."""
    return pipeline_text(Plan.parse(plan), schedule=False).removesuffix(",hoist")


@pytest.fixture(scope="module")
def captured() -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block().double().eval(), inputs(2))


# -- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", ["h100-8", "l40-8", "a100-4x8"])
@pytest.mark.parametrize("plan", PLANS)
def test_no_order_is_worse_than_what_was_written(captured: fastpar.Captured, plan: str, box: str) -> None:
    before, after = (built(captured, plan, box, passes=written(plan) + order) for order in ("", ",overlap"))
    assert (before.lowered.stage, after.lowered.stage) == ("lowered", "scheduled")
    costs = durations(before.mesh, box)
    takes = [play(calls(b.lowered.graph), costs.tasks(b.lowered.graph)) for b in (before, after)]
    assert takes[1].seconds <= takes[0].seconds
    ways = after.lowered.gm.meta["schedule"].ways
    assert ways[0].seconds == pytest.approx(takes[1].seconds)
    assert "as written" in {w.name for w in ways}
    lines = [clock.run([b.localise(r) for r in range(b.mesh.ranks)], load(box)).seconds for b in (before, after)]
    assert lines[1] <= 1.001 * lines[0]  # the clock, which knows every rank, finds the same
    assert lines[1] == pytest.approx(takes[1].seconds, rel=0.1)


def test_exchanges_start_before_what_they_hide_under() -> None:
    """As soon as V is there its exchange starts, and the MLP comes when all three are on their way."""
    program = built(
        two(256, 512, torch.bfloat16), "ulysses=4", "h100-8", passes=written("ulysses=4") + ",overlap{pack=false}"
    )
    text = [_kind(n) for n in program.lowered.graph.nodes if _kind(n)]
    block = " ".join(text[: text.index("attention") + 1])
    FileCheck().check("mm all_to_all mm").check_count("all_to_all", 2).check("mm attention").run(block)
    assert block.count("all_to_all") == 3 and block.count("mm") == 4
    localised = [_kind(n) for n in program.localise(1).graph.nodes if _kind(n)]
    first = localised[: localised.index("attention")]
    assert first.index("wait") > max(i for i, name in enumerate(first) if name == "mm")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_views_of_what_is_there_change_no_order(depth: int) -> None:
    """What takes no time and needs nothing opens its users once, however long the chain."""
    program = built(two(256, 512, torch.bfloat16), "ulysses=4", "h100-8", passes=written("ulysses=4")).lowered
    costs = durations(program.mesh, "h100-8")

    def order() -> list[str]:
        nodes = parts(program.graph)[1]
        tasks = costs.tasks(program.graph)
        return [n.name for n in listed(nodes, tasks) if tasks[n].compute]

    before = order()
    weights = [n for n in program.placeholders if n.meta["val"].dim() == 2]
    for weight in weights:  # a chain of views before whatever took it
        users, last = list(weight.users), weight
        for _ in range(depth):
            with program.graph.inserting_after(last):
                new = program.graph.call_function(torch.ops.aten.alias.default, (last,))
            new.meta, last = dict(last.meta), new
        for user in users:
            user.replace_input_with(weight, last)
    assert order() == before


def _kind(node: fx.Node) -> str:
    name = str(node.target)
    kinds = {"addmm": "mm", ".mm.": "mm", "fastpar.all_to_all": "all_to_all", "fastpar.attention": "attention",
             "wait_tensor": "wait"}  # fmt: skip
    return next((kind for part, kind in kinds.items() if part in name), "")


SLOW = """
[device]
name = "a card"
flops = 1e14
bandwidth = 1e12
memory = {memory}
[[level]]
name = "a cable"
size = 8
bandwidth = {bandwidth}
latency = {latency}
"""


def box(bandwidth: float = 1e9, latency: float = 1e-6, memory: float = 24e9) -> Topology:
    return parse(SLOW.format(bandwidth=bandwidth, latency=latency, memory=memory), "box")


def scheduled(captured: fastpar.Captured, plan: str, topology: Topology, options: str = "") -> Program:
    from fastpar.graph.pipeline import PassContext, Pipeline
    from fastpar.registry import PASSES

    before = built(captured, plan, passes=written(plan))
    ctx = PassContext(mesh=before.mesh, plan=before.plan, costs=durations(before.mesh, topology))
    return Pipeline.parse(f"overlap{options}", PASSES).run(before.lowered, ctx)


def test_slow_starts_are_joined_and_slow_links_are_fed_early() -> None:
    """Where latency is what counts, Q, K and V are one message; where bytes are, the first travels ahead."""
    model = two(256, 512, torch.bfloat16)
    count = {}
    for name, topology in {"latency": box(1e12, 1e-3), "bytes": box(2e9, 1e-9)}.items():
        program = scheduled(model, "ulysses=4", topology)
        count[name] = sum(n.target in COLLECTIVES for n in program.graph.nodes)
    assert count["latency"] == 2 * 2 + 1 and count["bytes"] > count["latency"]


def test_memory_bounds_what_may_be_alive() -> None:
    """Without room beyond what the program needs as written, an order that needs more is not taken."""
    model = two(256, 512, torch.bfloat16)
    for memory in (24e9, 1.0):
        program = scheduled(model, "ring=4", box(5e9, 1e-6, memory), "{memory=0.5}")
        way = program.gm.meta["schedule"].ways
        peak = {w.name: w.peak for w in way}
        assert way[0].peak <= peak["as written"] + 0.5 * memory
    assert way[0].name == "as written" or way[0].peak <= peak["as written"] + 1


def test_every_exposed_collective_has_a_reason(captured: fastpar.Captured) -> None:
    report = fastpar.explain(captured, plan="ulysses=2", topology="l40-8")
    assert report.exposed and all(e.reason and e.milliseconds > 0 for e in report.exposed)
    assert {o.order for o in report.orders} >= {"as written", "packed"}
    best = min(o.milliseconds for o in report.orders)
    assert report.orders[0].milliseconds == pytest.approx(best, rel=2e-3)


def test_bad_options_name_what_is_valid(captured: fastpar.Captured) -> None:
    with pytest.raises(OptionError, match="a share of the device's, 0 to 1, not 2"):
        built(captured, "ulysses=2", passes=written("ulysses=2") + ",overlap{memory=2.0}")
    with pytest.raises(OptionError, match="takes a program that is lowered; after 'overlap' it is scheduled"):
        built(captured, "ulysses=2", passes=written("ulysses=2") + ",overlap,pack")


# -- messages joined ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "attentions", "each"), [("ulysses=4", 2, 2), ("gather=3", 2, 1), ("ulysses=2,ring=2", 2, 3)]
)
def test_pack_joins_the_collectives_of_an_attention(plan: str, attentions: int, each: int) -> None:
    """Q, K and V in one, and the outputs: two per attention; K and V of a gather in one."""
    model = two()
    packed = built(model, plan, passes=written(plan) + ",pack")
    kinds = [n for n in packed.lowered.graph.nodes if n.target in COLLECTIVES and n.meta.get("why") != "output"]
    assert len(kinds) == attentions * each
    assert fastpar.verify(model, plan=plan, passes=written(plan) + ",pack").ok
    unpacked = fastpar.explain(model, plan=plan, passes=written(plan))
    assert fastpar.explain(model, plan=plan, passes=written(plan) + ",pack").bytes_per_rank == unpacked.bytes_per_rank


def test_the_operand_that_is_there_first_goes_ahead() -> None:
    packed = built(two(), "ulysses=4", passes=written("ulysses=4") + ",pack{ahead=true}")
    given = [n.args[0] for n in packed.lowered.graph.nodes if n.target in COLLECTIVES]
    several = [len(xs[0].args[0]) if xs[0].target is torch.ops.aten.cat.default else len(xs) for xs in given]
    assert several == [2, 1, 1, 2, 1, 1, 1]  # Q and K; V, which has no norm; the outputs of the attention; twice
    assert fastpar.verify(two(), plan="ulysses=4", passes=written("ulysses=4") + ",pack{ahead=true}").ok


def test_sums_of_one_place_are_one_message() -> None:
    """Sums of other shapes, too; a maximum is another kind, and a sum of sums comes later."""

    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + F.scaled_dot_product_attention(x, x, x)
            total, square, top = x.sum(1), x.square().sum((1, 2)), x.amax(1)
            return (x - total[:, None]).square().mean(1) * square[:, None] + top

    torch.manual_seed(0)
    model = fastpar.capture(Sums(), (torch.randn(1, 9, 6).double(),))
    counts = []
    for passes in (written("gather=3"), written("gather=3") + ",pack"):
        report = fastpar.verify(model, plan="gather=3", passes=passes)
        assert report.ok
        counts.append(sum(c.count for c in report.collectives if c.kind == "all_reduce"))
    assert counts == [4, 3]


def test_what_is_used_in_between_is_not_joined() -> None:
    """The second attention's exchanges need the first's results: no message holds both."""
    packed = built(two(), "ulysses=4", passes=written("ulysses=4") + ",pack")
    assert max(len(n.args[0]) for n in packed.lowered.graph.nodes if n.target in COLLECTIVES) == 3


# -- interleavings --------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_schedules_hold_in_every_interleaving(captured: fastpar.Captured, plan: str) -> None:
    own = build(captured.programs[0].program, plan)
    programs = [own.localise(r) for r in range(own.mesh.ranks)]
    check_order(programs)
    args = captured.programs[0].args
    with torch.no_grad():
        expected = run_local(programs, args)
        for seed in range(SEEDS):
            for mine, first in zip(run_interleaved(programs, args, seed), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True)), f"seed {seed}"


def caught(programs: list[Program], args: Any) -> int:
    """Seeds of 50 under which the ranks' outputs are not what lock step gives for the untouched programs."""
    with torch.no_grad():
        count = 0
        for seed in range(SEEDS):
            try:
                outputs = run_interleaved(programs, args, seed)
            except CheckError:
                count += 1
                continue
            count += any(bool(torch.isnan(o).any()) for out in outputs for o in out)
    return count


def localised(captured: fastpar.Captured, plan: str) -> list[Program]:
    own = build(captured.programs[0].program, plan)
    return [own.localise(r) for r in range(own.mesh.ranks)]


def starts(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and "_c10d_functional" in str(n.target)
            and "wait" not in str(n.target)]  # fmt: skip


@pytest.mark.parametrize("plan", ["ulysses=2", "ring=3", "gather=3"])
def test_a_dropped_wait_is_caught(captured: fastpar.Captured, plan: str) -> None:
    programs = localised(captured, plan)
    assert caught(programs, captured.programs[0].args) == 0
    graph = programs[1].graph
    wait = next(n for n in graph.nodes if "wait_tensor" in str(n.target))
    wait.replace_all_uses_with(wait.args[0])
    graph.erase_node(wait)
    assert caught(programs, captured.programs[0].args) > 0


@pytest.mark.parametrize("plan", ["ulysses=2", "ring=3", "gather=3"])
def test_a_buffer_that_is_used_again_too_early_is_caught(captured: fastpar.Captured, plan: str) -> None:
    programs = localised(captured, plan)
    graph = programs[0].graph
    start = starts(programs[0])[0]
    with graph.inserting_after(start):
        graph.call_function(torch.ops.aten.fill_.Scalar, (start.args[0], float("nan")))
    assert caught(programs, captured.programs[0].args) > 0


def test_a_send_buffer_that_is_read_too_late_is_caught(captured: fastpar.Captured) -> None:
    """Once it is sent it is not ours: what reads it behind the wait finds poison."""
    programs = localised(captured, "ulysses=2")
    graph = programs[0].graph
    start = starts(programs[0])[0]
    wait = next(n for n in start.users if "wait_tensor" in str(n.target))
    users = list(wait.users)
    with graph.inserting_before(users[0]):
        total = graph.call_function(torch.ops.aten.sum.default, (start.args[0],))
        nothing = graph.call_function(torch.ops.aten.mul.Tensor, (total, 0))
        same = graph.call_function(torch.ops.aten.add.Tensor, (wait, nothing))
    for user in users:
        user.replace_input_with(wait, same)
    assert caught(programs, captured.programs[0].args) == SEEDS


def test_starts_in_another_order_on_one_rank_are_caught(captured: fastpar.Captured) -> None:
    own = build(captured.programs[0].program, "ulysses=2", passes=written("ulysses=2"))
    programs = [own.localise(r) for r in range(2)]
    first, second = starts(programs[1])[:2]
    assert first.args[1:] != second.args[1:] or first.target == second.target
    second.prepend(first)  # a swap: the second's operands are ready, the first comes after it
    second_start = second
    second_start.append(first)
    expected = run_local([own.localise(r) for r in range(2)], captured.programs[0].args)
    wrong = 0
    with torch.no_grad():
        for seed in range(SEEDS):
            try:
                found = run_interleaved(programs, captured.programs[0].args, seed)
            except (CheckError, RuntimeError):
                wrong += 1
                continue
            wrong += any(not torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))
    assert wrong == SEEDS


def test_ranks_that_wait_for_nobody_are_named(captured: fastpar.Captured) -> None:
    programs = localised(captured, "ulysses=2")
    graph = programs[1].graph
    start = starts(programs[1])[-1]
    with graph.inserting_after(start):
        alone = graph.call_function(torch.ops.aten.cat.default, ([start.args[0], start.args[0]],))
    start.replace_all_uses_with(alone)
    graph.erase_node(start)
    with pytest.raises(CheckError, match=r"ranks \[0\] wait for exchanges"):
        run_interleaved(programs, captured.programs[0].args, 0)
