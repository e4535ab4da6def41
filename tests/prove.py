"""One program on N virtual ranks against eager, after every pass and at the end.

``prove`` is what the property tests and the named regressions share. It raises
AssertionError, or whatever the compiler raises, with a note that says where on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastpar.backends.onesided.rewrite import of_all, planned, rewrite
from fastpar.backends.simulate import passed_on, run_calls, run_global, run_interleaved, run_local, with_carried
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.check import check, check_order
from fastpar.graph.count import EXCHANGES
from fastpar.graph.pipeline import Pass, PassContext, Pipeline
from fastpar.graph.program import Program
from fastpar.passes.localise import Localise
from fastpar.plan.durations import durations
from fastpar.plan.expand import mesh_for, pipeline_text
from fastpar.registry import PASSES
from fastpar.rules import Call
from fastpar.run.rounded import rounded, rounds
from tests.programs import Case

TOLERANCE = 1e-9  # largest difference over the largest value, per output


@dataclass(frozen=True)
class Way:
    """How a program is cut: the mesh, and a pipeline that ends in ``lower``."""

    mesh: Mesh
    pipeline: str

    @staticmethod
    def of(plan: str, program: Program, order: Sequence[str] = ()) -> Way:
        """What a plan expands to for this program, its axes in ``order``; the plan's text must round trip."""
        parsed = Plan.parse(plan)
        assert Plan.parse(str(parsed)) == parsed
        return Way(mesh_for(parsed, program.graph, order), pipeline_text(parsed))


INTERLEAVINGS = 2
"""Seeds per proof; ``tests/test_schedule.py`` takes fifty on a few programs."""


@dataclass
class Seen:
    """What one proof went through; the statistics add these up."""

    ranks: int = 1
    communicates: bool = False
    uneven: bool = False
    empty: bool = False  # some rank has no rows of some value
    split: bool = False
    operators: Counter[str] = field(default_factory=Counter)  # those with a split operand or result
    collectives: Counter[str] = field(default_factory=Counter)


def prove(case: Case, way: Way, passes: Mapping[str, Callable[[], type[Pass]]] = PASSES, bits: bool = True) -> Seen:
    """Run ``case`` through ``way``: exact, well-formed and in order at every stage. Returns what was seen.

    A way that rounds what travels is as exact, against the same rounding on one device.

    ``bits`` demands equal bits on all ranks, which holds where no row is computed in two places.
    """
    pipeline = Pipeline.parse(way.pipeline, passes)
    assert Pipeline.parse(str(pipeline), passes) == pipeline
    mesh = way.mesh
    assert Mesh.parse(str(mesh)) == mesh
    bits = bits and not mesh.strides  # with which each rank has its own rows of now, and others' of before
    start = case.program.copy()
    start.mesh = mesh
    ctx = PassContext(mesh=mesh, costs=durations(mesh))
    expected = case.expected

    def between(previous: Pass | None, now: Program, following: Pass | None, seconds: float) -> None:
        nonlocal expected
        with _noted(f"after {previous.spec() if previous else 'capture'}"):
            check(now)
            if rounds(now):  # from here on the ranks compute another function, which differs by rounding alone
                own = rounded(now.first or now, case.args)
                assert own.strayed(case.expected, [TOLERANCE] * len(case.expected)) == []
                expected = own.outputs
            _text_round_trips(now)
            if now.stage == "captured":
                agree([tuple(now.gm(*case.args))], expected, bits)
            else:
                agree(results(now, run_global(now, with_carried(now, case.args))), expected, bits)

    with torch.no_grad(), _noted(f"{case.recipe!r}\n{way!r}"):
        lowered = pipeline.run(start, ctx, between)
        programs = [Localise(rank=r).apply(lowered, ctx) for r in range(mesh.ranks)]
        with _noted("localised"):
            for program in programs:
                check(program)
            check_order(programs)
            given = with_carried(lowered, case.args)
            together = run_local(programs, given)
            agree(results(lowered, together), expected, bits)
        for seed in range(INTERLEAVINGS):
            with _noted(f"interleaving {seed}"):
                for mine, others in zip(run_interleaved(programs, given, seed), together, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
        if lowered.first is not None:  # what is kept outlives a call, and so is not one-sided
            with _noted("after a step with other inputs"):
                _late(case, lowered, programs)
            return _seen(lowered, mesh)
        with _noted("one-sided"):
            heaps = planned(of_all(lowered, mesh), "h", spare=0)  # as little room as there can be
            sided = [rewrite(p, r, heaps) for r, p in enumerate(programs)]
            for outputs in run_calls(sided, [case.args] * 2, 0):  # one behind the other, without a barrier
                for mine, others in zip(outputs, together, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    return _seen(lowered, mesh)


def results(program: Program, outputs: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Without what is for the next call."""
    return [row[: len(program.results)] for row in outputs]


def _late(case: Case, lowered: Program, programs: list[Program]) -> None:
    """Where the step before had other inputs, the localised programs do what the lowered one says, which all ranks
    together are right about: equal bits of all outputs (but where ranks have strides), and what they keep."""
    assert lowered.first is not None
    before = [x * 0.5 if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case.args]
    given = [*case.args, *passed_on(lowered, run_global(lowered.first, before))]
    together, apart = run_global(lowered, given), run_local(programs, given)
    if not lowered.mesh.strides:
        agree(results(lowered, apart), results(lowered, together)[0], True)
    for mine, theirs in zip(apart, together, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9)


def agree(results: list[tuple[Any, ...]], expected: tuple[torch.Tensor, ...], bits: bool) -> None:
    """Every rank's outputs are eager's up to the order of sums, and (``bits``) the same on all ranks."""
    for rank, outputs in enumerate(results):
        for i, (mine, first, true) in enumerate(zip(outputs, results[0], expected, strict=True)):
            assert mine.shape == true.shape, f"output {i} of rank {rank} is {list(mine.shape)}, not {list(true.shape)}"
            assert not bits or torch.equal(mine, first), f"output {i}: rank {rank} has other bits than 0"
            scale = max(float(true.abs().max()), 1e-30) if true.numel() else 1.0
            error = float((mine - true).abs().max()) / scale if true.numel() else 0.0
            assert error <= TOLERANCE, f"output {i} of rank {rank} is off by {error:.1e}"


def _text_round_trips(program: Program) -> None:
    for node in program.graph.nodes:
        layout = node.meta.get("layout")
        for one in layout if isinstance(layout, tuple) else (layout,):
            assert one is None or Layout.parse(str(one)) == one, f"{one} does not round trip"


class _noted:
    """Adds a line to what goes wrong inside."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            error.add_note(self.text)


def _layouts(node: fx.Node) -> list[Layout]:
    layout = node.meta.get("layout")
    return [x for x in (layout if isinstance(layout, tuple) else (layout,)) if x is not None]


def _seen(lowered: Program, mesh: Mesh) -> Seen:
    seen = Seen(ranks=mesh.ranks)
    for node in lowered.graph.nodes:
        if node.op != "call_function":
            continue
        name = Call.of(node).name
        if node.target in EXCHANGES:
            seen.communicates = True
            seen.collectives[name] += 1
            continue
        layouts = [x for n in (node, *node.all_input_nodes) for x in _layouts(n)]
        if all(x.is_whole for x in layouts):
            continue
        seen.split = True
        seen.operators[name] += 1
        shares = {x.local_shape(mesh, r) for x in _layouts(node) for r in range(mesh.ranks)}
        seen.uneven |= len(shares) > len(_layouts(node))
        seen.empty |= any(0 in share for share in shares)
    return seen


@dataclass
class Statistics:
    """Sums over cases, and what must hold of them lest the proofs become empty."""

    cases: list[Seen] = field(default_factory=list)

    def add(self, seen: Seen) -> None:
        self.cases.append(seen)

    def share(self, what: str) -> float:
        return sum(bool(getattr(c, what)) for c in self.cases) / max(1, len(self.cases))

    def lines(self) -> list[str]:
        operators: Counter[str] = Counter()
        collectives: Counter[str] = Counter()
        for c in self.cases:
            operators.update(c.operators.keys())
            collectives.update(c.collectives.keys())
        ranks = Counter(c.ranks for c in self.cases)
        n = len(self.cases)
        return [
            f"{n} cases: {self.share('communicates'):.0%} communicate, {self.share('split'):.0%} have split values, "
            f"{self.share('uneven'):.0%} uneven parts, {self.share('empty'):.0%} empty parts",
            "ranks: " + ", ".join(f"{r}: {k}" for r, k in sorted(ranks.items())),
            "collectives (cases): " + _counts(collectives),
            f"{len(operators)} operators on split values (cases): " + _counts(operators),
        ]

    def demand(self, communicates: float = 0.8, uneven: float = 0.5) -> None:
        """Fail where too few cases communicate or have uneven parts."""
        assert self.share("communicates") >= communicates, "too few programs communicate: " + self.lines()[0]
        assert self.share("uneven") >= uneven, "too few programs have uneven parts: " + self.lines()[0]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name.split('::')[-1]} {k}" for name, k in counter.most_common())
