"""``fastpar report``: the page has what the report says, is one file, and shows what models say as text."""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastpar
from fastpar.cli.main import app
from fastpar.graph.capture import Captured
from fastpar.plan.timeline import Event, Timeline
from fastpar.report.page import SHOWN, page
from fastpar.report.sections import facts, sections
from fastpar.run.report import (
    ExposedRow,
    FallbackReport,
    LinkRow,
    OrderRow,
    PlanRow,
    Replicated,
    Report,
)
from tests.scripts import small

SCRIPTS = Path(__file__).parent / "scripts"
VOID = {"meta", "br", "img"}
NASTY = '<script>alert("1 & 2")</script>\'"'


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS)
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    model, inputs = small.denoiser()
    return fastpar.capture(model.requires_grad_(False), inputs)


class Page(HTMLParser):
    """Tags, attributes and text; raises where tags are not closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.words)


def contained(text: str) -> Page:
    """A page that loads nothing and runs nothing."""
    found = Page(text)
    assert found.tags["script"] == found.tags["link"] == found.tags["iframe"] == 0
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith("data:image/png;base64,"), (tag, name, value)
    assert "@import" not in text and "url(" not in text
    return found


def run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["report", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, f"{result.exit_code}: {result.output}"
    return result.output


# -- the verb -----------------------------------------------------------------------------------


def test_a_page_has_all_that_explain_says_and_the_verdict(tmp_path: Path) -> None:
    out, wide = tmp_path / "new" / "page.html", ("--plan", "auto", "--ranks", "2", "--topology", "a100-4x8")
    said = run("small:denoiser", *wide, "--steps", "5", "--verify", "--out", str(out))
    text = out.read_text()
    found = contained(text)
    asked = ["explain", "small:denoiser", *wide, "--steps", "5", "--json", "-"]
    report = json.loads(CliRunner().invoke(app, asked).output)
    assert said == f"{out}: {report['plan']} on 2 ranks, verified\n"
    for part in (report["plan"], report["pipeline"], report["formula"], f"{report['flops_share']:.4f} of one device",
                 f"attainable {report['attainable_share']:.4f}", f"{report['bytes_per_rank']:,}", "small:denoiser",
                 "verified", "tolerance", "predicted for 5 steps", "The ranks in time", "what each of 2 ranks computes",
                 *report["notes"]):  # fmt: skip
        assert part.lower() in found.text.lower(), part
    for row in report["plans"]:
        assert row["plan"] in found.text and row["reason"] in found.text
    for row in report["collectives"]:
        assert any(cells[:2] == [row["kind"], row["axis"]] and row["source"] in cells[-1] for cells in found.cells)
    for row in report["replicated"]:
        assert [row["operator"], f"{row['share']:.3%}", row["source"]] in found.cells
    ((data,),) = [[v for _, name, v in found.attributes if name == "src"]]
    assert base64.b64decode(data.partition(",")[2]).startswith(b"\x89PNG")
    assert [p.name for p in out.parent.iterdir()] == ["page.html"]


def test_without_a_topology_there_are_no_times(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run("small:denoiser", "--plan", "ulysses=3", "--out", str(out)) == f"{out}: ulysses=3 on 3 ranks\n"
    found = contained(out.read_text())
    assert found.tags["img"] == 0 and "predicted" not in found.text and "verified" not in found.text


def test_a_lossy_plan_says_so(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    run("small:denoiser", "--plan", "gather=2,displaced(warmup=1)", "--topology", "l40-8", "--fake", "--out", str(out))
    found = contained(out.read_text())
    assert "lossy: displaced" in found.text and "carried" in found.text and found.tags["img"] == 1


def test_what_does_not_hold_is_status_1_and_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastpar.run.verify as verify

    proved = verify.verify

    def wrong(*args: Any, **kwargs: Any) -> Report:
        found = proved(*args, **kwargs)
        return replace(found, ok=False, max_rel_err=0.25, diverged_at="model.py:3 in forward: a < b", notes=["a note"])

    monkeypatch.setattr(verify, "verify", wrong)
    out = tmp_path / "page.html"
    said = run("small:denoiser", "--plan", "ulysses=2", "--verify", "--out", str(out), status=1)
    assert "FAILED to verify" in said
    found = contained(out.read_text())
    for part in ("not verified", "2.5e-01 relative", "model.py:3 in forward: a < b", "a note"):
        assert part in found.text


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--plan", "ulises=2"), "did you mean 'ulysses'"),
        (("--plan", "auto"), "needs the number of ranks"),
        (("--plan", "ulysses=2", "--topology", "l41-8"), "did you mean 'l40-8'"),
        (("--plan", "ulysses=2", "--steps", "3"), "--steps is about predicted times"),
        (("--plan", "ulysses=2", "--verify", "--fake"), "leave one of them out"),
        (("--plan", "ulysses=2", "--out", "page.pdf"), "--out: expected the name of a .html file, not 'page.pdf'"),
        (("--plan", "ulysses=2", "--out", "small.py/page.html"), "is no folder to write to"),
    ],
)
def test_a_mistake_is_one_message_and_no_page(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    before = sorted(SCRIPTS.iterdir())
    out = () if "--out" in args else ("--out", str(tmp_path / "page.html"))
    found = run("small:denoiser", *args, *out, status=2)
    assert found.startswith("error: ") and said in found and "Traceback" not in found
    assert list(tmp_path.iterdir()) == [] and sorted(SCRIPTS.iterdir()) == before


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "page.html"
    out.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    found = run("small:denoiser", "--plan", "ulysses=2", "--out", str(out), status=2)
    assert "--out: cannot write" in found and "No space left" in found
    assert out.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["page.html"]


# -- the page -----------------------------------------------------------------------------------


def everything(captured: Captured) -> Report:
    """A report whose every text is nasty."""
    report = fastpar.explain(captured, plan="ulysses=2")
    texts = {f.name: NASTY for f in fields(Report) if f.type == "str"}
    collectives = [replace(report.collectives[0], kind=NASTY, axis=NASTY, why=NASTY, source=NASTY)]
    return replace(
        report,
        **texts,
        collectives=collectives,
        replicated=[Replicated(NASTY, NASTY, 0.5)] * 20,
        fallbacks=[FallbackReport(NASTY, NASTY, NASTY, NASTY, 7)],
        notes=[NASTY],
        seconds={NASTY: 1.0},
        symbols=[{"Q": 1, "count": 2, "itemsize": 4, NASTY: 3}],
        hoisted=replace(report.hoisted, values=1, varying=(NASTY,)),
        links=[LinkRow(NASTY, 1, 2, 3, [NASTY]), LinkRow(NASTY + "2", 2, 2, 0, [])],
        plans=[PlanRow(NASTY, 1.0, 0.5, 10, 2.0, NASTY, {NASTY: NASTY, "x": NASTY + "2"}),
               PlanRow(NASTY, None, None, None, None, NASTY)],
        orders=[OrderRow(NASTY, 1.0, 0.5, 3)],
        exposed=[ExposedRow(NASTY, 1.0, 2, NASTY)],
        predicted={"seconds": 1e-3, "compute": 8e-4, "communication": 4e-4, "exposed": 2e-4},
        generation={"seconds": 1.0, "first": 0.1, "step": 0.1, "steps": 9, "streams": 1},
    )  # fmt: skip


def test_texts_of_models_are_text(captured: Captured) -> None:
    report = everything(captured)
    verdict = replace(report, ok=False, max_abs_err=1.0, max_rel_err=1.0, tolerance=1e-9)
    text = page(report, NASTY, verdict=verdict, command=NASTY, made=NASTY)
    found = contained(text)
    assert "<script" not in text and found.text.count(NASTY) > 40
    assert found.tags["table"] == 7, "plans, links, orders, exposed, collectives, replicated, fallbacks"
    assert sum(cells == [NASTY, "50.000%", NASTY] for cells in found.cells) == 20, "a page has every row"
    assert found.text.count(f"not for this call: {NASTY}") == 1


def test_every_part_of_a_report_is_somewhere(captured: Captured) -> None:
    report = everything(captured)
    names = {section.title for section in sections(report)}
    assert len(names) == len(sections(report)) == 7
    assert [name for name, _ in facts(report) if name] == ["FLOPs", "time", "bytes", "formula", "hoisted", "predicted",
                                                            "generation"]  # fmt: skip
    bare = Report("gather=1", "", 1, 1)
    assert [section.title.partition(":")[0] for section in sections(bare)] == ["no collectives", "no fallbacks"]
    assert contained(page(bare, "m")).tags["table"] == 0


def test_of_many_ranks_the_first_are_drawn(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[int]] = []
    monkeypatch.setattr("fastpar.report.page.png", lambda t, _: drawn.append({e.rank for e in t.events}) or b"png")
    events = [Event(rank, "compute", "mm", 0.0, 1.0) for rank in range(32)]
    report = replace(Report("ring=32", "", 32, 1), timeline=Timeline(1.0, events=events))
    found = page(report, "m")
    assert drawn == [set(range(SHOWN))] and f"each of the first {SHOWN} of 32 ranks" in found
    assert base64.b64encode(b"png").decode() in found


def test_dark_and_light(captured: Captured) -> None:
    text = page(fastpar.explain(captured, plan="ulysses=2"), "m")
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
