"""Any program, any plan, any number of ranks: exact after every pass (layer 3 of the proofs).

Random programs (``tests/programs.py``) go through plans and hand-written pipelines. After every
pass the ranks together must give what eager gives, and the structural checker must agree. Run
with ``-rP`` or ``-s`` to see the statistics, which are also demanded: a generator whose programs
do not communicate would prove nothing.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fastpar.core.errors import PlanError
from fastpar.core.mesh import Mesh
from fastpar.core.plan import Plan
from fastpar.graph.pipeline import Pass
from fastpar.passes.attention_torus import AttentionTorus
from fastpar.passes.attention_ulysses import AttentionUlysses
from fastpar.passes.hoist import Hoist
from fastpar.passes.overlap import Overlap
from fastpar.passes.pack import Pack
from fastpar.passes.quantize import Quantize
from fastpar.passes.shard import Shard
from fastpar.passes.split_weights import SplitWeights
from fastpar.run.build import build as built
from fastpar.run.meeting import cycle
from fastpar.run.steps import Stepping
from tests.programs import Recipe, build, recipes
from tests.prove import Seen, Statistics, Way, agree, prove
from tests.scatter import PASSES, Scatter

MOST = 8  # ranks
TOGETHER = (
    ("ulysses",), ("ring",), ("torus",), ("gather",), ("tp",), ("cfg",), ("ulysses", "ring"), ("torus", "ring"),
    ("torus", "ulysses"), ("cfg", "ulysses"), ("cfg", "ring"), ("cfg", "torus"),
    ("cfg", "gather"), ("cfg", "tp"), ("ulysses", "tp"), ("ring", "tp"), ("torus", "tp"), ("gather", "tp"),
    ("cfg", "ulysses", "ring"), ("cfg", "torus", "ring"), ("cfg", "ulysses", "tp"), ("ulysses", "ring", "tp"),
)  # fmt: skip


def degrees(term: str, alone: bool) -> Iterable[int]:
    """Guidance has two halves; machines of a torus are few; a degree of 1 is for what can be told from it."""
    return {"cfg": range(2, 3), "torus": range(1 if alone else 2, 5)}.get(term, range(1 if alone else 2, MOST + 1))


def plans(terms: tuple[str, ...]) -> list[str]:
    """All plans of these terms (ulysses x ring also with 1 of either) on at most ``MOST`` ranks."""
    every = product(*(degrees(t, len(terms) == 1 or terms == ("ulysses", "ring")) for t in terms))
    return [",".join(map("{}={}".format, terms, n)) for n in every if math.prod(n) <= MOST]


MESHES = (
    Mesh((("ring", 2), ("sp", 3))),
    Mesh((("ring", 3), ("sp", 2))),
    Mesh((("ring", 2), ("sp", 2))),
    Mesh((("a", 2), ("b", 2), ("c", 2))),
)


@st.composite
def ways(draw: st.DrawFn) -> Way:
    """Pipelines by hand: some axes split tokens (in any order), the others hold replicas."""
    mesh = draw(st.sampled_from(MESHES))
    axes = draw(st.permutations(mesh.names))
    used = axes[: draw(st.integers(1, len(axes)))]
    schedules = ["attention-ulysses", "attention-gather", "attention-ring", "attention-torus"]
    for count in range(1, len(used)):  # heads take some axes, and what follows takes the rest
        heads = AttentionUlysses(mesh.ordered(set(used[:count]))).spec()
        schedules += [f"{heads},{then}" for then in ("attention-gather", "attention-ring", "attention-torus")]
        schedules.append(f"{AttentionTorus(mesh.ordered(set(used[:count]))).spec()},attention-ring")
    steps = [Shard(tuple(used)).spec(), draw(st.sampled_from(schedules))]
    if draw(st.booleans()):
        steps.append("cancel")
    return Way(mesh, ",".join([*steps, "lower"]))


@st.composite
def scattered(draw: st.DrawFn) -> Way:
    """Values in random layouts, which no plan makes but every rule must take."""
    mesh = draw(st.sampled_from((Mesh((("sp", 3),)), Mesh((("sp", 2),)), Mesh((("sp", 5),)), *MESHES)))
    steps = [Scatter(draw(st.sampled_from((5, 10, 20, 40))), draw(st.integers(0, 10**6))).spec()]
    steps.append(draw(st.sampled_from(["attention-ulysses", "attention-gather", "attention-ring", "attention-torus"])))
    if draw(st.booleans()):
        steps.append("cancel")
    after: list[Pass] = [p for p in (SplitWeights(always=True), Hoist()) if draw(st.booleans())]
    after += draw(st.sampled_from(((), (Pack(),), (Pack(ahead=True),), (Overlap(),), (Overlap(memory=0.0),))))
    return Way(mesh, ",".join([*steps, "lower", *(p.spec() for p in after)]))


def _with_plan(recipe: Recipe, plan: str, shuffle: int) -> Seen:
    """Axes in any order, as a topology may place them; guidance has two halves to split; ranks of unequal speeds."""
    case = build(replace(recipe, batch=max(2, recipe.batch)) if "cfg" in plan else recipe)
    parsed, chance = Plan.parse(plan), random.Random(shuffle)
    names = [name for name, _ in parsed.axes]
    chance.shuffle(names)
    if shuffle and parsed.token_degree > 1:
        speeds = tuple(chance.choice((1.0, 0.6, 0.25, 3.0)) for _ in range(parsed.token_degree))
        plan = str(replace(parsed, speeds=speeds))
    return prove(case, Way.of(plan, case.program, names if shuffle else ()))


def _rounding(recipe: Recipe, plan: str, letters: str) -> Seen:
    """The plan with ``letters`` rounded; where nothing of them travels it must say so."""
    case = build(replace(recipe, batch=max(2, recipe.batch)) if "cfg" in plan else recipe)
    exact = Way.of(plan, case.program)
    way = Way(exact.mesh, exact.pipeline.replace(",lower", f",{Quantize(letters).spec()},lower"))
    try:
        return prove(case, way)
    except PlanError as error:
        assert "would round nothing" in str(error)
        return Seen(ranks=way.mesh.ranks)


def _run(
    cases: int, check: Callable[..., Seen], *strategies: st.SearchStrategy, statistics: Statistics | None = None
) -> Statistics:
    """``cases`` random cases through ``check``; their statistics, added to those given.

    In batches of ten: beyond that hypothesis mostly varies what it had, and here variety is what counts.
    """
    statistics = statistics or Statistics()
    seen: set[object] = set()
    start = 0 if os.environ.get("CI") else random.randrange(10**6)
    for batch, begin in enumerate(range(0, cases, 10)):

        @seed(start + batch)
        @settings(max_examples=min(10, cases - begin), suppress_health_check=list(HealthCheck), print_blob=False)
        @given(st.tuples(*strategies))
        def prove_all(drawn: tuple[object, ...]) -> None:
            if repr(drawn) not in seen:
                statistics.add(check(*drawn))
                seen.add(repr(drawn))

        prove_all()
    return statistics


def _demand(statistics: Statistics) -> None:
    print("\n" + "\n".join(statistics.lines()))
    statistics.demand()


def _under_all(cases: int, steps: int) -> None:
    """``cases`` for every set of terms that can stand together.

    Hypothesis begins with the simplest case, one block on one token, and here that would be half of them.
    """
    statistics, some = Statistics(), recipes(steps).filter(lambda r: r.tokens > 1 or len(r.steps) > 1)
    for terms in TOGETHER:
        _run(cases, _with_plan, some, st.sampled_from(plans(terms)), st.sampled_from((0, 1, 2)), statistics=statistics)
    _demand(statistics)


def test_plans_are_exact_after_every_pass() -> None:
    _under_all(2, 4)


def _by_hand(recipe: Recipe, way: Way) -> Seen:
    return prove(build(recipe), way)


def _scattered(recipe: Recipe, way: Way) -> Seen:
    return prove(build(recipe), way, PASSES, bits=False)


def test_meshes_of_several_axes_are_exact_after_every_pass() -> None:
    _demand(_run(20, _by_hand, recipes(), ways()))


LETTERS = st.sampled_from(("qvo", "kv", "qkvo", "qkvog", "qkvogh"))
ANY_PLAN = st.sampled_from(TOGETHER).flatmap(lambda terms: st.sampled_from(plans(terms)))


def test_plans_that_round_compute_one_function() -> None:
    _run(12, _rounding, recipes(), ANY_PLAN, LETTERS).demand(0.2, 0.05)  # of a dozen, half may be short of half


def _displaced(recipe: Recipe, plan: str, gn: str, letters: str) -> Seen:
    """The plan a step late: right after a step with the same inputs; after another one, as its stages say."""
    case = build(replace(recipe, batch=max(2, recipe.batch)) if "cfg" in plan else recipe)
    way = Way.of(f"{plan},displaced(gn={gn})", case.program)
    if letters:
        way = replace(way, pipeline=way.pipeline.replace(",lower", f",{Quantize(letters).spec()},lower"))
    try:
        return prove(case, way)
    except PlanError as error:
        if "would round nothing" not in str(error):
            raise
        return Seen(ranks=way.mesh.ranks)


GATHERS = st.sampled_from([t for t in TOGETHER if "gather" in t]).flatmap(lambda terms: st.sampled_from(plans(terms)))
NORMS, NONE_OR_SOME = st.sampled_from(("corrected", "stale", "sync")), st.sampled_from(("", "", "kv", "qkvogh"))


def test_displaced_plans_settle() -> None:
    _run(12, _displaced, recipes(), GATHERS, NORMS, NONE_OR_SOME).demand(0.2, 0.05)


def _strided(recipe: Recipe, plan: str, gn: str, letters: str, strides: list[int]) -> Seen:
    """Ranks that run the model in some steps only: from step to step of two cycles with the same inputs."""
    row = ":".join(str(stride) for stride, _ in zip(strides, range(Plan.parse(plan).gather or 1), strict=False))
    case = build(replace(recipe, batch=max(2, recipe.batch)) if "cfg" in plan else recipe)
    try:
        seen = _displaced(recipe, plan, f"{gn}),steps({row}", letters)
        stepping = Stepping(built(case.program, f"{plan},displaced(warmup=1,gn={gn}),steps({row})"))
    except PlanError as error:
        assert "ranks of different strides cannot take part" in str(error)
        return Seen(ranks=Plan.parse(plan).degree)
    with torch.no_grad():
        for _ in range(2 + cycle(stepping.strides)):
            agree(stepping(case.args), case.expected, bits=False)
    return seen


TERMS_OF_NORMS = st.sampled_from(("corrected", "stale"))
STRIDES = st.lists(st.integers(1, 4), min_size=MOST, max_size=MOST)


def test_plans_with_strides_settle() -> None:
    _run(12, _strided, recipes(), GATHERS, TERMS_OF_NORMS, NONE_OR_SOME, STRIDES).demand(0.2, 0.05)


@pytest.mark.slow
def test_plans_with_strides_on_many_programs() -> None:
    _run(200, _strided, recipes(6), GATHERS, TERMS_OF_NORMS, NONE_OR_SOME, STRIDES).demand(0.5, 0.2)


@pytest.mark.slow
def test_displaced_plans_on_many_programs() -> None:
    _run(200, _displaced, recipes(6), GATHERS, NORMS, NONE_OR_SOME).demand(0.5, 0.2)


@pytest.mark.slow
def test_plans_that_round_on_many_programs() -> None:
    _run(200, _rounding, recipes(6), ANY_PLAN, LETTERS).demand(0.5, 0.2)


@pytest.mark.slow
def test_plans_are_exact_on_many_programs() -> None:
    _under_all(15, 6)


@pytest.mark.slow
def test_meshes_are_exact_on_many_programs() -> None:
    _demand(_run(150, _by_hand, recipes(6), ways()))
