"""Passes as text: round trips, typed options, lazy imports, and one callback between passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpar.core.errors import CheckError, OptionError, TextError
from fastpar.graph.pipeline import Pass, PassContext, Pipeline, callbacks


@dataclass
class Fake:
    """Stands in for a Program: only the stage is looked at."""

    stage: str = "captured"
    done: list[str] = field(default_factory=list)


class Recorded(Pass):
    def apply(self, program: Any, ctx: PassContext) -> Any:
        program.done.append(self.spec())
        return program


@dataclass(frozen=True)
class Cancel(Recorded):
    name: ClassVar[str] = "cancel"


@dataclass(frozen=True)
class Options(Recorded):
    name: ClassVar[str] = "all-options"
    count: int = 1
    share: float = 0.5
    is_on: bool = False
    axis: str = "sp"
    mode: Literal["fast", "small", 3] = "fast"
    kinds: tuple[str, ...] = ("q", "k")
    rows: tuple[tuple[int, ...], ...] = ()
    max_bytes: int | None = None
    label: str | None = None


@dataclass(frozen=True)
class Shard(Recorded):
    name: ClassVar[str] = "shard"
    stage_in: ClassVar[str | None] = "captured"
    stage_out: ClassVar[str | None] = "sharded"
    axis: str

    def apply(self, program, ctx):
        super().apply(program, ctx)
        program.stage = "sharded"
        return program


@dataclass(frozen=True)
class Quantize(Recorded):
    name: ClassVar[str] = "quantize"
    lossy: ClassVar[bool] = True
    stage_in: ClassVar[str | None] = "sharded"


AVAILABLE = {cls.name: (lambda cls=cls: cls) for cls in (Cancel, Options, Shard, Quantize)}

options = st.builds(
    Options,
    count=st.integers(-(10**30), 10**30),
    share=st.floats(allow_nan=False),
    is_on=st.booleans(),
    axis=st.text(),
    mode=st.sampled_from(["fast", "small", 3]),
    kinds=st.lists(st.text(max_size=4), max_size=3).map(tuple),
    rows=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=3).map(tuple),
    max_bytes=st.none() | st.integers(),
    label=st.none() | st.text() | st.just("none"),
)
passes = st.one_of(st.just(Cancel()), options)


@given(st.lists(passes, max_size=4))
def test_pipelines_round_trip(found):
    pipeline = Pipeline(tuple(found))
    assert Pipeline.parse(str(pipeline), AVAILABLE) == pipeline
    assert str(Pipeline.parse(str(pipeline), AVAILABLE)) == str(pipeline)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cancel",
        "shard{axis=sp},cancel,quantize,cancel",
        "all-options{count=2,share=2.0,is-on=true,axis=tp,mode=3,kinds=(v),rows=(1:2,(),(3)),max-bytes=4}",
        'all-options{kinds=(),label="none"}',
    ],
)
def test_canonical_text(text):
    assert str(Pipeline.parse(text, AVAILABLE)) == text


def test_text_is_brought_into_its_canonical_form():
    text = " all-options{share=2, kinds=v ,count=1,rows=((1,2),(3)), max-bytes=none} "
    pipeline = Pipeline.parse(text, AVAILABLE)
    assert pipeline.passes == (Options(share=2.0, kinds=("v",), rows=((1, 2), (3,))),)
    assert str(pipeline) == "all-options{share=2.0,kinds=(v),rows=(1:2,(3))}"
    assert pipeline.passes[0].spec() == str(pipeline)


def test_only_the_passes_that_are_named_are_imported():
    def broken() -> type[Pass]:
        raise ImportError("should not have been imported")

    assert Pipeline.parse("cancel", AVAILABLE | {"broken": broken}).passes == (Cancel(),)
    with pytest.raises(ImportError):
        Pipeline.parse("broken", AVAILABLE | {"broken": broken})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cancel,shad{axis=x}", "unknown pass 'shad' (did you mean 'shard'?); valid: all-options, cancel, q"),
        ("cancel,shad{axis=x}", "(at position 7)"),
        ("cancel{x=1}", "pass 'cancel': unknown option 'x'; valid: none"),
        ("cancel=2", "pass 'cancel' takes options as 'cancel' without options, not"),
        ("shard(sp)", "pass 'shard' takes options as shard{axis=...}, not 'shard(sp)'"),
        ("shard", "pass 'shard' needs axis, as in shard{axis=...}"),
        ("all-options{cuont=1}", "unknown option 'cuont' (did you mean 'count'?); valid: count, sh"),
        ("all-options{is_on=true}", "unknown option 'is_on' (did you mean 'is-on'?)"),
        ("all-options{count=many}", "option 'count' takes int, not many"),
        ("all-options{count=true}", "option 'count' takes int, not true"),
        ("all-options{count=1.0}", "option 'count' takes int, not 1.0"),
        ("all-options{is-on=1}", "option 'is-on' takes bool, not 1"),
        ("all-options{axis=3}", "option 'axis' takes str, not 3"),
        ("all-options{mode=slow}", "option 'mode' takes one of fast, small, 3, not slow"),
        ("all-options{kinds=q:1}", "option 'kinds' takes a tuple of str (as in a:b), not q:1"),
        ("all-options{max-bytes=x}", "option 'max-bytes' takes int or none, not x"),
        ("shard{axis=a},shard{axis=b}", "'shard' takes a program that is captured; after 'shard' it is"),
        ("quantize,shard{axis=b}", "takes a program that is captured; after 'quantize' it is sharded"),
    ],
)  # fmt: skip
def test_errors_name_what_is_valid(text, message):
    with pytest.raises(OptionError) as caught:
        Pipeline.parse(text, AVAILABLE)
    assert message in str(caught.value)


def test_bad_grammar_is_a_text_error():
    with pytest.raises(TextError, match="pipeline: expected"):
        Pipeline.parse("cancel,,cancel", AVAILABLE)


def test_the_callback_stands_before_between_and_after():
    seen: list[tuple[str | None, list[str], str | None, float]] = []

    def callback(previous, program, next, seconds):
        seen.append((previous and previous.name, list(program.done), next and next.name, seconds))

    program = Fake()
    result = Pipeline.parse("shard{axis=sp},cancel", AVAILABLE).run(program, PassContext(), callback)
    assert result is program and program.stage == "sharded"
    assert [(p, d, n) for p, d, n, _ in seen] == [
        (None, [], "shard"),
        ("shard", ["shard{axis=sp}"], "cancel"),
        ("cancel", ["shard{axis=sp}", "cancel"], None),
    ]
    assert seen[0][3] == 0 and all(seconds >= 0 for *_, seconds in seen)
    seen.clear()
    Pipeline().run(program, PassContext(), callback)
    assert [(p, n) for p, _, n, _ in seen] == [(None, None)]
    seen.clear()
    Pipeline().run(program, PassContext(), callbacks([callback, callback]))
    assert len(seen) == 2


def test_lossy_passes_are_named():
    assert Pipeline.parse("shard{axis=sp},quantize", AVAILABLE).lossy == ("quantize",)


def test_an_error_in_a_pass_says_which_pass():
    @dataclass(frozen=True)
    class Broken(Pass):
        name: ClassVar[str] = "broken"

        def apply(self, program, ctx):
            raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError) as caught:
        Pipeline((Cancel(), Broken())).run(Fake(), PassContext())
    assert caught.value.__notes__ == ["in pass broken (2 of 2) of the pipeline cancel,broken"]


def test_stages_are_checked_when_it_runs():
    with pytest.raises(OptionError, match="'shard' takes a program that is captured; this one is lowered"):
        Pipeline((Shard("sp"),)).run(Fake("lowered"), PassContext())

    @dataclass(frozen=True)
    class Forgetful(Recorded):
        name: ClassVar[str] = "forgetful"
        stage_out: ClassVar[str | None] = "lowered"

    with pytest.raises(CheckError, match="'forgetful' left the program captured instead of lowered"):
        Pipeline((Forgetful(),)).run(Fake(), PassContext())


def test_a_pass_without_the_decorator_is_a_bug_that_is_said():
    class Undecorated(Recorded):
        name: ClassVar[str] = "undecorated"
        axis: str = "sp"

    with pytest.raises(TypeError, match="must be decorated with @dataclass"):
        Undecorated().spec()

    @dataclass(frozen=True)
    class Odd(Recorded):
        name: ClassVar[str] = "odd"
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="an option is int, float"):
        Pipeline.parse("odd{table=1}", {"odd": lambda: Odd})
