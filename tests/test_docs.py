"""What the documentation shows is what happens: its Python runs, its output is compared, its links lead somewhere.

Blocks of one page run in order, in one namespace. A block with prompts is a doctest; one without is
executed. ```` ```py ```` marks Python that is not run (it needs a launcher, or is a sketch).
"""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastpar.core.plan import TERMS
from fastpar.registry import PASSES
from fastpar.rules.table import known
from tests.mutants.__main__ import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python to run: the line where each block begins, and its text."""
    text = page.read_text()
    return [
        (text.count("\n", 0, m.start()) + 1, m[2]) for m in _BLOCK.finditer(text) if m[1] == "python"
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(f"page_{page.stem}")  # Dynamo looks up in modules what functions find around them
    monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = vars(module)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    for line, text in blocks(page):
        if ">>>" not in text:
            exec(compile(text, f"{page.name}:{line}", "exec"), namespace)
            continue
        test = parser.get_doctest(text, namespace, page.name, str(page), line)
        test.globs = namespace
        runner.run(test, out=said.append, clear_globs=False)
    assert not runner.summarize(verbose=False).failed, "".join(said)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_has_every_plan_term() -> None:
    text = (ROOT / "README.md").read_text().partition("\n## Plans\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)", text, re.MULTILINE)) == set(TERMS)


def test_the_table_of_passes_has_every_pass() -> None:
    text = (ROOT / "docs" / "pipeline.md").read_text().partition("## The passes")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)", text, re.MULTILINE)) == set(PASSES)


def test_the_table_of_rules_names_operators_that_have_one() -> None:
    table = [line for line in (ROOT / "docs" / "rules.md").read_text().splitlines() if line.startswith("| `")]
    names = {name for line in table for name in re.findall(r"`((?:aten|fastpar)::\w+)`", line)}
    assert len(names) > 20 and [name for name in sorted(names) if not known(name)] == []
    files = {re.findall(r"`(\w+)\.py`", line)[0] for line in table if ".py`" in line}
    rules = {p.stem for p in (ROOT / "fastpar" / "rules").glob("*.py")} - {"__init__", "table", "factor", "localise"}
    assert files == rules


def test_mutants_are_of_text_that_is_there() -> None:
    """Each of them once: ``make mutants`` takes hours, and a place that has changed should not wait for it."""
    lost = [m.name for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) != 1]
    assert not lost
