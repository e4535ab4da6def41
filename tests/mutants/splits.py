"""Mutants of what is split, and of where values are cut."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CANDIDATES, EARLY, INSERT = (f"fastpar/sharding/{name}.py" for name in ("candidates", "early", "insert"))


MUTANTS = (
    Mutant(
        "even: every segment's larger parts come first", INSERT,
        "self.unit, seed.before)", "self.unit)",
        ("tests/test_candidates.py", "-k", "segments"),
    ),
    Mutant(
        "even: what is whole does not fill up", "fastpar/rules/views.py",
        "filling_parts(size, mesh.shares(axes), held)", "filling_parts(size, mesh.shares(axes), [0] * len(held))",
        ("tests/test_candidates.py", "-k", "segments"),
    ),
    Mutant(
        "merged rows are followed no further", CANDIDATES,
        "return [*walk.merged(node, rows), rows]", "return [rows]",
        ("tests/test_candidates.py", "-k", "merges"),
    ),
    Mutant(
        "windows are no candidate", CANDIDATES,
        "(leading, *walk.merged(call.operands[0], leading))", "()",
        ("tests/test_candidates.py", "-k", "windows"),
    ),
    Mutant(
        "rows beside a seed's do not contradict it", CANDIDATES,
        "any(walk.beside(s) & b for s in a - b) or any(walk.beside(s) & a for s in b - a)", "False",
        ("tests/test_candidates.py", "-k", "alternatives"),
    ),
    Mutant(
        "a window's part of merged rows is not seen", "fastpar/rules/views.py",
        "ends = [(max(low, bottom), min(high, top)) for", "ends = [(bottom, top) for",
        ("tests/test_candidates.py", "-k", "windows"),
    ),
    Mutant(
        "a network of its own is not looked for", CANDIDATES,
        "< MUCH * sum(works.values()) and", "< 2 * sum(works.values()) and",
        ("tests/test_candidates.py", "-k", "network"),
    ),
    Mutant(
        "other networks are looked for, however small", CANDIDATES,
        "MUCH = 0.25", "MUCH = 0.0",
        ("tests/test_candidates.py", "-k", "little"),
    ),
    Mutant(
        "a prompt is a network of its own", CANDIDATES,
        "return [n for n in among if n not in joined]", "return [n for n in among if n not in reached]",
        ("tests/test_candidates.py", "-k", "prompt"),
    ),
    Mutant(
        "one row that all need is a gather", "fastpar/sharding/expand_rows.py",
        'whole.with_dim(d, Dim.whole(1)) if call.shapes[0][d] == 1 else whole', "whole",
        ("tests/test_candidates.py", "-k", "down_to_one"),
    ),
    Mutant(
        "what could be split in any way decides how rows are", INSERT,
        "if self._moved(call, layouts, other) < moved:", "if False:",
        ("tests/test_early.py", "-k", "spread"),
    ),
    Mutant(
        "what comes of a split batch is not loose along other axes", INSERT,
        "self.loose[node] = self.main[node].split_axes - held",
        "self.loose[node] = frozenset() if held else self.main[node].split_axes",
        ("tests/test_early.py", "-k", "spread"),
    ),
    Mutant(
        "late: only what is whole is something to make parts of", EARLY,
        "isinstance(layout, Layout) and not layout.axes & axes)", "isinstance(layout, Layout) and layout.is_whole)",
        ("tests/test_early.py", "-k", "spread"),
    ),
    Mutant(
        "late: however long it takes", EARLY,
        "<= max(read, travel, AT_ONCE)", "<= 1 << 62",
        ("tests/test_early.py", "-k", "longer or large"),
    ),
    Mutant(
        "late: what a plan sends is made as well", EARLY,
        '_PLANNED = ("attention", "reduce", "output")', '_PLANNED = ("reduce", "output")',
        ("tests/test_early.py", "-k", "plan_sends"),
    ),
    Mutant(
        "early: cuts of what is split already stay", EARLY,
        "isinstance(layout, Layout) and not layout.partial and", "isinstance(layout, Layout) and layout.is_whole and",
        ("tests/test_early.py", "-k", "part_of_the_batch"),
    ),
)
