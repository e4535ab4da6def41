"""Reports as tables on the terminal, and as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastpar.cli.timelines import sampling
from fastpar.core.errors import OptionError

if TYPE_CHECKING:
    from fastpar.cli.calling import Ran
    from fastpar.cli.health.fact import Fact
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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
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
    _what(table, report)
    table.add_row(
        "error", f"{report.max_rel_err:.1e} relative, {report.max_abs_err:.1e} absolute: the worst output of any rank"
    )
    table.add_row("tolerance", f"{report.tolerance:.1e} relative")
    if report.diverged_at:
        table.add_row("diverged at", Text(report.diverged_at))
    for note in report.notes:
        table.add_row("note", Text(note))
    out.print(table)


def show_report(report: Report) -> None:
    """What ``explain`` found: a head of facts, then a table for each list that is not empty."""
    out = console()
    head = _facts()
    _what(head, report)
    ranks = report.ranks
    head.add_row(
        "FLOPs",
        f"{report.flops_share:.4f} of one device's on the busiest rank (1/{ranks} is {1 / ranks:.4f}, attainable "
        f"{report.attainable_share:.4f})",
    )
    head.add_row("time", f"{report.time_share:.4f} of one device's, computing only, on a roofline")
    head.add_row("bytes", f"{report.bytes_per_rank:,} ({_size(report.bytes_per_rank)}) leave the busiest rank per call")
    against = f", {report.bytes_per_rank / report.bytes_formula:.3f} times" if report.bytes_formula else ""
    head.add_row("formula", f"{report.bytes_formula:,}{against}: {report.formula}")
    for values in report.symbols:
        head.add_row("", _legend(values))
    if report.hoisted.values:
        head.add_row("hoisted", _once(report))
    if report.carried_bytes:
        head.add_row("carried", f"{report.carried_bytes:,} bytes of the others' activations, from step to step")
    if report.predicted:
        p = {name: 1e3 * value for name, value in report.predicted.items()}
        head.add_row(
            "predicted",
            f"{_ms(p['seconds'])} ms per call on {report.topology}: {_ms(p['compute'])} computing, "
            f"{_ms(p['communication'])} communicating, of which {_ms(p['exposed'])} exposed",
        )
    if report.generation:
        head.add_row("generation", sampling(report.generation))
    out.print(head)
    _plans(out, report)
    _links(out, report)
    _orders(out, report)
    _collectives(out, report)
    _replicated(out, report)
    _fallbacks(out, report)
    for note in report.notes:
        out.print(Text(f"note: {note}"))
    if report.seconds:
        took = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
        out.print(f"seconds: {took}; {sum(report.seconds.values()):.2f} in all")


def show_run(ran: Ran) -> None:
    """What the processes of ``run`` did, a line per fact."""
    out = console()
    out.print(Text("ok" if ran.ok else "FAILED", style="bold green" if ran.ok else "bold red"))
    table = _facts()
    table.add_row("plan", Text(ran.plan))
    table.add_row("ranks", f"{ran.ranks} processes, {ran.backend} on {ran.device}, lowering {ran.lowering}")
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
    table.add_row("memory", f"{_size(ran.peak_bytes)} at the most on a rank"
                  f"{', with all that Python and torch take' if ran.device == 'cpu' else ''}")  # fmt: skip
    for message in [*([ran.shared] if ran.shared else []), *ran.messages]:
        table.add_row("note", Text(message))
    out.print(table)


def _distance(ran: Ran) -> str:
    """How far a run is from eager, and from where it may be."""
    if ran.held is None:
        return "not checked"
    held = ran.held
    said = f"{held.error:.1e} relative to eager in {held.dtype}"
    if ran.lossy:
        return f"{said}; lossy, as asked"
    return f"{said}; {held.exact:.1e} to float64, where eager has {held.eager:.1e} and {held.allowed:.1e} is allowed"


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


def _what(table: Table, report: Report) -> None:
    table.add_row("plan", Text(report.plan))
    table.add_row("pipeline", Text(report.pipeline))
    table.add_row("ranks", f"{report.ranks}, {report.graphs} graph{'s' * (report.graphs > 1)}")


def _table(*headings: str, title: str = "") -> Table:
    """Columns by heading; one that ends in > is of numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left", title_style="bold")
    for heading in headings:
        right = heading.endswith(">")
        table.add_column(heading.removesuffix(">"), justify="right" if right else "left", overflow="fold",
                         no_wrap=right)  # fmt: skip
    return table


def _once(report: Report) -> str:
    """What is done once per generation and stream, and what a later call is left with."""
    once = report.hoisted
    return (
        f"once per generation: {once.flops_share:.4f} of one device's FLOPs, {once.bytes:,} bytes, {once.collectives} "
        f"collectives; then {report.step_flops_share:.4f}, {report.step_bytes_per_rank:,}, {report.step_collectives}. "
        f"{once.values} values are kept ({once.kept_bytes:,} bytes), {once.checked_bytes:,} bytes checked per call"
        f"{f' and {once.agreements} all-reduces of the answer' if once.agreements else ''}; "
        f"changing from call to call: {', '.join(once.varying)}"
    )


def _plans(out: Console, report: Report) -> None:
    if not report.plans:
        return
    outer = _outermost(report)
    across = [f"over {outer}"] if outer else []
    titles = ("plan", "ms>", "of it exposed>", "sent>", "memory>", *across, "why")
    table = _table(*titles, title=f"Plans for {report.topology}, predicted per call and rank")
    invalid: dict[str, list[str]] = {}
    for row in report.plans:
        if row.milliseconds is None or row.exposed is None or row.bytes is None or row.gigabytes is None:
            invalid.setdefault(row.reason, []).append(row.plan)
            continue
        cells = [_ms(row.milliseconds), _ms(row.exposed), _size(row.bytes), _size(row.gigabytes * 1e9)]
        if outer:
            cells.append(", ".join(axis for axis, link in row.links.items() if link == outer) or "nothing")
        table.add_row(Text(row.plan), *cells, Text(row.reason))
    out.print(table)
    for reason, plans in invalid.items():
        out.print(Text(f"not for this call: {'; '.join(plans)}: {reason}"))


def _links(out: Console, report: Report) -> None:
    """What crosses each class of links, where there are several."""
    if len(report.links) < 2:
        return
    table = _table("link", "of each", "axes", "bytes>", "by the formula>", "times>", title="What leaves one end")
    for x in report.links:
        of = "device" if x.ranks == 1 else f"{x.ranks} devices"
        times = f"{x.bytes / x.formula:.3f}" if x.formula else "-"
        table.add_row(x.name, of, ", ".join(x.axes) or "none", f"{x.bytes:,}", f"{x.formula:,}", times)
    out.print(table)


def _orders(out: Console, report: Report) -> None:
    """What ``overlap`` weighed, and what stays exposed in the order that it took."""
    if not report.orders:
        return
    table = _table("order", "ms>", "of it exposed>", "collectives>", title="Orders weighed, the first is taken")
    for o in report.orders:
        table.add_row(o.order, _ms(o.milliseconds), _ms(o.exposed), str(o.collectives))
    out.print(table)
    if not report.exposed:
        return
    title = f"{sum(e.count for e in report.exposed)} exchanges stay exposed"
    table = _table("ms>", "count>", "why", "source line", title=title)
    for e in report.exposed[:MOST]:
        table.add_row(_ms(e.milliseconds), str(e.count), e.reason, Text(e.source or "(an input)"))
    out.print(table)
    if len(report.exposed) > MOST:
        out.print(f"and {len(report.exposed) - MOST} lines more")


def _legend(values: Mapping[str, int]) -> str:
    """What a form's symbols stand for, as one reads it: ``57 attentions of 2-byte elements: Q = 14,155,776, ...``."""
    what = "attention" if "Q" in values else "sum over cut columns" if "S" in values else "output"
    what = what.replace("sum", "sums") if values["count"] > 1 and "S" in values else what
    plural = "s" * (values["count"] > 1 and "S" not in values)
    named = ", ".join(f"{name} = {value:,}" for name, value in values.items() if name not in ("count", "itemsize"))
    return f"{values['count']} {what}{plural} of {values['itemsize']}-byte elements: {named}"


def _outermost(report: Report) -> str:
    """The outermost link that any plan crosses, if some plans' axes cross others."""
    names = {link: None for row in report.plans for link in row.links.values()}
    outer = [x.name for x in report.links if x.name in names]
    return outer[-1] if len(names) > 1 and outer else ""


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"


def _size(size: float) -> str:
    """Bytes in a unit that one reads."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def _collectives(out: Console, report: Report) -> None:
    if not report.collectives:
        out.print("no collectives: nothing is exchanged")
        return
    count = sum(c.count for c in report.collectives)
    title = f"{count} collectives per call; by the formula, before messages are joined, {report.collectives_formula}"
    table = _table("kind", "axis", "bytes>", "count>", "for", "source line", title=title)
    for c in sorted(report.collectives, key=lambda c: -c.bytes):
        table.add_row(c.kind, c.axis, f"{c.bytes:,}", str(c.count), c.why, Text(c.source or "(an input)"))
    out.print(table)


def _replicated(out: Console, report: Report) -> None:
    if not report.replicated:
        return
    share = sum(r.share for r in report.replicated)
    title = f"work that every rank repeats: {share:.2%} of one device's FLOPs"
    table = _table("operator", "share>", "source line", title=title)
    for r in report.replicated[:MOST]:
        table.add_row(r.operator, f"{r.share:.3%}", Text(r.source))
    out.print(table)
    _rest(out, len(report.replicated))


def _fallbacks(out: Console, report: Report) -> None:
    if not report.fallbacks:
        out.print("no fallbacks: nothing is gathered that the plan did not ask for")
        return
    title = f"{len(report.fallbacks)} fallbacks: exchanges that no plan asked for"
    table = _table("operator", "kind", "bytes>", "reason", "source line", title=title)
    for f in sorted(report.fallbacks, key=lambda f: -f.bytes)[:MOST]:
        table.add_row(f.operator, f.kind, f"{f.bytes:,}", Text(f.reason), Text(f.source))
    out.print(table)
    _rest(out, len(report.fallbacks))


def _rest(out: Console, rows: int) -> None:
    if rows > MOST:
        out.print(f"and {rows - MOST} more, which --json has")
