"""A report as one HTML page that can be sent around: nothing is loaded from anywhere, and no script runs.

Texts that come from models, plans and files (names, source lines, reasons) are escaped wherever they stand.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from fastpar.core.version import VERSION
from fastpar.plan.picture import png
from fastpar.report import sections
from fastpar.report.sections import Section
from fastpar.report.style import STYLE
from fastpar.report.words import ms, size

if TYPE_CHECKING:
    from fastpar.run.report import Report

SHOWN = 8
"""Ranks of a picture."""


def page(
    report: Report, model: str, *, verdict: Report | None = None, command: str = "", made: str = ""
) -> str:
    """The page of a plan for ``model``.

    ``verdict`` is what ``verify`` has returned; ``command`` and ``made`` (a date, versions) stand at the foot.
    """
    on = f" on {report.topology}" if report.topology else ""
    body = [
        f"<h1>{escape(report.plan)}</h1>",
        f'<p class="under">{escape(model)}{escape(on)}, {report.ranks} rank{"s" * (report.ranks != 1)}</p>',
        *_verdict(verdict),
        _tiles(report),
        "<h2>What a rank does</h2>",
        _facts([*sections.what(report), *sections.facts(report)]),
        *_picture(report),
        *map(_section, sections.sections(report)),
        *_notes(report.notes),
        _foot(report, command, made),
    ]
    title = escape(f"{report.plan}: {model}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _verdict(verdict: Report | None) -> list[str]:
    """Whether the ranks' programs together compute what the model does, where that was asked."""
    if verdict is None:
        return []
    said, look = ("verified", "good") if verdict.ok else ("not verified: the ranks do not compute the model", "bad")
    return [f'<p class="verdict {look}">{said}</p>', _facts(sections.verdict(verdict))]


def _tiles(report: Report) -> str:
    """The numbers that one looks for first, each beside what it is to be held against."""
    n, least = report.ranks, f"attainable {report.attainable_share:.4f}"
    tiles = [
        (f"{report.flops_share:.4f}", "of one device's FLOPs", f"{least}, 1/{n} is {1 / n:.4f}"),
        (f"{report.time_share:.4f}", "of one device's time", "computing only, on a roofline"),
        (size(report.bytes_per_rank), "leave the busiest rank", f"{size(report.bytes_formula)} by the formula"),
    ]
    if report.predicted:
        whole, left = (1e3 * report.predicted[name] for name in ("seconds", "exposed"))
        hidden = max(0.0, 1e3 * report.predicted["communication"] - left)
        tiles.append((f"{ms(whole)} ms", "predicted per call", f"{ms(left)} exposed, {ms(hidden)} hidden"))
    if report.generation:
        seconds, steps = report.generation["seconds"], int(report.generation["steps"])
        tiles.append((f"{seconds:.3g} s", f"predicted for {steps} steps", "the model's calls only"))
    cells = "\n".join(
        f'<div class="tile"><b>{escape(number)}</b>{escape(of)}<br><span>{escape(against)}</span></div>'
        for number, of, against in tiles
    )
    return f'<div class="tiles">\n{cells}\n</div>'


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in pairs)
    return f"<dl>\n{rows}\n</dl>"


def timeline(report: Report) -> bytes | None:
    """What the ranks do in time, as a PNG; of many ranks the first, for more are too many to see anything."""
    if report.timeline is None or not report.timeline.events:
        return None
    events = [event for event in report.timeline.events if event.rank < SHOWN]
    return png(replace(report.timeline, events=events), f"{report.plan} on {report.topology}")


def _picture(report: Report) -> list[str]:
    """The timeline, in the page itself."""
    drawn = timeline(report)
    if drawn is None:
        return []
    who = f"each of {report.ranks}" if report.ranks <= SHOWN else f"each of the first {SHOWN} of {report.ranks}"
    what = f"What {who} ranks computes, sends and waits for, predicted on {report.topology}"
    image = f'<img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(drawn).decode()}">'
    return ["<h2>The ranks in time</h2>", f"<p>{escape(what)}.</p>", f'<div class="wide">{image}</div>']


def _section(section: Section) -> str:
    below = "".join(f"\n<p>{escape(said)}</p>" for said in section.below)
    title = f"<h2>{escape(section.title[:1].upper() + section.title[1:])}</h2>"
    if not section.headings:
        return f"{title}{below}"
    right = [heading.endswith(">") for heading in section.headings]
    head = "".join(_cell("th", heading.removesuffix(">"), number)
                   for heading, number in zip(section.headings, right, strict=True))  # fmt: skip
    rows = "\n".join(
        f"<tr>{''.join(_cell('td', text, number) for text, number in zip(row, right, strict=True))}</tr>"
        for row in section.rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f'{title}\n<div class="wide">{table}</div>{below}'


def _cell(tag: str, text: str, number: bool) -> str:
    look = ' class="number"' if number else ""
    return f"<{tag}{look}>{escape(text)}</{tag}>"


def _notes(notes: Iterable[str]) -> list[str]:
    items = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
    return ["<h2>Notes</h2>", f"<ul>\n{items}\n</ul>"] if items else []


def _foot(report: Report, command: str, made: str) -> str:
    said = [f"fastpar {VERSION}", *([made] if made else []), *([sections.took(report)] if report.seconds else [])]
    run = f"<br><code>{escape(command)}</code>" if command else ""
    return f"<footer>{escape('; '.join(said))}{run}</footer>"
