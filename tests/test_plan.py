"""Plans: text round trips, normal forms, degrees, and errors that say what would be valid."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpar.core.errors import PlanError, TextError
from fastpar.core.plan import FP8_LETTERS, GROUP_NORMS, MESH_ORDER, TERMS, TOKEN_AXES, Displaced, Plan

degrees = st.integers(1, 9)


@st.composite
def plans(draw):
    """A consistent plan, built from the outside in: the split, what hangs on it, then the rest."""
    kinds = st.sampled_from([(), ("gather",), ("naive",), ("ulysses",), ("ring",), ("ulysses", "ring")])
    terms = {name: draw(degrees) for name in draw(kinds)}
    if not {"gather", "naive"} & set(terms) and len(terms) < 2 and draw(st.booleans()):
        terms["torus"] = draw(degrees)
    terms |= {name: draw(degrees) for name in draw(st.sets(st.sampled_from(["cfg", "tp"])))}
    split = math.prod(degree for name, degree in terms.items() if name in TOKEN_AXES)
    if "gather" in terms and draw(st.booleans()):
        terms["displaced"] = Displaced(draw(st.integers(0, 9)), draw(st.sampled_from(GROUP_NORMS)))
        if terms["displaced"].gn not in ("sync", "none") and draw(st.booleans()):
            terms["steps"] = tuple(draw(st.lists(st.integers(1, 5), min_size=split, max_size=split)))
    if terms and "naive" not in terms:
        terms["fp8"] = "".join(draw(st.lists(st.sampled_from(FP8_LETTERS), unique=True)))
    if set(terms) & set(TOKEN_AXES) and draw(st.booleans()):
        speed = st.floats(0, 1e300, exclude_min=True)
        terms["speeds"] = tuple(draw(st.lists(speed, min_size=split, max_size=split)))
    return Plan(**terms) if terms else Plan(auto=True)


@given(plans())
def test_plans_round_trip(plan):
    assert Plan.parse(str(plan)) == plan
    assert str(Plan.parse(str(plan))) == str(plan)
    assert hash(Plan.parse(str(plan))) == hash(plan)
    plan.check(plan.degree)
    if not plan.auto:
        with pytest.raises(PlanError, match=f"the mesh has {plan.degree + 1}"):
            plan.check(plan.degree + 1)


@given(plans(), st.integers(1, 64))
def test_the_plans_that_an_error_offers_fit(plan, world):
    try:
        plan.check(world)
    except PlanError as error:
        offered = str(error).split("plans that fit")[1].split(": ", 1)[1]
        for text in offered.split(" or "):
            Plan.parse(text.strip("'")).check(world)
    else:
        assert plan.auto or plan.degree == world


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("auto", "auto"),
        ("ulysses=4,ring=2,fp8(qvo)", "ulysses=4,ring=2,fp8(qvo)"),
        ("fp8(ovq), ring=2, ulysses=4", "ulysses=4,ring=2,fp8(qvo)"),
        ("gather=2,displaced", "gather=2,displaced(warmup=4,gn=corrected)"),
        ("gather=2,displaced(gn=none)", "gather=2,displaced(warmup=4,gn=none)"),
        ("steps(1:2),gather=2,displaced(warmup=1),speeds(1.0:0.6)",
         "gather=2,displaced(warmup=1,gn=corrected),speeds(1:0.6),steps(1:2)"),
        ("gather=1,speeds(2)", "gather=1,speeds(2)"),
        ("torus=2,ulysses=4", "ulysses=4,torus=2"),
        ("cfg=2,gather=2,tp=2", "gather=2,cfg=2,tp=2"),
        ("naive=4", "naive=4"),
    ],
)  # fmt: skip
def test_canonical_text(text, canonical):
    assert str(Plan.parse(text)) == canonical


def test_axes_are_in_mesh_order_and_degrees_multiply():
    plan = Plan.parse("ulysses=4,ring=2,cfg=2,tp=3")
    assert plan.axes == (("cfg", 2), ("ring", 2), ("ulysses", 4), ("tp", 3))
    assert (plan.degree, plan.token_degree) == (48, 8)
    assert plan.names == ("ulysses", "ring", "cfg", "tp")
    assert set(MESH_ORDER) < set(TERMS) and set(TOKEN_AXES) < set(MESH_ORDER)
    assert Plan.parse("auto").degree == 1
    assert Plan.parse("ulysses=1").axes == (("ulysses", 1),)


def test_lossy_plans_say_why():
    assert Plan.parse("ulysses=4,ring=2,cfg=2,tp=2").lossy == []
    assert Plan.parse("gather=2,speeds(1:0.6)").lossy == []
    assert Plan.parse("gather=2,displaced,steps(1:1)").lossy == Plan.parse("gather=2,displaced").lossy
    assert Plan.parse("naive=1").lossy == []
    (naive,) = Plan.parse("naive=4").lossy
    assert "never exchange" in naive
    reasons = Plan.parse("gather=2,displaced(warmup=3),fp8(kv),steps(1:2)").lossy
    assert "3 synchronous steps" in reasons[0] and "fp8(kv)" in reasons[1] and "steps(1:2)" in reasons[2]


def test_check_names_both_numbers_and_what_fits():
    with pytest.raises(PlanError) as caught:
        Plan.parse("ulysses=4,ring=3,fp8(q)").check(16)
    said = str(caught.value)
    assert "12 ranks (ring=3 x ulysses=4)" in said and "the mesh has 16" in said
    assert "'ulysses=4,ring=4,fp8(q)'" in said and "'ulysses=16'" in said
    with pytest.raises(PlanError, match="1 rank or more, not 0"):
        Plan(auto=True).check(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty plan; give 'auto'"),
        ("ulises=4", "unknown plan term 'ulises' (did you mean 'ulysses'?); valid: ulysses, ring, torus"),
        ("ring=2,ring=2", "'ring' is given twice (at position 7)"),
        ("ring", "'ring' takes a number of ranks, 1 or more, as in 'ring=2'"),
        ("ring=0", "'ring' takes a number of ranks, 1 or more"),
        ("ring=-2", "'ring' takes a number of ranks, 1 or more"),
        ("ring(2)", "'ring' takes a number of ranks, 1 or more"),
        ("auto,ring=2", "'auto' stands alone: it chooses all terms; remove it, or ring"),
        ("auto=2", "'auto' takes no arguments"),
        ("gather=2,ring=2", "'gather' and 'ring' exclude each other"),
        ("gather=2,ulysses=2", "'gather' and 'ulysses' exclude each other"),
        ("gather=2,torus=2", "'gather' and 'torus' exclude each other"),
        ("naive=2,gather=2", "'naive' and 'gather' exclude each other: naive patches never talk"),
        ("naive=2,fp8(q)", "'naive' and 'fp8' exclude each other"),
        ("torus=2,ring=2,ulysses=2", "'torus' takes one of 'ring' and 'ulysses'"),
        ("ulysses=2,displaced", "'displaced' needs 'gather'"),
        ("displaced=4,gather=2", "'displaced' is written as displaced(warmup=4,gn=corrected)"),
        ("gather=2,displaced(4)", "'displaced' is written as displaced(warmup=4,gn=corrected)"),
        ("gather=2,displaced(warm=4)", "unknown option 'warm' (did you mean 'warmup'?); valid: warmup, gn"),
        ("gather=2,displaced(warmup=-1)", "warmup is a number of steps, 0 or more, not -1"),
        ("gather=2,displaced(warmup=true)", "warmup is a number of steps"),
        ("gather=2,displaced(gn=corected)", "unknown gn 'corected' (did you mean 'corrected'?); valid: co"),
        ("fp8(q)", "'fp8' is how tensors travel, and nothing does; add a degree"),
        ("ring=2,fp8", "'fp8' is written as fp8(qvo)"),
        ("ring=2,fp8(3)", "fp8 takes letters, as in fp8(qvo)"),
        ("ring=2,fp8(qx)", "fp8 does not know 'x'; valid letters: q, k, v, o of attention, g for"),
        ("ring=2,fp8(qq)", "fp8 has the letter 'q' twice"),
        ("gather=2,speeds", "'speeds' is written as speeds(1:0.6)"),
        ("gather=2,speeds(x=1)", "takes no options; write it as speeds(1:0.6)"),
        ("gather=2,speeds(())", "'speeds' takes one entry per rank, as in speeds(1:0.6)"),
        ("gather=2,speeds(1:0)", "speeds are finite numbers above 0"),
        ("gather=2,speeds(1:inf)", "speeds are finite numbers above 0"),
        ("gather=2,speeds(1:2:3)", "'speeds' has 3 entries but gather=2 splits over 2 ranks"),
        ("cfg=2,speeds(1:2)", "'speeds' needs a split of tokens or rows; add one of torus, ring, gather"),
        ("gather=2,steps(1:2)", "'steps' needs 'displaced'"),
        ("gather=2,displaced(gn=sync),steps(1:2)", "waits for all ranks in every step"),
        ("gather=2,displaced(gn=none),steps(1:2)", "sends nothing after the warm-up, exclude each other"),
        ("gather=2,displaced,steps(1:0.5)", "steps are whole numbers, 1 or more"),
    ],
)
def test_errors(text, message):
    with pytest.raises(PlanError) as caught:
        Plan.parse(text)
    assert message in str(caught.value)


def test_bad_grammar_is_a_text_error_that_points():
    with pytest.raises(TextError, match=r"a whole number after ring=, found two \(at position 5\)"):
        Plan.parse("ring=two")


def test_plans_made_in_python_are_checked_too():
    assert Plan(ulysses=4, ring=2, fp8="voq") == Plan.parse("ulysses=4,ring=2,fp8(qvo)")
    assert Plan(gather=2, displaced=Displaced(), speeds=(1, 2)).speeds == (1.0, 2.0)
    for bad in ({"ring": True}, {"ring": 2.0}, {"gather": 2, "speeds": (1, "x")}, {"ring": 2, "fp8": 3}, {}):
        with pytest.raises(PlanError):
            Plan(**bad)
    with pytest.raises(AttributeError):
        Plan(ring=2).ring = 3  # type: ignore[misc]
