"""Mutants of what runs a program: captured graphs, compiled code on disk, the choice of a plan."""

from __future__ import annotations

from tests.mutants.mutant import Mutant


def graphs(words: str) -> tuple[str, ...]:
    return ("tests/test_cudagraph.py", "-k", words)


MUTANTS = (
    Mutant(
        "cudagraph: results stay in the graph's memory", "backends/cudagraph/captured.py",
        "return result.clone() if isinstance(result, torch.Tensor) else result", "return result", graphs("may_be_kept"),
    ),
    Mutant(
        "cudagraph: what the user passes is read where it was", "backends/cudagraph/captured.py",
        "            _once(own).copy_(_once(args[i]))", "            pass", graphs("may_be_kept"),
    ),
    Mutant(
        "cudagraph: a weight that moved is read where it was", "backends/cudagraph/captured.py",
        "return bool(moved)", "return False", graphs("weight_that_moves"),
    ),
    Mutant(
        "cudagraph: the call that captures runs before it as well", "backends/cudagraph/captured.py",
        "        try:\n            self.replay, self.results",
        "        self.device.aside(lambda: self.run(list(static)), [])\n"
        "        try:\n            self.replay, self.results",
        graphs("may_be_kept"),
    ),
    Mutant(
        "cudagraph: state is taken for the same whatever comes", "backends/cudagraph/captured.py",
        "if i in self.seen and self.seen[i]() is args[i]:", "if i in self.seen:", graphs("state"),
    ),
    Mutant(
        "cudagraph: process groups end before graphs do", "fastpar/run/capturing.py",
        "        release(talking=True)\n        return inner(*args, **kwargs)",
        "        inner(*args, **kwargs)\n        return release(talking=True)", graphs("before_process_groups"),
    ),
    Mutant(
        "cudagraph: steps that queue up share one limit", "backends/cudagraph/cuda.py",
        "                    self._line.popleft()\n                    self._since = time.monotonic()",
        "                    self._line.popleft()", graphs("queue_up"),
    ),
    Mutant(
        "cache: the key leaves out what a program was made from", "backends/cache.py",
        "hashlib.sha256(program.origin.encode())", "hashlib.sha256()", ("tests/test_cache.py", "-k", "key_sees"),
    ),
    Mutant(
        "auto: a schedule that is slower overturns the prediction", "fastpar/plan/planner.py",
        "if best == was or seconds[best] >=", "if best == was or seconds[best] <=",
        ("tests/test_planner.py", "-k", "schedule_does"),
    ),
)  # fmt: skip
