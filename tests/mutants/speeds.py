"""Mutants of what is shared out by speeds."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TESTS = "tests/test_speeds.py"

MUTANTS = (
    Mutant(
        "rows are shared out evenly whatever the speeds", "fastpar/core/mesh.py",
        "    if not mesh.speeds:\n", "    if True:\n", (TESTS, "-k", "exact_and_balanced"),
    ),
    Mutant(
        "what does not divide goes to the first ranks", "fastpar/core/layout.py",
        "key=lambda rank: ((held[rank] + parts[rank] + 1) / shares[rank], rank)", "key=lambda rank: rank",
        (TESTS, "-k", "soonest"),
    ),
    Mutant(
        "speeds follow the plan's order of axes", "fastpar/plan/expand.py",
        "tokens = tuple(name for name in mesh.names if axis_of(name) in TOKEN_AXES)",
        "tokens = tuple(name for name in sorted(mesh.names) if axis_of(name) in TOKEN_AXES)",
        (TESTS, "-k", "those_of_ranks"),
    ),
    Mutant(
        "of ranks with the same rows the fastest counts", "fastpar/plan/planner.py",
        "min(topology.speed(rank)", "max(topology.speed(rank)", (TESTS, "-k", "slowest"),
    ),
    Mutant(
        "the clock takes all devices to be alike", "fastpar/plan/clock.py",
        "[1 / topology.speed(rank) for", "[1.0 for", (TESTS, "-k", "what_the_speeds_allow"),
    ),
    Mutant(
        "predictions take all devices to be alike", "fastpar/plan/predict.py",
        "(uneven * float(x) * deal, topology.speed(rank) *", "(uneven * float(x) * deal, 1.0 *",
        (TESTS, "-k", "what_the_speeds_allow"),
    ),
    Mutant(
        "the order is found for devices that are alike", "fastpar/plan/durations.py",
        "/ self.topology.speed(r) for", "for", (TESTS, "-k", "slow_device_takes"),
    ),
    Mutant(
        "an N-th is attainable whatever the speeds", "fastpar/run/explained.py",
        "candidates, 1 / most, cut", "candidates, ranks // deal // tp, cut", (TESTS, "-k", "exact_and_balanced"),
    ),
    Mutant(
        "the fastest rank sends as much as the mean", "fastpar/plan/formula.py",
        "most = float(mesh.ranks * max(mesh.shares(mesh.names)))", "most = 1.0", (TESTS, "-k", "exact_and_balanced"),
    ),
)
