"""Reports as tables on the terminal, and as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpar.core.errors import OptionError
from fastpar.core.files import write_whole
from fastpar.report import sections
from fastpar.report.sections import Section
from fastpar.report.words import ms, size

if TYPE_CHECKING:
    from fastpar.cli.calling import Ran
    from fastpar.cli.health.fact import Fact
    from fastpar.cli.rounds import Benched
    from fastpar.run.each import Proof
    from fastpar.run.report import Report

PIPED_WIDTH = 120
"""Columns where the output is no terminal."""
MOST = 12
"""Rows of a table that can be long; the rest is counted, and is all there in the JSON."""


def console() -> Console:
    """Standard output, without rich's colouring of numbers."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


class Written(Protocol):
    """What has a form in plain values."""

    def to_dict(self) -> dict[str, Any]: ...


def write_json(report: Written, path: Path) -> None:
    """``report`` as JSON in ``path``, on standard output for ``-``. Numbers that JSON lacks become text."""
    text = json.dumps(_plain(report.to_dict()), indent=2)
    if str(path) == "-":
        typer.echo(text)
        return
    try:
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        raise OptionError(f"--json: cannot write {str(path)!r}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def show_verdict(report: Report) -> None:
    """What ``verify`` found, a line per fact."""
    out = console()
    out.print(Text("ok" if report.ok else "FAILED", style="bold green" if report.ok else "bold red"))
    table = _facts()
    for name, said in [*sections.what(report), *sections.verdict(report)]:
        table.add_row(name, Text(said))
    for note in report.notes:
        table.add_row("note", Text(note))
    out.print(table)


def show_report(report: Report) -> None:
    """What ``explain`` found: a head of facts, then a table for each list that is not empty."""
    out = console()
    head = _facts()
    for name, said in [*sections.what(report), *sections.facts(report)]:
        head.add_row(name, Text(said))
    out.print(head)
    for section in sections.sections(report):
        _section(out, section)
    for note in report.notes:
        out.print(Text(f"note: {note}"))
    if report.seconds:
        out.print(sections.took(report))


def _section(out: Console, section: Section) -> None:
    if not section.headings:
        out.print(Text(section.title))
        return
    table = _table(*section.headings, title=section.title)
    rows = section.rows[:MOST] if section.long else section.rows
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
    if len(rows) < len(section.rows):
        out.print(f"and {len(section.rows) - len(rows)} more, which --json has")
    for said in section.below:
        out.print(Text(said))


def show_run(ran: Ran) -> None:
    """What the processes of ``run`` did, a line per fact."""
    out = console()
    out.print(Text("ok" if ran.ok else "FAILED", style="bold green" if ran.ok else "bold red"))
    table = _facts()
    table.add_row("plan", Text(ran.plan))
    table.add_row("ranks", f"{_processes(ran.ranks)}, {ran.backend} on {ran.device}, lowering {ran.lowering}")
    first, *later = ran.seconds
    table.add_row("first call", f"{first:.3g} s, compiling")
    if later:
        said = f"{statistics.median(later):.3g} s in the median of {len(later)}, {min(later):.3g} at the least"
        table.add_row("later ones", said)
    others = ", ".join(map(str, ran.differ))
    same = "on all ranks, in every call"
    if ran.differ:
        same = f"NO: rank{'s' * (len(ran.differ) > 1)} {others} and rank 0 differ"
    table.add_row("same bits", same)
    table.add_row("error", Text(_distance(ran)))
    table.add_row("memory", f"{size(ran.peak_bytes)} at the most on a rank"
                  f"{', with all that Python and torch take' if ran.device == 'cpu' else ''}")  # fmt: skip
    for message in [*([ran.shared] if ran.shared else []), *ran.messages]:
        table.add_row("note", Text(message))
    out.print(table)


def _processes(ranks: int) -> str:
    """How many."""
    return f"{ranks} process{'es' * (ranks > 1)}"


def _distance(ran: Ran) -> str:
    """How far a run is from eager, and from where it may be."""
    if ran.held is None:
        return "not checked"
    held = ran.held
    said = f"{held.error:.1e} relative to eager in {held.dtype}"
    if ran.lossy:
        return f"{said}; lossy, as asked"
    return f"{said}; {held.exact:.1e} to float64, where eager has {held.eager:.1e} and {held.allowed:.1e} is allowed"


def show_bench(found: Benched) -> None:
    """What ``bench`` measured, a line per entry."""
    out = console()
    first, counted = found.entries[0], any(e.launches for e in found.entries)
    table = _table("", "ranks>", "ms>", "quartiles>", f"of {first.name}>", "first call, s>",
                   *(["launches>"] if counted else []))  # fmt: skip
    for e in found.entries:
        low, high = (ms(1e3 * x) for x in e.quartiles)
        cells = [str(e.ranks), ms(1e3 * e.median), f"{low} to {high}", f"{e.over(first):.3f}", f"{e.first:.3g}"]
        if counted:
            cells.append(str(e.launches["launches"]) if e.launches else "-")
        table.add_row(Text(f"{e.name}, lossy" if e.lossy else e.name), *cells)
    out.print(table)
    threads = f", {found.threads} thread{'s' * (found.threads > 1)} each" if found.threads else ""
    plans = f"plans: {_processes(found.ranks)}, {found.backend} on {found.device}, lowering {found.lowering}{threads}"
    turns = f"{len(first.seconds)} rounds of {found.calls} call{'s' * (found.calls > 1)} each, in turns"
    for said in (plans, f"medians of {turns}; ratios are medians of those within a round", *found.notes):
        out.print(Text(said))


def show_facts(facts: Sequence[Fact]) -> None:
    """What ``doctor`` found, a line per fact."""
    table = _table("", "", "found", "what to do")
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    for fact in facts:
        table.add_row(fact.name, Text(fact.status, style=styles[fact.status]), Text(fact.found), Text(fact.advice))
    out = console()
    out.print(table)
    counts = {status: sum(fact.status == status for fact in facts) for status in styles}
    out.print("; ".join(f"{n} {status}" for status, n in counts.items() if n))


def show_times(rows: Sequence[tuple[str, float, str, int]]) -> None:
    """A row per pass: (pass, seconds, the stage that it left, nodes)."""
    table = _table("pass", "seconds>", "stage", "nodes>", "change>")
    before = rows[0][3]
    for name, seconds, stage, nodes in rows:
        change = f"{nodes - before:+d}" if name else ""
        table.add_row(Text(name or "(captured)"), f"{seconds:.3f}" if name else "", stage, str(nodes), change)
        before = nodes
    table.add_section()
    table.add_row("all", f"{sum(row[1] for row in rows):.3f}")
    console().print(table)


def show_proofs(proofs: Sequence[Proof], ranks: int) -> None:
    """A row per pass: the difference from eager of what N virtual ranks compute after it."""
    table = _table("after", "stage", "error>", "ranks agree", "")
    for proof in proofs:
        said = "ok" if proof.ok else "FAILED"
        table.add_row(
            Text(proof.after or "(captured)"),
            proof.stage,
            f"{proof.error:.1e}",
            "yes" if proof.same_bits else "NO",
            Text(said + (", lossy" if proof.lossy else ""), style="" if proof.ok else "bold red"),
        )
    out = console()
    out.print(table)
    out.print(f"{ranks} virtual ranks against eager in float64: the worst output of any rank, relative")


def _facts() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _table(*headings: str, title: str = "") -> Table:
    """Columns by heading; one that ends in > is of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left", title_style="bold")
    for heading in headings:
        right = heading.endswith(">")
        table.add_column(heading.removesuffix(">"), justify="right" if right else "left", overflow="fold",
                         no_wrap=right)  # fmt: skip
    return table
