"""Mutants of ranks that do not run the model at the same time."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TESTS = "tests/test_strided.py"

MUTANTS = (
    Mutant(
        "ranks meet in every step", "fastpar/run/meeting.py",
        "if step % stride == 0)", "if True)", (TESTS, "-k", "as_by_hand or who_meets"),
    ),
    Mutant(
        "of those who are not there nothing is kept", "fastpar/run/steps.py",
        "*(self.came or nothing)]", "*nothing]", (TESTS, "-k", "as_by_hand"),
    ),
    Mutant(
        "norms are corrected by the wrong change", "passes/stride.py",
        "before = self._own(value, self._term(value)), self._own(value, old)",
        "before = self._own(value, self._term(value)), self._own(value, self._term(value))",
        (TESTS, "-k", "as_by_hand and corrected"),
    ),
    Mutant(
        "a sum's own term is that of the last call", "passes/stride.py",
        "rows = [row if old is None else self._stacked(old)",
        "rows = [row if old is not None else self._stacked(old or row.args[0])", (TESTS, "-k", "as_by_hand"),
    ),
    Mutant(
        "rows may move on", "passes/stride.py",
        "elif any(hands_over(src, dst, mesh, rank)", "elif False and any(hands_over(src, dst, mesh, rank)",
        (TESTS, "-k", "rows_move_on"),
    ),
    Mutant(
        "rows are cut as for ranks that keep step", "passes/shard.py",
        "options = [o for o in options if not _hands_rows_on(o[2].graph, mesh)] or options", "pass",
        (TESTS, "-k", "none_has_to"),
    ),
    Mutant(
        "messages are waited for in front", "fastpar/run/meeting.py",
        "if all(there) and not wait:", "if False:", (TESTS, "-k", "waited_for_where"),
    ),
    Mutant(
        "latents are put together in the middle of a cycle", "fastpar/run/steps.py",
        "turns > 0 and turns % cycle(self.strides) == 0", "turns > 0", (TESTS, "-k", "as_by_hand"),
    ),
    Mutant(
        "a run may end with other latents on every rank", "fastpar/run/stream.py",
        "if kind is None and self._apart and", "if False and",
        (TESTS, "-k", "without_putting"),
    ),
    Mutant(
        "a step between has what the caller wrote into", "fastpar/run/strided.py",
        "return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]", "return list(values)",
        (TESTS, "-k", "callers"),
    ),
    Mutant(
        "a rank's work is not the mean over its steps", "fastpar/graph/count.py",
        "return [total // mesh.stride(rank) for", "return [total for", (TESTS, "-k", "means_over_a_cycle"),
    ),
    Mutant(
        "ranks send to those who are not there", "fastpar/graph/count.py",
        "itemsize * elements / mesh.meets(rank, peer)", "itemsize * elements / mesh.stride(rank)",
        (TESTS, "-k", "means_over_a_cycle"),
    ),
    Mutant(
        "predictions know no strides", "fastpar/plan/predict.py",
        "topology.speed(rank) * mesh.stride(rank)) for", "topology.speed(rank)) for", (TESTS, "-k", "slow_device"),
    ),
)
