"""fp8(...): the number format, what travels in it, and that the ranks compute one rounded function and no other."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.testing import FileCheck

import fastpar
from fastpar.backends.simulate import run_local
from fastpar.core.errors import OptionError, PlanError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.check import check_order
from fastpar.graph.dump import code
from fastpar.ops.collectives import COLLECTIVES, pack
from fastpar.ops.quantize import dequantize, error_bound, from_bytes, quantize, row_bytes, to_bytes
from fastpar.ops.redistribute import across, take
from fastpar.plan.expand import pipeline_text
from fastpar.plan.planner import choose
from fastpar.plan.predict import predict
from fastpar.plan.topology import load
from fastpar.plan.workload import workload
from fastpar.run.build import build
from fastpar.run.rounded import rounded
from tests.test_cfg import Block, inputs
from tests.test_replicas import torchrun

torch.set_num_threads(1)

PLANS = ("ulysses=2", "ulysses=3", "ring=2", "ring=3", "gather=2", "torus=2", "torus=3", "ulysses=2,ring=2",
         "torus=2,ring=2", "torus=2,ulysses=2")  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@cache
def attention(tokens: int = 11, width: int = 8, dtype: torch.dtype = torch.float64, heads: int = 4) -> fastpar.Captured:
    """One attention with nothing around it that talks, so that all bytes are its own and its output's."""
    torch.manual_seed(0)
    x = torch.randn(1, heads, tokens, width).to(dtype)
    return fastpar.capture(lambda x: F.scaled_dot_product_attention(x * 2, x.sin(), x.cos()).tanh(), (x,))


def there_and_back(x: torch.Tensor) -> torch.Tensor:
    return dequantize(quantize(x), x.dtype)


# -- the number format ----------------------------------------------------------------------------


def nearest(x: float) -> float:
    """The e4m3 number next to x, ties to even mantissas: written from the format and not from torch."""
    if abs(x) >= 448:
        return math.copysign(448, x)
    step = 2.0 ** (max(math.frexp(x)[1] - 1, -6) - 3) if x else 1.0
    return round(x / step) * step


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_those_of_the_format(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(20, 16) * 10.0 ** torch.randint(-3, 4, (20, 1))).to(dtype)
    y = quantize(x)
    scale = y[:, 16:].clone().view(torch.float32)
    assert torch.equal(scale[:, 0], (x.double().abs().amax(-1) / 448).float())
    wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = [[nearest(v) for v in row] for row in (wide / scale).tolist()]
    assert torch.equal(y[:, :16].clone().view(torch.float8_e4m3fn).double(), torch.tensor(expected).double())
    assert torch.equal(there_and_back(x), (torch.tensor(expected).to(wide.dtype) * scale).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_gaussian_row_keeps_97_3_percent(width: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        x = torch.randn(400, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
        apart = there_and_back(x).double() - x.double()
        assert 0.02 < float(apart.norm() / x.double().norm()) <= 0.027
        assert bool((apart.abs() <= error_bound(x)).all())


def test_the_bound_is_half_a_unit_in_the_last_place() -> None:
    """Tight: 447/448 of a tie is attained, and no larger number of the format would do."""
    x = torch.tensor([[448.0, 17.0, 2.0**-9 * 1.5, 2.0**-10]])
    assert there_and_back(x).tolist() == [[448.0, 16.0, 2.0**-8, 0.0]]  # ties go to even mantissas
    assert error_bound(x)[0, 1:].tolist() == pytest.approx([17 / 16, 2.0**-10, 2.0**-10], rel=1e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_zeros_and_tiny_rows(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([[0.0, 0.0, -0.0], [tiny, -3 * tiny, 0.5 * tiny], [2.0**-20, 2.0**-9, -(2.0**-12)]], dtype=dtype)
    y = there_and_back(x)
    assert y[0].tolist() == [0, 0, 0] and bool(torch.isfinite(y).all())
    assert bool(((y.double() - x.double()).abs() <= error_bound(x)).all())


def test_what_is_not_finite_stays_where_it_was() -> None:
    x = torch.randn(6, 32)
    clean = there_and_back(x)
    bad = x.clone()
    bad[1, 3], bad[2, 0], bad[4, 31] = math.nan, math.inf, -math.inf
    bad[5] = math.nan
    y = there_and_back(bad)
    assert torch.equal(torch.isnan(y), ~torch.isfinite(bad))
    largest = x.abs().argmax(-1)
    for row in (0, 1, 2, 3, 4):  # the others as without it, unless it stood where the scale came from
        kept = torch.isfinite(bad[row])
        assert torch.equal(y[row][kept], clean[row][kept]) or not kept[largest[row]]
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


def test_a_row_that_float32_cannot_scale_shows() -> None:
    x = torch.tensor([[1e60, 1.0], [3e38, 2e38]], dtype=torch.float64)
    y = there_and_back(x)
    assert bool(y[0].isnan().all()) and float(y[1, 0]) == pytest.approx(3e38)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5), (1, 1), (7,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert quantize(x).shape == (*shape[:-1], shape[-1] + 4) and there_and_back(x).shape == shape
    assert torch.equal(from_bytes(to_bytes(x), x.dtype), x)


def test_a_single_number_is_bytes_whatever_its_stride() -> None:
    """In a message of several dtypes; torch views as bytes only what has stride 1, also where there is no next."""
    number, other = torch.arange(14.0)[3::7][:1], torch.tensor([1, 2], dtype=torch.uint8)
    assert number.stride() == (7,)
    sent = pack([number, other], [0, 1, 0, 1, 1, 1, 0, 2])
    assert sent[:4].clone().view(torch.float32).tolist() == [3.0] and sent[4:].tolist() == [1, 2]


def test_operators_are_what_torch_expects_of_one() -> None:
    x = torch.randn(3, 5, 7)
    for target, args in ((quantize, (x.mT,)), (dequantize, (quantize(x), torch.bfloat16)),
                         (to_bytes, (x.mT,)), (from_bytes, (to_bytes(x), x.dtype))):  # fmt: skip
        torch.library.opcheck(target, args)


# -- the sender's scale -----------------------------------------------------------------------------


def test_ranks_of_other_magnitudes() -> None:
    """A receiver that scaled by its own rows (FastUSP, algorithm 1) would be off by the ratio: 25% at 1.3."""
    mesh = Mesh((("sp", 2),))
    src, dst = Layout.parse("[4, 12@sp(6,6), 64]"), Layout.parse("[4@sp(2,2), 12, 64]")
    torch.manual_seed(0)
    x = torch.randn(4, 12, 64)
    x[:, 6:] *= 1.3 * x[:, :6].abs().max() / x[:, 6:].abs().max()
    shares = [take(x, src, mesh, r) for r in range(2)]
    wide = [layout.with_dim(2, Layout.parse("[68]").dims[0]) for layout in (src, dst)]
    got = [dequantize(y, x.dtype) for y in across([quantize(s) for s in shares], *wide, mesh)]
    true = [take(x, dst, mesh, r) for r in range(2)]
    assert all(float((a - b).norm() / b.norm()) <= 0.027 for a, b in zip(got, true, strict=True))
    scales = [s.abs().max() / 448 for s in shares]
    units = [(s / scale).to(torch.float8_e4m3fn).float() for s, scale in zip(shares, scales, strict=True)]
    receivers = [y * scale for y, scale in zip(across(units, src, dst, mesh), scales, strict=True)]
    errors = [float((a - b)[:, 6 - 6 * r : 12 - 6 * r].norm() / b[:, 6 - 6 * r : 12 - 6 * r].norm())
              for r, (a, b) in enumerate(zip(receivers, true, strict=True))]  # fmt: skip
    assert all(error > 0.2 for error in errors)  # of the rows that came from the other rank


# -- plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("letters", ["qvo", "v", "k", "qkvo"])
def test_ranks_compute_one_rounded_function(plan: str, letters: str) -> None:
    """11 rows, 4 heads: also uneven shares and heads that do not divide. The error is not the ranks'."""
    if {"ulysses=3", "torus=3"} & {plan} and letters == "qvo":
        letters = "qkvo"
    report = fastpar.verify(attention(), plan=f"{plan},fp8({letters})")
    assert report.ok, report.notes
    assert 1e-4 < report.max_rel_err <= report.tolerance < 0.1
    assert any(note.startswith(f"lossy: fp8({letters})") for note in report.notes)


def test_the_error_does_not_depend_on_the_ranks() -> None:
    """One function for all numbers of ranks, and for a ring what gathering everything gives."""
    x = attention().programs[0]
    outs = []
    for plan in ("ring=2", "ring=3", "ring=5", "gather=2", "gather=4", "ulysses=2,ring=2"):
        built = build(x.program, f"{plan},fp8(kv)")
        programs = [built.localise(r) for r in range(built.mesh.ranks)]
        outs += [result[0] for result in run_local(programs, list(x.args))]
    assert all(torch.allclose(o, outs[0], rtol=0, atol=1e-14) for o in outs)


def test_every_tensor_is_within_its_bound_and_nothing_else_strays() -> None:
    recorded = attention(tokens=33, width=32).programs[0]
    exact = recorded.program.gm(*recorded.args)
    for plan in PLANS:
        built = build(recorded.program, f"{plan},fp8(qkvo)")
        own = rounded(built.lowered, list(recorded.args))
        assert 0.9 < own.worst <= 1 and own.strayed(exact, [1e-12]) == []
        assert torch.allclose(own.unrounded[0], exact[0], rtol=0, atol=1e-13)
        assert own.strayed([own.outputs[0]], [1e-12]) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["ulysses=2", "ring=3", "cfg=2,ulysses=2"])
def test_narrow_models(plan: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs(2))
    report = fastpar.verify(Block().to(dtype).eval(), args, plan=f"{plan},fp8(qkvo)")
    assert report.ok and report.tolerance < 0.2, (report.max_rel_err, report.tolerance, report.notes)


def test_a_mistake_that_rounding_could_hide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's rows off by a hundredth, a third of what rounding does: far inside the plan's own error."""
    import fastpar.backends.simulate.lockstep as lockstep
    from fastpar.run import verify as module

    def nudged(programs: object, args: list[object]) -> list[tuple[torch.Tensor, ...]]:
        results = lockstep.run_local(programs, args)  # type: ignore[arg-type]
        return [tuple(x * 1.001 for x in r) for r in results]

    monkeypatch.setattr(module, "run_local", nudged)
    report = fastpar.verify(attention(), plan="ulysses=2,fp8(qvo)")
    assert not report.ok and any("from the same rounding on one device" in note for note in report.notes)


def test_after_every_pass() -> None:
    from fastpar.graph.pipeline import Pipeline
    from fastpar.plan.expand import mesh_for
    from fastpar.registry import PASSES
    from fastpar.run.each import prove_each

    recorded = attention().programs[0]
    usp = "shard,attention-ulysses{axes=ulysses},attention-ring"
    for text in (f"{usp},cancel,quantize{{what=qkvo}},lower,localise{{rank=1}}", f"{usp},quantize,cancel,lower"):
        plan = Plan.parse("ulysses=2,ring=2,fp8(qkvo)")
        proofs = prove_each(recorded, Pipeline.parse(text, PASSES), mesh_for(plan, recorded.program.graph), plan)
        assert all(p.ok for p in proofs), proofs
        assert [p.off is not None for p in proofs] == [p.lossy for p in proofs]
        assert max(p.error for p in proofs) > 1e-3 and max(p.off or 0 for p in proofs) < 1e-12
        assert not replace(proofs[-1], off=1e-6).ok


# -- what is rounded and what is not ----------------------------------------------------------------


def lowered(plan: str, captured: fastpar.Captured | None = None) -> str:
    """The program as written: ``overlap`` would put what takes no time where it is first needed."""
    passes = pipeline_text(Plan.parse(plan), schedule=False)
    return code(build((captured or attention()).programs[0].program, plan, passes=passes).lowered)


def test_golden_ulysses() -> None:
    """q, v and o are bytes on their way; k is not touched."""
    text = lowered("ulysses=2,fp8(qvo)")
    FileCheck().check_count("fastpar.quantize", 3, exactly=True).run(text)
    FileCheck().check_count("fastpar.dequantize", 3, exactly=True).run(text)
    there = FileCheck().check("fastpar.quantize").check("fastpar.all_to_all").check("fastpar.dequantize")
    back = there.check("fastpar.attention").check("fastpar.quantize").check("fastpar.all_to_all")
    back.check("fastpar.dequantize").check("aten.tanh").run(text)
    FileCheck().check_not("to_bytes").check_not("from_bytes").run(text)


def test_golden_ring() -> None:
    """Rounded once; all hops are of bytes, K's own beside V's; each is started before the block at hand is attended,
    and made numbers of after that."""
    text = lowered("ring=3,fp8(qvo)")
    FileCheck().check_count("fastpar.quantize", 1, exactly=True).run(text)
    FileCheck().check_count("fastpar.to_bytes", 1, exactly=True).run(text)
    FileCheck().check_count("fastpar.all_to_all", 3, exactly=True).run(text)  # two steps, and the output
    own = FileCheck().check("fastpar.quantize").check("fastpar.all_to_all").check("fastpar.dequantize")
    came = own.check("fastpar.attention_lse").check("fastpar.from_bytes").check("fastpar.dequantize")
    came.check("fastpar.attention_lse").check("fastpar.merge").run(text)
    second = text.split("fastpar.all_to_all")[2]
    FileCheck().check("fastpar.attention_lse").check("fastpar.from_bytes").check("fastpar.attention_lse").run(second)


def roles(plan: str, captured: fastpar.Captured | None = None) -> dict[str, list[torch.dtype]]:
    """Dtypes in which q, k, v and what an attention gives travel, found by their exchanges' places."""
    written = pipeline_text(Plan.parse(plan), schedule=False)
    built = build((captured or attention()).programs[0].program, plan, passes=written)
    found: dict[str, list[torch.dtype]] = {"before": [], "after": []}
    side = "before"
    for node in built.lowered.graph.nodes:
        name = str(node.target)
        side = "after" if "fastpar.attention" in name else side
        if "all_to_all" in name or "all_gather" in name:
            if node.meta.get("why") != "output":
                xs = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
                found[side] += [x.meta["val"].dtype for x in xs]
    return found


@pytest.mark.parametrize("plan", ["ulysses=2,fp8(qvo)", "gather=3,fp8(v)"])
def test_bytes_and_numbers_travel_in_one_message(plan: str) -> None:
    """K as it is beside Q and V in 8 bits: messages are bytes, as many as the three have alone."""
    captured = attention()
    passes = pipeline_text(Plan.parse(plan), schedule=False)
    apart, packed = (fastpar.verify(captured, plan=plan, passes=passes + p) for p in ("", ",pack"))
    assert apart.ok and packed.ok and packed.max_rel_err == apart.max_rel_err
    assert packed.bytes_per_rank == apart.bytes_per_rank
    built = build(captured.programs[0].program, plan, passes=passes + ",pack")
    exchanges = [n for n in built.lowered.graph.nodes if n.target in COLLECTIVES and n.meta.get("why") == "attention"]
    assert len(exchanges) == (2 if "ulysses" in plan else 1)
    assert len({x.meta["val"].dtype for x in exchanges[0].args[0]}) == 2


def test_keys_stay_as_they_are_unless_asked_for() -> None:
    byte, own = torch.uint8, torch.float64
    assert roles("ulysses=2") == {"before": [own] * 3, "after": [own]}
    assert roles("ulysses=2,fp8(qvo)") == {"before": [byte, own, byte], "after": [byte]}
    assert roles("ulysses=2,fp8(k)") == {"before": [own, byte, own], "after": [own]}
    assert roles("gather=2,fp8(v)")["before"] == [own, byte]


def test_a_bound_on_keys_alone() -> None:
    """fp8(qvo) leaves every bit of K: with values and queries that e4m3 has exactly, nothing changes."""
    torch.manual_seed(0)
    q = torch.randint(-3, 4, (1, 4, 8, 8)).double()
    q[..., 0] = 7.0  # twice that over 448 is a power of two
    captured = fastpar.capture(lambda q: F.scaled_dot_product_attention(q * 2, q.sin(), q * 2).tanh(), (q,))
    for plan in ("ring=2", "gather=2", "ulysses=2", "torus=2"):
        assert fastpar.verify(captured, plan=f"{plan},fp8(qv)").max_rel_err < 1e-12
        assert fastpar.verify(captured, plan=f"{plan},fp8(k)").max_rel_err > 1e-3


class Picture(torch.nn.Module):
    """Convolutions over rows (halos), and between them one of all rows, sorted (a gather)."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3, padding=1)
        self.between = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.between(self.inward(x).relu())
        return self.outward(x.sort(2).values).tanh()


def test_halos_and_other_gathers() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 12, 10).double()
    captured = fastpar.capture(Picture().double().eval().requires_grad_(False), (x,))
    exact = fastpar.verify(captured, plan="gather=2")
    sent = {}
    for letters in ("h", "g", "gh"):
        report = fastpar.verify(captured, plan=f"gather=2,fp8({letters})")
        assert report.ok and report.max_rel_err > 1e-4, report.notes
        sent[letters] = report.bytes_per_rank
    assert sent["gh"] < min(sent["h"], sent["g"]) and max(sent.values()) < exact.bytes_per_rank
    with pytest.raises(PlanError, match="would round nothing: what could be is g, h"):
        fastpar.explain(captured, plan="gather=2,fp8(kv)")


def test_what_is_left_alone_is_said() -> None:
    wide = attention(width=4, dtype=torch.bfloat16)  # 8 bytes a row, and 8 with a scale
    with pytest.raises(PlanError, match="would round nothing: [qvo] has rows of 4 x 2 bytes, which a scale ma"):
        fastpar.explain(wide, plan="ulysses=2,fp8(qvo)")
    notes = fastpar.explain(attention(), plan="ring=2,fp8(qvo)").notes
    assert "fp8: nothing of q, o travels" in notes
    x = torch.randn(1, 8, 6).double()
    direct = fastpar.capture(lambda x: F.scaled_dot_product_attention(x * 2, x.sin(), x.cos()), (x,))
    notes = fastpar.explain(direct, plan="gather=2,fp8(gv)").notes
    assert not any("is an output" in n for n in notes)  # outputs are no gather that a letter asks for
    assert [row_bytes(4, 2), row_bytes(3, 2), row_bytes(128, 2), row_bytes(128, 2, False)] == [8, 6, 132, 256]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("gather=2,fp8(qo)", "nothing of q, o travels under it; only k, v, g, h can"),
        ("cfg=2,fp8(qvo)", "only g can"),
        ("ulysses=1,fp8(q)", "nothing does"),
        ("ring=2,fp8(x)", "fp8 does not know 'x'"),
    ],
)
def test_plans_under_which_nothing_of_it_travels(plan: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        fastpar.explain(attention(), plan=plan)


def test_passes_do_not_round_what_the_plan_does_not() -> None:
    for plan, passes in (
        ("ulysses=2", "shard,attention-ulysses,cancel,quantize,lower"),
        ("ulysses=2,fp8(v)", "shard,attention-ulysses,cancel,quantize,lower"),
        ("ulysses=2,fp8(v)", "shard,attention-ulysses,cancel,lower"),
    ):
        with pytest.raises(OptionError, match="disagree with plan"):
            fastpar.explain(attention(), plan=plan, passes=passes)


# -- bytes ------------------------------------------------------------------------------------------


def test_bytes_are_the_formula() -> None:
    """bf16 at a width of 128: 0.637 of Ulysses' bytes, and for every plan and letter what the form says."""
    captured = attention(tokens=64, width=128, dtype=torch.bfloat16, heads=8)
    for plan in ("ulysses=2", "ulysses=4", "ulysses=8", "ring=4", "gather=4", "torus=2", "torus=4", "ulysses=2,ring=2",
                 "torus=2,ring=2", "torus=2,ulysses=2"):  # fmt: skip
        exact = fastpar.explain(captured, plan=plan)
        outputs = sum(c.bytes for c in exact.collectives if c.why == "output")
        for letters in ("qvo", "v", "qkvo"):
            report = fastpar.explain(captured, plan=f"{plan},fp8({letters})")
            assert report.bytes_per_rank == report.bytes_formula, (plan, letters)
            assert "f = (D + 4)/(b*D)" in report.formula and any(x in report.formula for x in ("Q*f", "K*f", "(f/2"))
            if letters == "qvo" and plan in ("ulysses=2", "ulysses=4", "ulysses=8", "torus=2", "torus=4"):
                ratio = (report.bytes_per_rank - outputs) / (exact.bytes_per_rank - outputs)
                assert ratio == pytest.approx((3 * 132 / 256 + 1) / 4) and round(ratio, 3) == 0.637
        assert not any(x in exact.formula for x in ("Q*f", "K*f", "(f/2", "f ="))


def test_the_planner_predicts_it_and_never_takes_it() -> None:
    work = workload(attention(tokens=64, width=128, dtype=torch.bfloat16, heads=8).programs[0].program)
    slow = load("l40-8")
    for plan in ("ulysses=4", "ring=4", "gather=4", "torus=2,ulysses=2"):
        exact, fp8 = (predict(work, Plan.parse(text), slow) for text in (plan, f"{plan},fp8(qvo)"))
        assert fp8.bytes < exact.bytes and fp8.communication < exact.communication and fp8.compute > exact.compute
    sent = fastpar.explain(attention(tokens=64, width=128, dtype=torch.bfloat16, heads=8), plan="ulysses=4,fp8(qvo)")
    assert predict(work, Plan.parse("ulysses=4,fp8(qvo)"), slow).bytes == pytest.approx(sent.bytes_per_rank)
    choice = choose(work, 4, slow)
    assert not any(v.prediction and v.prediction.plan.lossy for v in choice.verdicts)


def test_ranks_start_the_same_collectives() -> None:
    for plan in PLANS:
        built = build(attention().programs[0].program, f"{plan},fp8(qkvo)")
        check_order([built.localise(r) for r in range(built.mesh.ranks)])


# -- processes --------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_real_processes() -> None:
    """Over gloo, which knows no 8-bit floats: every rank has the bits of one device's rounding, and of each other."""
    plans = ["ulysses=2,fp8(qvo)", "ring=2,fp8(qvo)", "torus=2,fp8(qkvo)", "gather=2,fp8(v)"]
    assert torchrun(*plans, script="tests.scripts.rounded", ranks=2).count("off by") == 2 * len(plans)


@pytest.mark.distributed
@pytest.mark.slow
def test_real_processes_on_two_axes_and_inductor() -> None:
    plans = ["ulysses=2,ring=2,fp8(qvo)", "cfg=2,ulysses=2,fp8(qkvo)", "ulysses=4,fp8(qvo):inductor"]
    assert torchrun(*plans, script="tests.scripts.rounded", ranks=4).count("off by") == 4 * len(plans)
