"""``displaced``: the others' rows are those of the step before (DistriFusion). Against an account of it by hand, after
steps with the same inputs, and on real processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpar
from fastpar.backends.simulate import PerRank, carried, run_interleaved, run_local
from fastpar.core.errors import OptionError, PlanError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.program import Program
from fastpar.ops.collectives import all_to_all
from fastpar.ops.displaced import kept_apart, plausible
from fastpar.plan.expand import pipeline_text
from fastpar.plan.predict import predict
from fastpar.plan.topology import load
from fastpar.plan.workload import workload
from fastpar.run.build import build
from fastpar.run.steps import settles
from tests.test_cfg import Block, inputs
from tests.test_hoist import Denoiser, prompt, sample
from tests.test_replicas import torchrun

GROUPS = 2


class Patches(nn.Module):
    """What a U-Net has: a convolution of the sample, a norm over all rows, convolutions, attention over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.middle, self.outward = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((2, 8), (8, 8), (8, 2)))
        self.qkv, self.time = nn.Linear(8, 24), nn.Linear(1, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.inward(x) + self.time(t)[:, :, None, None]
        h = self.middle(F.silu(F.group_norm(h, GROUPS)))
        q, k, v = self.qkv(h.flatten(2).transpose(1, 2)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.outward(h + y.transpose(1, 2).unflatten(2, h.shape[2:]))


@pytest.fixture(scope="module")
def patches() -> Patches:
    torch.manual_seed(0)
    return Patches().double().eval().requires_grad_(False)


def steps(count: int, rows: int = 10, batch: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs that change from step to step as a sampler's do, if faster."""
    torch.manual_seed(1)
    x, drift = torch.randn(batch, 2, rows, 6).double(), torch.randn(batch, 2, rows, 6).double()
    return [(x + 0.1 * i * drift, torch.full((batch, 1), 1 - i / 10).double()) for i in range(count)]


# -- by hand ----------------------------------------------------------------------------------------


def by_hand(
    model: Patches, calls: Sequence[tuple[torch.Tensor, torch.Tensor]], parts: Sequence[int], warmup: int, gn: str
) -> torch.Tensor:
    """The last call's output: DistriFusion, section 4.1 and figure 5, with distrifuser's modes for the norms, patch by
    patch. Means are weighted by rows, since patches need not be equal."""
    cuts = [0]
    for part in parts:
        cuts.append(cuts[-1] + part)
    before: dict[str, Any] = {}
    for number, (x, t) in enumerate(calls):
        late, now = number >= warmup, dict[str, Any]()

        def around(
            name: str, own: list[torch.Tensor], late: bool = late, now: Any = now, before: Any = before
        ) -> list[torch.Tensor]:
            """What every patch sees of a value: its own rows, and the others' of the step before."""
            now[name] = own if not (late and gn == "none") else before[name]
            old = before[name] if late else own
            return [torch.cat([own[j] if j == i else old[j] for j in range(len(own))], 2) for i in range(len(own))]

        def convolved(layer: nn.Conv2d, seen: list[torch.Tensor]) -> list[torch.Tensor]:
            return [layer(one)[:, :, a:b] for one, a, b in zip(seen, cuts, cuts[1:], strict=False)]

        h = (model.inward(x) + model.time(t)[:, :, None, None]).split(list(parts), 2)
        grouped = [p.unflatten(1, (GROUPS, -1)) for p in h]
        means = [torch.stack([g.mean((2, 3, 4)), g.square().mean((2, 3, 4))]) for g in grouped]
        weights = [part / sum(parts) for part in parts]
        now["means"] = means
        normed = []
        for i, (g, w) in enumerate(zip(grouped, weights, strict=True)):
            if not late or gn == "sync":
                m = sum(w * m for w, m in zip(weights, means, strict=True))
            elif gn in ("separate", "none"):
                m = means[i]
            elif gn == "stale":
                m = sum(w * (means[j] if j == i else before["means"][j]) for j, w in enumerate(weights))
            else:
                m = sum(w * m for w, m in zip(weights, before["means"], strict=True)) + means[i] - before["means"][i]
            variance = m[1] - m[0].square()
            variance = torch.where(variance < 0, means[i][1] - means[i][0].square(), variance)
            g = (g - m[0][:, :, None, None, None]) / (variance[:, :, None, None, None] + 1e-5).sqrt()
            normed.append(F.silu(g.flatten(1, 2)))
        h = convolved(model.middle, around("middle", normed))
        q, k, v = zip(*(model.qkv(p.permute(0, 2, 3, 1)).unflatten(3, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5) for p in h),
                      strict=True)  # fmt: skip
        rows = [p.shape[2] for p in h]
        attended = []
        pairs = zip(q, around("k", list(k)), around("v", list(v)), rows, strict=True)
        for query, keys, values, count in pairs:
            y = F.scaled_dot_product_attention(query.flatten(2, 3), keys.flatten(2, 3), values.flatten(2, 3))
            attended.append(y.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, (count, -1)))
        out = convolved(model.outward, around("out", [a + b for a, b in zip(h, attended, strict=True)]))
        before = now
    return torch.cat(out, 2)


@pytest.mark.parametrize("gn", ["corrected", "stale", "sync", "separate", "none"])
@pytest.mark.parametrize("plan, parts", [("gather=2", (5, 5)), ("gather=3", (4, 4, 4)),
                                         ("gather=3,speeds(1:2:2)", (2, 4, 4))])  # fmt: skip
def test_as_by_hand(patches: Patches, gn: str, plan: str, parts: tuple[int, ...]) -> None:
    calls = steps(4, sum(parts))
    expected = by_hand(patches, calls, parts, 2, gn)
    outputs = fastpar.simulate(patches, list(calls), plan=f"{plan},displaced(warmup=2,gn={gn})")  # type: ignore[arg-type]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert float((outputs[0] - expected).abs().max()) < 1e-12
    assert float((outputs[0] - patches(*calls[-1])).abs().max()) > 1e-4  # and that is not what one device computes


def test_where_nothing_changes_norms_are_right_in_all_modes_but_their_own(patches: Patches) -> None:
    x, t = steps(1)[0]
    for gn, exact in (("corrected", True), ("stale", True), ("sync", True), ("separate", False), ("none", False)):
        out = fastpar.simulate(patches, [(x, t)] * 3, plan=f"gather=2,displaced(warmup=1,gn={gn})")[0]
        assert (float((out - patches(x, t)).abs().max()) < 1e-12) is exact


def test_the_warm_up_is_exact(patches: Patches) -> None:
    calls = steps(4)
    for warmup, exact in ((4, True), (3, False), (0, False)):
        out = fastpar.simulate(patches, list(calls), plan=f"gather=2,displaced(warmup={warmup})")[0]  # type: ignore[arg-type]
        assert (float((out - patches(*calls[-1])).abs().max()) < 1e-12) is exact


def test_negative_variances_are_the_own_rows() -> None:
    """Corrected moments of two steps need not be moments of anything (distrifuser's ``corrected_async_gn``)."""
    own = torch.tensor([[1.0, 2.0], [1.5, 4.5]])
    out = plausible(torch.tensor([[3.0, 2.0], [8.0, 4.25]]), own)
    assert out.tolist() == [[3.0, 2.0], [9.5, 4.25]]


# -- verify and explain -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    ["gather=2,displaced", "gather=5,displaced", "gather=1,displaced", "cfg=2,gather=3,displaced(gn=stale)",
     "gather=2,tp=2,displaced", "gather=3,displaced,fp8(kv)", "gather=3,displaced,speeds(1:0.5:3)"],  # fmt: skip
)
def test_verified(plan: str) -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Block().double().eval(), inputs(2), plan=plan)
    assert report.ok, (report.notes, report.diverged_at)
    assert any(note.startswith("displaced: after a step whose sample was 1% apart") for note in report.notes)
    assert (report.carried_bytes > 0) == (report.ranks > 1)


@pytest.mark.parametrize("gn", ["corrected", "stale", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verified_in_other_dtypes(patches: Patches, gn: str, dtype: torch.dtype) -> None:
    x, t = (value.to(dtype) for value in steps(1)[0])
    torch.manual_seed(0)
    report = fastpar.verify(Patches().to(dtype).eval(), (x, t), plan=f"gather=3,displaced(gn={gn})")
    assert report.ok, (report.max_rel_err, report.tolerance, report.notes)
    assert (report.tolerance == float("inf")) is (gn == "separate")


def test_as_many_bytes_as_if_they_were_waited_for(patches: Patches) -> None:
    late, waits = (fastpar.explain(patches, steps(1)[0], plan=f"gather=2{more}") for more in (",displaced", ""))
    assert late.bytes_per_rank == waits.bytes_per_rank and late.bytes_formula == waits.bytes_formula
    assert not late.fallbacks and late.flops_share == waits.flops_share
    assert sum(c.count for c in late.collectives) <= sum(c.count for c in waits.collectives)


def test_what_is_kept_are_the_others_rows(patches: Patches) -> None:
    """Halos as the rows that came, keys and values as they are used, and the others' share of a norm's sums."""
    report = fastpar.explain(patches, steps(1)[0], plan="gather=2,displaced")
    pixels, halo, groups = 10 * 6, 8 * 6, GROUPS * 2
    assert report.carried_bytes == 8 * (2 * 8 * pixels + 2 * halo + groups)


def test_nothing_is_sent_any_more(patches: Patches) -> None:
    """gn=none: what came in the warm-up stays, and only outputs travel."""
    report = fastpar.explain(patches, steps(1)[0], plan="gather=2,displaced(gn=none)")
    assert {c.why for c in report.collectives} == {"output"} and report.carried_bytes > 0


def localised(program: Program, plan: str) -> list[Program]:
    built = build(program, plan)
    return [built.localise(rank) for rank in range(built.mesh.ranks)]


def test_nothing_waits_before_the_last_product(patches: Patches) -> None:
    """All messages but the output's are waited for behind everything that is computed."""
    program = fastpar.capture(patches, steps(1)[0]).programs[0].program
    for one in localised(program, "gather=3,displaced"):
        names = [str(node.target) for node in one.graph.nodes]
        last = max(i for i, name in enumerate(names) if "convolution" in name or "attention" in name)
        waits = [i for i, name in enumerate(names) if "wait_tensor" in name]
        assert len(waits) > 1 and min(waits) > last
        starts = [i for i, name in enumerate(names) if "_c10d_functional" in name and "wait" not in name]
        assert min(starts) < last


def test_in_random_interleavings(patches: Patches) -> None:
    """Messages of this step that are under way, or whose buffers are read too early, would show as NaN."""
    calls = steps(2)
    recorded = fastpar.capture(patches, calls[0]).programs[0]
    built = build(recorded.program, "gather=3,displaced")
    assert built.first is not None
    first = [built.first.localise(rank) for rank in range(3)]
    kept = carried(first[0], run_local(first, recorded.args))
    following = iter(calls[1])
    now = [next(following) if given.kind == "user" else arg
           for given, arg in zip(recorded.program.inputs, recorded.args, strict=True)]  # fmt: skip
    programs, args = localised(recorded.program, "gather=3,displaced"), [*now, *kept]
    for seed in range(5):
        for mine, others in zip(run_interleaved(programs, args, seed), run_local(programs, args), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def test_messages_are_predicted_to_be_hidden(patches: Patches) -> None:
    """But for the outputs', and what is longer than the step itself; keys and values of all attentions are kept."""
    work, box = workload(fastpar.capture(patches, steps(1)[0]).programs[0].program), load("h100-8")
    waits, late = (predict(work, Plan.parse(f"gather=8{more}"), box) for more in ("", ",displaced"))
    assert late.communication == waits.communication and late.bytes == waits.bytes
    assert late.exposed < waits.exposed and late.compute == waits.compute
    assert late.seconds >= late.communication  # of so small a model
    assert late.memory == waits.memory  # it has one attention


def test_a_generation_on_the_clock(patches: Patches) -> None:
    """The warm-up waits, and the steps behind it do not."""
    report, waits = (
        fastpar.explain(patches, steps(1)[0], plan=plan, topology="l40-8", steps=6)
        for plan in ("gather=4,displaced(warmup=3)", "gather=4")
    )
    late = fastpar.explain(patches, steps(1)[0], plan="gather=4,displaced(warmup=1)", topology="l40-8", steps=6)
    assert late.generation["seconds"] < report.generation["seconds"] < waits.generation["seconds"]
    assert late.predicted["seconds"] < waits.predicted["seconds"]


def test_what_is_kept_does_not_depend_on_what_shares_a_message() -> None:
    """A convolution of few channels and many rows of halo beside one of many channels and few: of the first the whole
    value is kept, of the second what came, however messages are packed."""
    torch.manual_seed(0)
    many, few = (nn.Conv2d(2, channels, 3, padding=1).double().requires_grad_(False) for channels in (32, 1))
    near, far = (nn.Conv2d(channels, 1, taps).double().requires_grad_(False) for channels, taps in ((32, 3), (1, 9)))

    def both(x: torch.Tensor) -> torch.Tensor:
        wide, narrow = F.pad(many(x), (1,) * 4), F.pad(few(x), (4,) * 4)
        return near(wide) + far(narrow)

    program = fastpar.capture(both, (steps(1, 12)[0][0],))
    plan = "gather=2,displaced"
    text = pipeline_text(Plan.parse(plan)).replace("overlap,pin", "pack")
    built = build(program.programs[0].program, plan, passes=text)
    assert max(len(n.args[0]) for n in built.lowered.graph.nodes if n.target is all_to_all) == 2
    report = fastpar.verify(program, plan=plan, passes=text)
    assert report.ok and report.carried_bytes == 8 * (32 * (6 + 2) + (6 + 8) * (6 + 8))


# -- what waits -------------------------------------------------------------------------------------


def waiting(model: Any, given: Any, plan: str = "gather=2,displaced") -> list[str]:
    report = fastpar.verify(model, given, plan=plan)
    assert report.ok, (report.notes, report.diverged_at)
    return [note for note in report.notes if "are waited for" in note]


def test_an_output_that_is_made_of_all_rows_is_the_same_on_all_ranks() -> None:
    """Each rank would see another step of the others' rows in it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)

    def pooled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = conv(conv(x))
        return h.mean((2, 3)).tanh(), h

    [note] = waiting(pooled, (steps(1)[0][0],))
    assert "an output is made of it on every rank" in note
    outputs = fastpar.simulate(pooled, [(x,) for x, _ in steps(3)], plan="gather=2,displaced(warmup=1)")
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_softmax_over_rows_waits() -> None:
    """Its terms are relative to a maximum of this step."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)
    notes = waiting(lambda x: conv(conv(x).softmax(2)), (steps(1)[0][0],))
    assert any("maxima of two steps" in note for note in notes) and any("scaled by a maximum" in note for note in notes)


def test_rows_that_move_on_wait() -> None:
    """Rolled along, rows are worked on by another rank, where they may not be a step old."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double().requires_grad_(False)
    notes = waiting(lambda x: conv(conv(x).roll(5, 2)), (steps(1)[0][0],))
    assert any("rows move on to other ranks" in note for note in notes), notes


@pytest.mark.parametrize("some", [4, 11])
def test_rows_that_are_looked_up_wait(some: int) -> None:
    """Tokens in another order: a rank goes on with rows that were others', which may not be a step old."""
    torch.manual_seed(0)
    block = Block().double().eval().requires_grad_(False)
    x, *rest = inputs(1)

    def ordered(x: torch.Tensor, order: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return block(block(x, *rest)[:, order], *rest)

    order = torch.randperm(11)[:some]
    assert waiting(ordered, (x, order, *rest))
    first, second = ((x + 0.1 * i, order, *rest) for i in range(2))
    late = fastpar.simulate(ordered, [first, second], plan="gather=2,displaced(warmup=1)")[0]
    same = fastpar.simulate(ordered, [second, second], plan="gather=2,displaced(warmup=1)")[0]
    assert 0 < float((late - same).abs().max()) < 0.05 * float(same.abs().max())  # context is late, rows are not


def test_what_is_the_same_in_every_step_is_not_carried() -> None:
    """Two layers attend to themselves and to a prompt that was refined: what is exchanged of the prompt is hoisted."""
    torch.manual_seed(0)
    program = fastpar.capture(Denoiser(refine=True).double().eval(), (*sample(), prompt(1))).programs[0].program
    plan = Plan.parse("gather=2,displaced")
    text = pipeline_text(plan)
    every, some = (build(program, plan, passes=text.replace("hoist,", hoist)).lowered
                   for hoist in ("", "hoist{always=true},"))  # fmt: skip
    assert (every.carries, some.carries) == (2 * 5, 2 * 2)


# -- errors -----------------------------------------------------------------------------------------


def test_memory_is_said_with_the_number() -> None:
    with pytest.raises(PlanError, match=r"needs .* GB on each device, .* of them for what is kept from step to step"):
        fastpar.explain(*large(), plan="gather=2,displaced", topology="rtx4090-8")


def large() -> tuple[Any, Any]:
    """More keys and values than a device has memory, of nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(1, 1_000_000, 64, dtype=torch.bfloat16)

    def attend(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            q = x.unflatten(2, (1, 64)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return x

    return attend, (x,)


def test_a_run_of_no_steps() -> None:
    with pytest.raises(OptionError, match="is empty"):
        fastpar.simulate(lambda x: x, [], plan="gather=2,displaced")


# -- layouts ----------------------------------------------------------------------------------------


def test_little_that_comes_is_kept_apart() -> None:
    mesh = Mesh((("gather", 2),))
    src = Layout.parse("[8@gather(4,4), 3]")
    assert kept_apart(src, Layout.parse("[8, 3]"), mesh, 0) is None


def test_settling(patches: Patches) -> None:
    program = fastpar.capture(patches, steps(1)[0]).programs[0].program
    assert settles(build(program, "gather=2,displaced")) and not settles(build(program, "gather=2,displaced(gn=none)"))
    assert settles(build(fastpar.capture(Block().double(), inputs(1)).programs[0].program,
                         "gather=2,displaced(gn=none)"))  # fmt: skip
    assert PerRank((1, 2)).values == (1, 2)


# -- processes --------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_on_two_processes() -> None:
    plans = ["gather=2,displaced(warmup=2)", "gather=2,displaced(warmup=1,gn=none),fp8(v)",
             "gather=2,displaced(warmup=1)+inductor", "gather=2,displaced(warmup=1)+new"]  # fmt: skip
    printed = torchrun(*plans, script="tests.scripts.displaced", ranks=2)
    assert printed.count("from virtual ranks") == 2 * 2 * len(plans)


@pytest.mark.slow
@pytest.mark.distributed
def test_on_four_processes() -> None:
    """Calls that are dealt, and weights in parts."""
    plans = ["cfg=2,gather=2,displaced(warmup=1)", "gather=2,tp=2,displaced(warmup=2)+shards", "gather=4,displaced"]
    printed = torchrun(*plans, script="tests.scripts.displaced", ranks=4)
    assert printed.count("from virtual ranks") == 2 * 4 * len(plans)
