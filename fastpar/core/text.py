"""One small grammar for plans and pass pipelines.

::

    terms   = [ term { "," term } ]
    term    = name                                  auto
            | name "=" whole-number                 ulysses=4
            | name "(" [ item { "," item } ] ")"    displaced(warmup=4,gn=corrected), fp8(qvo)
            | name "{" [ item { "," item } ] "}"    shard{axis=sp,max-ranks=8}
    item    = [ key "=" ] value                     arguments without a key come first
    value   = atom { ":" atom }                     1:0.6 is the tuple (1, 0.6)
            | "(" [ value { "," value } ] ")"       (1:2,(),"a b"): any tuple, nested
    atom    = true | false | none | number | word | "text in JSON's quotes"

Spaces and line breaks between tokens mean nothing. A *word* is any run of letters, digits and
``_ . / + * @ -`` that is not one of the others; ``inf`` and ``-inf`` are numbers, there is no NaN
(it would break ``parse(format(x)) == x``). Every list of terms has exactly one canonical text.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from fastpar.core.errors import TextError

Value = bool | int | float | str | None | tuple["Value", ...]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_RUN = re.compile(r"[A-Za-z0-9_./+*@-]+")
_SPACE = re.compile(r"\s*")
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")
_KEYWORDS: dict[str, Value] = {"true": True, "false": False, "none": None, "inf": math.inf, "-inf": -math.inf}
_CLOSING = {"(": ")", "{": "}"}
_DEEPEST = 32  # nesting; beyond it Python's own stack would be what stops us
_LONGEST = 400  # digits of a number; Python refuses to convert more than 4300


@dataclass(frozen=True)
class Term:
    """One term: a name with a degree, or with arguments and options, or with nothing.

    ``degree`` is the number of ``name=4``; ``args`` are the values without a key and ``options`` the
    pairs with one, in the order of the text. ``brackets`` (``"("`` or ``"{"``) and ``at`` (where in the
    text the term began) are how it was written, not what it says, and do not take part in comparison.
    """

    name: str
    degree: int | None = None
    args: tuple[Value, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()
    brackets: str = field(default="(", compare=False)
    at: int = field(default=0, compare=False, repr=False)

    def __str__(self) -> str:
        """Canonical text. Raises ``TextError`` for what the grammar cannot say (a NaN, a bad name)."""
        _check_name(self.name)
        if self.degree is not None:
            if self.args or self.options:
                raise TextError(f"term {self.name!r} has both a degree and arguments; it can have either")
            return f"{self.name}={self.degree}"
        items = [format_value(value) for value in self.args]
        items += [f"{_check_name(key)}={format_value(value)}" for key, value in self.options]
        return f"{self.name}{self.brackets}{','.join(items)}{_CLOSING[self.brackets]}" if items else self.name


def parse_terms(text: str, what: str = "text") -> tuple[Term, ...]:
    """The terms of ``text``; no terms for blank text.

    ``what`` is the noun that errors begin with (``plan``, ``pipeline``). Raises ``TextError`` which shows
    the text with a mark under the place, and says what was expected there.
    """
    if not isinstance(text, str):
        raise TextError(f"{what}: expected text, got {type(text).__name__}")
    return _Parser(text, what).terms()


def format_terms(terms: Iterable[Term]) -> str:
    """Canonical text of ``terms``: ``parse_terms(format_terms(terms)) == terms``."""
    return ",".join(str(term) for term in terms)


def parse_value(text: str, what: str = "value") -> Value:
    """The one value that ``text`` spells. Raises ``TextError``."""
    parser = _Parser(text, what)
    value = parser.value()
    parser.end("the end of the text")
    return value


def format_value(value: Value) -> str:
    """Canonical text of one value. Raises ``TextError`` for NaN and for types that the grammar lacks."""
    if isinstance(value, tuple):
        flat = len(value) > 1 and not any(isinstance(item, tuple) for item in value)
        items = [format_value(item) for item in value]
        return ":".join(items) if flat else f"({','.join(items)})"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if value != value:
            raise TextError("NaN cannot be written in a plan or a pipeline")
        if isinstance(value, int) and abs(value) >= 10 ** (_LONGEST - 1):
            raise TextError(f"a number of {_LONGEST} digits or more cannot be written in a plan or pipeline")
        return repr(value)
    if isinstance(value, str):
        return value if _RUN.fullmatch(value) and _special(value) is None else json.dumps(value)
    raise TextError(
        f"{value!r} ({type(value).__name__}) cannot be written in a plan or a pipeline; "
        "valid are int, float, bool, str, None and tuples of these"
    )


def pointed(text: str, at: int, message: str) -> str:
    """``message`` with ``text`` below it and a mark under position ``at`` (counted from 0)."""
    begin, end = max(0, at - 60), at + 60  # a long pipeline is cut, the position stays the true one
    shown = re.sub(r"\s", " ", text[begin:end])  # a tab or a line end would shift the mark
    return f"{message} (at position {at})\n  {shown}\n  {' ' * (at - begin)}^"


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """``unknown KIND 'name'``, the nearest valid name if there is one, and all valid names."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {name!r}{hint}; valid: {', '.join(names) or 'none'}"


def duplicates(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, each once, in order."""
    return [name for i, name in enumerate(names) if names.count(name) > 1 and name not in names[:i]]


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise TextError(f"{name!r} is not a name: letters, digits, '_' and '-', first a letter or '_'")
    return name


def _special(run: str) -> Callable[[], Value] | None:
    """How to read ``run`` if it is a number or a keyword; ``None`` if it is a word."""
    if run in _KEYWORDS:
        return lambda: _KEYWORDS[run]
    if _INT.fullmatch(run):
        return lambda: int(run)
    return (lambda: float(run)) if _FLOAT.fullmatch(run) else None


class _Parser:
    """Recursive descent with one character of look-ahead; ``at`` is the position in the text."""

    def __init__(self, text: str, what: str) -> None:
        self.text, self.what, self.at = text, what, 0
        self.skip()

    def terms(self) -> tuple[Term, ...]:
        if self.at == len(self.text):
            return ()
        found = [self.term()]
        while self.take(","):
            found.append(self.term())
        self.end("',' or the end of the text")
        return tuple(found)

    def term(self) -> Term:
        at = self.at
        name = self.name("a term's name")
        if self.take("="):
            where = self.at
            degree = self.atom("a whole number")
            if isinstance(degree, bool) or not isinstance(degree, int):
                self.fail(f"expected a whole number after {name}=, found {format_value(degree)}", where)
            return Term(name, degree, at=at)
        for opening, closing in _CLOSING.items():
            if self.take(opening):
                args, options = self.items(closing)
                return Term(name, None, args, options, opening, at)
        return Term(name, at=at)

    def items(self, closing: str) -> tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]:
        args: list[Value] = []
        options: dict[str, Value] = {}
        if self.take(closing):
            return (), ()
        while True:
            at = self.at
            key = self.key()
            if key is None:
                if options:
                    self.fail("a value without a key cannot follow one with a key", at)
                args.append(self.value())
            elif key in options:
                self.fail(f"{key!r} is given twice", at)
            else:
                options[key] = self.value()
            if self.take(closing):
                return tuple(args), tuple(options.items())
            if not self.take(","):
                self.expected(f"',' or {closing!r}")

    def key(self) -> str | None:
        """``key`` if ``key =`` comes next, otherwise nothing is consumed."""
        found = _NAME.match(self.text, self.at)
        if not found:
            return None
        after = _SPACE.match(self.text, found.end())
        assert after is not None  # \s* always matches
        if not self.text.startswith("=", after.end()):
            return None
        self.at = after.end() + 1
        self.skip()
        return found.group()

    def value(self, depth: int = 0) -> Value:
        if self.take("("):
            if depth >= _DEEPEST:
                self.fail(f"brackets are nested more than {_DEEPEST} deep", self.at - 1)
            if self.take(")"):
                return ()
            found = [self.value(depth + 1)]
            while not self.take(")"):
                if not self.take(","):
                    self.expected("',' or ')'")
                found.append(self.value(depth + 1))
            return tuple(found)
        first = self.atom("a value")
        if not self.take(":"):
            return first
        row = [first, self.atom("a value")]
        while self.take(":"):
            row.append(self.atom("a value"))
        return tuple(row)

    def atom(self, wanted: str) -> Value:
        at = self.at
        if self.text.startswith('"', at):
            try:
                value, self.at = json.JSONDecoder().raw_decode(self.text, at)
            except ValueError as error:
                self.fail(f"bad quoted text ({getattr(error, 'msg', error)})", at)
            self.skip()
            assert isinstance(value, str)  # it began with a quote
            return value
        run = _RUN.match(self.text, at)
        if not run:
            self.expected(wanted)
        word, self.at = run.group(), run.end()
        self.skip()
        read = _special(word)
        if read and len(word) > _LONGEST:
            self.fail(f"a number of more than {_LONGEST} digits", at)
        return read() if read else word

    def name(self, wanted: str) -> str:
        found = _NAME.match(self.text, self.at)
        if not found:
            self.expected(wanted)
        self.at = found.end()
        self.skip()
        return found.group()

    def take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        self.skip()
        return True

    def skip(self) -> None:
        space = _SPACE.match(self.text, self.at)
        assert space is not None  # \s* always matches
        self.at = space.end()

    def end(self, wanted: str) -> None:
        if self.at < len(self.text):
            self.expected(wanted)

    def expected(self, wanted: str) -> NoReturn:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end of the text"
        self.fail(f"expected {wanted}, found {found}", self.at)

    def fail(self, message: str, at: int) -> NoReturn:
        raise TextError(pointed(self.text, at, f"{self.what}: {message}"))
