"""Passes and pipelines: a pass is a frozen dataclass, a pipeline is text.

===========================  =====================================
text                         what it makes
===========================  =====================================
``cancel``                   ``Cancel()``
``shard{axis=sp}``           ``Shard(axis="sp")``
``pack{max-bytes=4096}``     ``Pack(max_bytes=4096)``
``pick{kinds=q:k:v}``        ``Pick(kinds=("q", "k", "v"))``
``pick{kinds=(q)}``          ``Pick(kinds=("q",))``
``pick{limit=none}``         ``Pick(limit=None)``
===========================  =====================================

The text of a pipeline and its passes are the same thing: ``Pipeline.parse(str(p), available) == p``. What
dumps, verifies, times or prints is one callback between passes; the pipeline has no flags.
"""

from __future__ import annotations

import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastpar.core.errors import CheckError, OptionError
from fastpar.core.text import Term, Value, format_terms, format_value, parse_terms, pointed, unknown

if TYPE_CHECKING:
    from fastpar.graph.program import Program


@dataclass
class PassContext:
    """What a pass may ask for besides its program.

    ``mesh`` and ``plan`` are those of the compile; ``groups`` maps mesh axes to names of process groups
    (``localise`` asks; none in simulation); ``costs`` estimates seconds and bytes (handed in from above, so
    that no pass imports the planner); ``notes`` collects what reports should say: what was done or not, where
    and why.
    """

    mesh: Any = None
    plan: Any = None
    costs: Any = None
    groups: Any = None
    notes: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Pass(ABC):
    """From program to program. A subclass is a frozen dataclass whose fields are its options.

    The program must be valid before and after; in between it need not be. An option's type is ``int``,
    ``float``, ``bool``, ``str``, a ``Literal`` of these, ``tuple[X, ...]`` or ``X | None``; its name in text
    is the field's with ``-`` for ``_``.
    """

    name: ClassVar[str]
    """What the pipeline's text calls it; the file has the same name with ``_`` for ``-``."""
    lossy: ClassVar[bool] = False
    """Whether it changes numerics by more than the order of sums."""
    stage_in: ClassVar[str | tuple[str, ...] | None] = None
    """The stage that it takes, or the stages; ``None`` for any."""
    stage_out: ClassVar[str | None] = None
    """The stage that it gives; ``None`` for the one that it was given."""

    @classmethod
    def takes(cls, stage: str) -> bool:
        """Whether a program at ``stage`` can be given to it."""
        return cls.stage_in is None or stage in ((cls.stage_in,) if isinstance(cls.stage_in, str) else cls.stage_in)

    @property
    def wanted(self) -> str:
        """The stages that it takes, in words."""
        return self.stage_in if isinstance(self.stage_in, str) else " or ".join(self.stage_in or ())

    @abstractmethod
    def apply(self, program: Program, ctx: PassContext) -> Program:
        """The rewritten program; may edit ``program`` in place and return it."""

    @classmethod
    def from_term(cls, term: Term) -> Pass:
        """The pass with the options of ``term``. Raises ``OptionError`` naming the pass and what is valid."""
        types_ = _option_types(cls)
        if term.degree is not None or term.args:
            raise OptionError(f"pass {cls.name!r} takes options as {_example(cls)}, not {str(term)!r}")
        values: dict[str, Any] = {}
        for key, value in term.options:
            option = key.replace("-", "_")
            if option not in types_ or "_" in key:  # one spelling only, or round trips would not be exact
                valid = [name.replace("_", "-") for name in types_]
                raise OptionError(f"pass {cls.name!r}: {unknown('option', key, valid)}")
            fits, values[option] = _fit(value, types_[option])
            if not fits:
                takes, given = _spoken(types_[option]), format_value(value)
                raise OptionError(f"pass {cls.name!r}: option {key!r} takes {takes}, not {given}")
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name.replace("_", "-") for name in needed if name not in values]
        if missing:
            raise OptionError(f"pass {cls.name!r} needs {', '.join(missing)}, as in {_example(cls)}")
        return cls(**values)

    def term(self) -> Term:
        """This pass as a term of a pipeline, options at their default left out."""
        _option_types(type(self))
        options = []
        for option in fields(self):
            value = getattr(self, option.name)
            default = option.default if option.default_factory is MISSING else option.default_factory()
            # Compared as text: True == 1 and 0.0 == -0.0, but they are not the same option.
            if default is MISSING or format_value(value) != format_value(typing.cast(Value, default)):
                options.append((option.name.replace("_", "-"), value))
        return Term(self.name, options=tuple(options), brackets="{")

    def spec(self) -> str:
        """Text from which a pipeline makes this pass again: ``name{option=value,...}``, defaults left out."""
        return str(self.term())


class Callback(Protocol):
    """Called before the first pass, between passes and after the last.

    ``previous`` took ``seconds`` and gave ``program``, which ``next`` takes. ``previous`` is ``None`` (and
    ``seconds`` 0) before the first pass, ``next`` is ``None`` after the last; both in an empty pipeline.
    """

    def __call__(self, previous: Pass | None, program: Program, next: Pass | None, seconds: float, /) -> None: ...


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Raises ``OptionError`` if one takes another stage than those before it leave."""

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        stage: str | None = None
        giver = None
        for one in self.passes:
            if stage is not None and not one.takes(stage):
                raise OptionError(
                    f"pass {one.name!r} takes a program that is {one.wanted}; after {giver!r} it is {stage}"
                )
            leaves = one.stage_out or one.stage_in
            if isinstance(leaves, str):  # what takes one of several leaves the one that it got
                stage, giver = leaves, one.name

    @classmethod
    def parse(cls, text: str, available: Mapping[str, Callable[[], type[Pass]]]) -> Pipeline:
        """The pipeline that ``text`` says; ``available`` gives a pass's class and imports it only then.

        Raises ``TextError`` where the text breaks the grammar and ``OptionError`` for an unknown pass, a bad
        option and passes whose stages do not follow each other. Blank text is the empty pipeline.
        """
        found: list[Pass] = []
        for term in parse_terms(text, "pipeline"):
            if term.name not in available:
                raise OptionError(pointed(text, term.at, unknown("pass", term.name, sorted(available))))
            try:
                found.append(available[term.name]().from_term(term))
            except OptionError as error:
                raise OptionError(pointed(text, term.at, str(error))) from None
        return cls(tuple(found))

    def __str__(self) -> str:
        return format_terms(one.term() for one in self.passes)

    @property
    def lossy(self) -> tuple[str, ...]:
        """Names of the passes that change numerics."""
        return tuple(one.name for one in self.passes if one.lossy)

    def run(self, program: Program, ctx: PassContext, callback: Callback | None = None) -> Program:
        """``program`` after all passes.

        Raises ``OptionError`` if the program is not at the stage that a pass takes, ``CheckError`` if a pass
        leaves it at another stage than it declares. What a pass itself raises carries a note that says which
        pass it was.
        """
        previous, seconds = None, 0.0
        for place, one in enumerate(self.passes, 1):
            if callback is not None:
                callback(previous, program, one, seconds)
            if not one.takes(program.stage):
                raise OptionError(
                    f"pass {one.name!r} takes a program that is {one.wanted}; this one is {program.stage}"
                )
            expected, begin = one.stage_out or program.stage, time.perf_counter()
            try:
                program = one.apply(program, ctx)
            except Exception as error:
                error.add_note(f"in pass {one.spec()} ({place} of {len(self.passes)}) of the pipeline {self}")
                raise
            previous, seconds = one, time.perf_counter() - begin
            if program.stage != expected:
                raise CheckError(f"pass {one.name!r} left the program {program.stage} instead of {expected}")
        if callback is not None:
            callback(previous, program, None, seconds)
        return program


def callbacks(several: Iterable[Callback]) -> Callback:
    """One callback that calls ``several`` in order."""
    each = tuple(several)

    def call(previous: Pass | None, program: Program, next: Pass | None, seconds: float) -> None:
        for one in each:
            one(previous, program, next, seconds)

    return call


def _option_types(cls: type[Pass]) -> dict[str, Any]:
    """Option field -> its type, resolved. ``TypeError`` without the decorator: the fields would be lost."""
    if "__dataclass_params__" not in cls.__dict__ or not isinstance(getattr(cls, "name", None), str):
        raise TypeError(f"{cls.__qualname__} must be decorated with @dataclass(frozen=True) and have a name")
    hints = typing.get_type_hints(cls)
    return {option.name: hints[option.name] for option in fields(cls)}


def _fit(value: Value, wanted: Any) -> tuple[bool, Any]:
    """Whether ``value`` is of type ``wanted``, and what it is then: an int for a float is the float."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        fitting = [fit for fit in (_fit(value, arg) for arg in args) if fit[0]]
        return fitting[0] if fitting else (False, None)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args), value
    if origin is tuple:
        if len(args) != 2 or args[1] is not Ellipsis:
            raise TypeError(f"an option's tuple is tuple[X, ...], not {wanted}")
        row = [_fit(item, args[0]) for item in (value if isinstance(value, tuple) else (value,))]
        return all(fits for fits, _ in row), tuple(item for _, item in row)
    if wanted is float and type(value) is int:
        return True, float(value)
    if wanted not in (int, float, bool, str, type(None)):
        raise TypeError(f"an option is int, float, bool, str, Literal, tuple[X, ...], X | None; not {wanted}")
    return type(value) is wanted, value  # type() and not isinstance: True is no int here


def _spoken(wanted: Any) -> str:
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spoken(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(format_value(arg) for arg in args)
    if origin is tuple:
        return f"a tuple of {_spoken(args[0])} (as in a:b)"
    return "none" if wanted is type(None) else str(wanted.__name__)


def _example(cls: type[Pass]) -> str:
    options = [f"{name.replace('_', '-')}=..." for name in _option_types(cls)]
    return f"{cls.name}{{{','.join(options)}}}" if options else f"{cls.name!r} without options"
