"""The compiler broken on purpose, one place at a time: ``python -m tests.mutants [--only WORDS]``.

Every mutant is one edit to a copy of the tree; chosen tests then run against the copy. A mutant that
survives is a missing test; one whose text is no longer found must be written anew. Both exit with 1.
The copy is put together as a wheel would have it (``passes`` and ``backends`` inside ``fastpar``) and stands
first on the path, before any editable install; one run without a mutant proves that it is what is imported
and that its tests pass.
"""


from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mutants import compiler, displaced, messages, runtime, sizes, speeds, splits, strided
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
CONTROL = "(none: the copy as it is must survive)"
PAGES = (compiler, displaced, messages, runtime, sizes, speeds, splits, strided)
MUTANTS = tuple(mutant for page in PAGES for mutant in page.MUTANTS)


def copied(folder: Path) -> Path:
    """A copy of what is imported and tested."""
    tree = Path(tempfile.mkdtemp(dir=folder)).resolve()
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "fastpar", tree / "fastpar", ignore=ignore)
    for inside in ("passes", "backends"):
        shutil.copytree(ROOT / inside, tree / "fastpar" / inside, ignore=ignore)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def mutated(mutant: Mutant, tree: Path) -> bool:
    """Make the edit; False where the text is not there exactly once."""
    inside = mutant.file if mutant.file.startswith("fastpar/") else f"fastpar/{mutant.file}"
    text = (tree / inside).read_text()
    (tree / inside).write_text(text.replace(mutant.old, mutant.new))
    return text.count(mutant.old) == 1


@dataclass
class Run:
    """pytest in a child that imports this package and its tests from ``tree``.

    A fork, because torch is imported already and takes longer than most of the tests.
    """

    tree: Path
    tests: tuple[str, ...]
    process: Any = None

    def start(self) -> Run:
        self.process = multiprocessing.get_context("fork").Process(target=self._child)
        self.process.start()
        return self

    def _child(self) -> None:
        code = 99
        with (self.tree / "log.txt").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            os.chdir(self.tree)
            for name in [n for n in sys.modules if n.split(".")[0] in ("fastpar", "tests")]:
                del sys.modules[name]
            sys.path[:] = [str(self.tree), *(p for p in sys.path if Path(p).resolve() != ROOT)]
            self._imports_the_copy()
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-profile=mutants"]
            code = int(pytest.main([*options, *self.tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)  # at once: what the parent would do at its end is not for the child to do

    def _imports_the_copy(self) -> None:
        for name in ("fastpar", "fastpar.passes", "fastpar.backends", "tests"):
            found = importlib.util.find_spec(name)
            places = list(found.submodule_search_locations or ()) if found is not None else []
            if not places or not all(Path(p).is_relative_to(self.tree) for p in places):
                print(f"{name} would be imported from {places}")
                os._exit(98)

    def finish(self, seconds: float = 300) -> tuple[int | None, str]:
        """(exit code, output); the code is None where it took too long."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        output = (self.tree / "log.txt").read_text(errors="replace")
        shutil.rmtree(self.tree)
        return code, output


def verdict(code: int | None, output: str) -> tuple[str, str]:
    """(what became of a mutant, what killed it or why it was not)."""
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    if code == 1 and failed:
        return "killed", failed[0].removeprefix("FAILED ")
    if code is None:
        return "killed", "a test hangs"
    if code == 0:
        return "SURVIVED", output.splitlines()[-1]
    return "NOT RUN", output[-400:]  # no Python any more, or no test of that name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name contains this, and no control")
    parser.add_argument("-j", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.name]
    begin, bad = time.perf_counter(), 0
    sys.dont_write_bytecode = True
    os.environ.update(CI="1", OMP_NUM_THREADS="1")
    for name in ("torch", "torch.fx.experimental.proxy_tensor", "pytest", "hypothesis", "numpy"):
        importlib.import_module(name)  # once, for all children
    with tempfile.TemporaryDirectory() as name:
        waiting: deque[tuple[str, Run | None]] = deque()

        def ended() -> int:
            what, run = waiting.popleft()
            outcome, detail = (
                verdict(*run.finish()) if run is not None else ("NOT FOUND", "its text is not in the file")
            )
            print(f"{outcome:<9}  {what:<56}  {detail if outcome == 'NOT RUN' else detail[:100]}", flush=True)
            return outcome != ("SURVIVED" if what == CONTROL else "killed")

        if not options.only:
            waiting.append((CONTROL, Run(copied(Path(name)), (compiler.LAYOUT, compiler.CASES)).start()))
        for mutant in chosen:
            if len(waiting) >= options.j:
                bad += ended()
            tree = copied(Path(name))
            waiting.append((mutant.name, Run(tree, mutant.tests).start() if mutated(mutant, tree) else None))
        while waiting:
            bad += ended()
    print(
        f"{len(chosen)} mutants in {time.perf_counter() - begin:.0f} s, "
        + (f"{bad} not as it should be" if bad else "all killed")
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
