"""The grammar: exact round trips, canonical forms, and errors that point at the place."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpar.core.errors import TextError
from fastpar.core.text import (
    Term,
    format_terms,
    format_value,
    parse_terms,
    parse_value,
    unknown,
)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True)
atoms = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.sampled_from(["true", "none", "inf", "-inf", "nan", "1", "1.5", "1e3", "-", "+", ".", "", "2d"]),
    st.sampled_from(["a:b", "a,b", "(", "9" * 500, "1" * 401]),
)
values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8)
terms = st.one_of(
    st.builds(Term, names, degree=st.integers()),
    st.builds(
        Term,
        names,
        args=st.lists(values, max_size=3).map(tuple),
        options=st.dictionaries(names, values, max_size=3).map(lambda d: tuple(d.items())),
        brackets=st.sampled_from("({"),
    ),
)


def same(a: object, b: object) -> bool:
    """Equality that tells True from 1 and 0.0 from -0.0."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@given(values)
def test_values_round_trip(value):
    text = format_value(value)
    assert same(parse_value(text), value)
    assert format_value(parse_value(text)) == text


@given(st.lists(terms, max_size=4).map(tuple))
def test_terms_round_trip(written):
    text = format_terms(written)
    read = parse_terms(text)
    assert read == written
    for r, w in zip(read, written, strict=True):
        assert same(r.args, w.args) and same(r.options, w.options)
    assert format_terms(read) == text


@given(st.text(alphabet='ab1.,=(){}:" \n-\\e', max_size=24))
def test_any_text_gives_terms_or_a_text_error(text):
    try:
        read = parse_terms(text)
    except TextError as error:
        assert "position" in str(error)
    else:
        canonical = format_terms(read)
        assert parse_terms(canonical) == read
        assert format_terms(parse_terms(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("  ", ""),
        ("auto", "auto"),
        ("auto()", "auto"),
        ("shard{ }", "shard"),
        (" ulysses = 4 ,\n ring=02", "ulysses=4,ring=2"),
        ("displaced( warmup=4 , gn=corrected )", "displaced(warmup=4,gn=corrected)"),
        ("shard{axis=sp},attention-usp,pack,overlap", "shard{axis=sp},attention-usp,pack,overlap"),
        ("speeds(1:0.60)", "speeds(1:0.6)"),
        ("speeds((1,0.6))", "speeds(1:0.6)"),
        ('p{a=(x,(1)),b="two words",c=()}', 'p{a=(x,(1)),b="two words",c=()}'),
        ("p{d=1:2:3,e=1e3,f=None,g=none}", "p{d=1:2:3,e=1000.0,f=None,g=none}"),
        ('p("word","1")', 'p(word,"1")'),
        ("p(2d,a.b/c,-)", "p(2d,a.b/c,-)"),
    ],
)
def test_canonical_text(text, canonical):
    assert format_terms(parse_terms(text)) == canonical


def test_what_a_term_holds():
    (fp8, ring) = parse_terms("fp8(qvo), ring=2", "plan")
    assert (fp8.name, fp8.args, fp8.options, fp8.degree, fp8.at) == ("fp8", ("qvo",), (), None, 0)
    assert (ring.name, ring.degree, ring.at) == ("ring", 2, 10)
    (term,) = parse_terms("p{a=1:0.5,b=none,c=inf}")
    assert dict(term.options) == {"a": (1, 0.5), "b": None, "c": math.inf}


@pytest.mark.parametrize(
    ("text", "message", "position"),
    [
        ("ulysses=", "expected a whole number, found the end of the text", 8),
        ("ulysses=four", "expected a whole number after ulysses=, found four", 8),
        ("ulysses=true", "expected a whole number after ulysses=", 8),
        ("ulysses=2.0", "expected a whole number after ulysses=", 8),
        ("ulysses=4 ring=2", "expected ',' or the end of the text, found 'r'", 10),
        ("ulysses=4,", "expected a term's name, found the end of the text", 10),
        (",ring=2", "expected a term's name, found ','", 0),
        ("4", "expected a term's name, found '4'", 0),
        ("fp8(qvo", "expected ',' or ')', found the end of the text", 7),
        ("fp8(qvo}", "expected ',' or ')', found '}'", 7),
        ("fp8(qvo,)", "expected a value, found ')'", 8),
        ("p{a=1,2}", "a value without a key cannot follow one with a key", 6),
        ("p{a=1,a=2}", "'a' is given twice", 6),
        ("p{a=(1,2}", "expected ',' or ')', found '}'", 8),
        ("p{a=1:}", "expected a value, found '}'", 6),
        ('p("abc)', "bad quoted text", 2),
        ("p(" + "(" * 40 + ")" * 41, "brackets are nested more than 32 deep", 34),
        ("p(" + "1" * 500 + ")", "a number of more than 400 digits", 2),
    ],
)
def test_errors_point_at_the_place(text, message, position):
    with pytest.raises(TextError) as caught:
        parse_terms(text, "plan")
    said = str(caught.value)
    assert said.startswith("plan: ") and message in said and f"(at position {position})\n" in said
    lines = said.splitlines()
    assert lines[-1].endswith("^")
    if position < 60:
        assert lines[-1].index("^") - 2 == position


def test_what_cannot_be_written_is_refused():
    for bad in (math.nan, 10**500, object(), [1]):
        with pytest.raises(TextError):
            format_value(bad)  # type: ignore[arg-type]
    for term in (Term("2bad"), Term("both", 2, ("x",)), Term("p", options=(("bad key", 1),))):
        with pytest.raises(TextError):
            str(term)
    with pytest.raises(TextError, match="expected text, got int"):
        parse_terms(4)  # type: ignore[arg-type]


def test_unknown_names_the_nearest_and_all():
    assert unknown("term", "ulises", ["ring", "ulysses"]) == (
        "unknown term 'ulises' (did you mean 'ulysses'?); valid: ring, ulysses"
    )
    assert "did you mean" not in unknown("term", "zzz", ["ring"])
