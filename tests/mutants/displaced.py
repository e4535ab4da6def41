"""Mutants of what is a step late."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TESTS, TURNS = "tests/test_displaced.py", "tests/test_displaced_turns.py"

MUTANTS = (
    Mutant(
        "corrected norms count the own change once", "passes/displace.py",
        "factors = [1 / s if s else 0.0 for s in own_shares(of, self.mesh)]",
        "factors = [1.0 for s in own_shares(of, self.mesh)]", (TESTS, "-k", "as_by_hand and corrected"),
    ),
    Mutant(
        "patches are taken to be equal", "passes/displace.py",
        "return [n / total if total else 0.0 for n, total in zip(counts, totals, strict=True)]",
        "return [1 / len(mesh.group(rank, (AXIS,))) for rank in range(mesh.ranks)]",
        (TESTS, "-k", "as_by_hand and separate"),
    ),
    Mutant(
        "variances may be negative", "fastpar/ops/displaced.py",
        "torch.where(square < mean * mean,", "torch.where(square < 0,", (TESTS, "-k", "negative"),
    ),
    Mutant(
        "what ranks make of all rows may be an output", "passes/displace.py",
        "if late and not _is_cut(", "if False and not _is_cut(", (TESTS, "-k", "same_on_all_ranks"),
    ),
    Mutant(
        "rows may move on a step late", "fastpar/core/transfer.py",
        "if len(left) and any(", "if False and any(", (TESTS, "-k", "rows_that_move_on"),
    ),
    Mutant(
        "maxima of two steps are mixed", "passes/displace.py",
        'if exchange.args[1] != "sum":', "if False:", (TESTS, "-k", "softmax_over_rows"),
    ),
    Mutant(
        "sums of what a maximum scaled are mixed", "passes/displace.py",
        "if x in self.shifted:", "if False:", (TESTS, "-k", "softmax_over_rows"),
    ),
    Mutant(
        "what is kept depends on what shares a message", "passes/localise.py",
        "if isinstance(part, _Part) and kept_apart(src, dst, self.mesh, self.rank) is not None:",
        "if isinstance(part, _Part):", (TESTS, "-k", "shares_a_message"),
    ),
    Mutant(
        "what is computed once is carried as well", "passes/displace.py",
        'if exchange.meta.get("hoisted") or ', "if ", (TESTS, "-k", "same_in_every_step_is_not"),
    ),
    Mutant(
        "the warm-up is a step longer", "fastpar/run/displaced.py",
        "kept.calls >= self.warmup", "kept.calls > self.warmup", (TURNS, "-k", "told_apart"),
    ),
    Mutant(
        "activations are carried outside of a generation", "fastpar/run/displaced.py",
        "if generation is OUTSIDE:", "if False:", (TURNS, "-k", "outside"),
    ),
    Mutant(
        "a sample that was written to is the same one", "fastpar/run/displaced.py",
        "self.version == version(sample)\n", "True\n", (TURNS, "-k", "written_to"),
    ),
    Mutant(
        "a call that fails leaves what was there", "fastpar/run/displaced.py",
        "values, kept.values = kept.values, None ", "values = kept.values ", (TURNS, "-k", "fails"),
    ),
    Mutant(
        "a message is in the way of what is predicted", "fastpar/plan/predict.py",
        "exposed += 0.0 if plan.displaced else part[1]", "exposed += part[1]", (TESTS, "-k", "hidden"),
    ),
    Mutant(
        "the clock knows no warm-up", "fastpar/plan/generation.py",
        "waits if number < warmup else turns", "turns[0] if number < warmup else turns", (TESTS, "-k", "on_the_clock"),
    ),
)
