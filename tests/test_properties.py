"""Any program, any plan, any number of ranks: exact after every pass (layer 3 of the proofs).

Random programs (``tests/programs.py``) go through plans and hand-written pipelines. After every
pass the ranks together must give what eager gives, and the structural checker must agree. Run
with ``-rP`` or ``-s`` to see the statistics, which are also demanded: a generator whose programs
do not communicate would prove nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fastpar.core.errors import PlanError
from fastpar.core.mesh import Mesh
from fastpar.passes.attention_torus import AttentionTorus
from fastpar.passes.attention_ulysses import AttentionUlysses
from fastpar.passes.quantize import Quantize
from fastpar.passes.shard import Shard
from tests.programs import Recipe, build, recipes
from tests.prove import Seen, Statistics, Way, prove
from tests.scatter import PASSES, Scatter

RANKS = (2, 3, 4, 5, 8, 3, 5, 8, 1)
SEVERAL = ("ulysses=2,ring=2", "ulysses=3,ring=2", "ulysses=2,ring=3", "ulysses=4,ring=2", "cfg=2,ulysses=2",
           "cfg=2,ring=3", "cfg=2,gather=2", "cfg=2,ulysses=4", "ulysses=2,tp=2",
           "ring=2,tp=3", "cfg=2,tp=2", "torus=2,ring=2", "torus=2,ulysses=2", "torus=3,ring=2", "torus=2,ring=3",
           "torus=3,ulysses=2", "cfg=2,torus=3", "torus=2,tp=2")  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> str:
    """One term of N ranks; or heads inside a ring (USP), or either beside the two halves of the batch or inside the
    machines of a torus."""
    if draw(st.integers(0, 3)) == 3:
        return draw(st.sampled_from(SEVERAL))
    return f"{draw(st.sampled_from(('ulysses', 'gather', 'ring', 'torus', 'tp')))}={draw(st.sampled_from(RANKS))}"


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
    return Way(mesh, ",".join([*steps, "lower"]))


def _with_plan(recipe: Recipe, plan: str) -> Seen:
    case = build(recipe)
    plan = plan.replace("cfg=2,", "") if recipe.batch == 1 else plan  # there must be two halves to split
    return prove(case, Way.of(plan, case.program))


def _rounding(recipe: Recipe, plan: str, letters: str) -> Seen:
    """The plan with ``letters`` rounded; where nothing of them travels it must say so."""
    case = build(recipe)
    plan = plan.replace("cfg=2,", "") if recipe.batch == 1 else plan
    exact = Way.of(plan, case.program)
    way = Way(exact.mesh, exact.pipeline.replace(",lower", f",{Quantize(letters).spec()},lower"))
    try:
        return prove(case, way)
    except PlanError as error:
        assert "would round nothing" in str(error)
        return Seen(ranks=way.mesh.ranks)


def _run(cases: int, check: Callable[..., Seen], *strategies: st.SearchStrategy) -> Statistics:
    """``cases`` random cases through ``check``; their statistics.

    In batches of ten: beyond that hypothesis mostly varies what it had, and here variety is what counts.
    """
    statistics = Statistics()
    seen: set[object] = set()
    start = 0 if os.environ.get("CI") else random.randrange(10**6)
    for batch in range(-(-cases // 10)):

        @seed(start + batch)
        @settings(max_examples=10, suppress_health_check=list(HealthCheck), print_blob=False)
        @given(st.tuples(*strategies))
        def prove_all(drawn: tuple[object, ...]) -> None:
            if repr(drawn) not in seen:
                statistics.add(check(*drawn))
                seen.add(repr(drawn))

        prove_all()
    print("\n" + "\n".join(statistics.lines()))
    return statistics


def test_plans_are_exact_after_every_pass() -> None:
    _run(40, _with_plan, recipes(), plans()).demand()


def _by_hand(recipe: Recipe, way: Way) -> Seen:
    return prove(build(recipe), way)


def _scattered(recipe: Recipe, way: Way) -> Seen:
    return prove(build(recipe), way, PASSES, bits=False)


def test_meshes_of_several_axes_are_exact_after_every_pass() -> None:
    _run(20, _by_hand, recipes(), ways()).demand()


LETTERS = st.sampled_from(("qvo", "kv", "qkvo", "qkvog", "qkvogh"))


def test_plans_that_round_compute_one_function() -> None:
    _run(12, _rounding, recipes(), plans(), LETTERS).demand(0.5, 0.2)


@pytest.mark.slow
def test_plans_that_round_on_many_programs() -> None:
    _run(200, _rounding, recipes(6), plans(), LETTERS).demand(0.5, 0.2)


@pytest.mark.slow
def test_plans_are_exact_on_many_programs() -> None:
    _run(350, _with_plan, recipes(6), plans()).demand()


@pytest.mark.slow
def test_meshes_are_exact_on_many_programs() -> None:
    _run(150, _by_hand, recipes(6), ways()).demand()
