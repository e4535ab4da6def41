"""``python -m tests.mutants``: planted bugs, each of which some test must catch.

Every mutant is one edit in a copy of the tree; the tests that should notice run on the copy.
A mutant that survives, or whose text is no longer found, fails the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One planted bug: ``old`` becomes ``new`` in ``file``; ``tests`` (pytest arguments) must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LAYOUT, RING, SPATIAL = "tests/test_layout.py", "tests/test_ring.py", "tests/test_spatial.py"

MUTANTS = (
    Mutant("the remainder goes to the last ranks", "fastpar/core/layout.py",
           "(i < units % n)", "(i >= n - units % n)", (LAYOUT, "-k", "examples")),
    Mutant("a segment's rows lose their offset", "fastpar/core/layout.py",
           "np.arange(offset + start, offset + start + length", "np.arange(start, start + length",
           (LAYOUT, "-k", "redistribute or rows")),
    Mutant("a part off by one in a slice", "fastpar/core/regroup.py",
           "max(0, -(-(low - start) // step))", "max(0, (low - start) // step)", (LAYOUT, "-k", "slices")),
    Mutant("received boxes in another order", "fastpar/ops/collectives.py",
           "[n for p in peers for n in self.receive_boxes_from(p)]",
           "[n for p in reversed(peers) for n in self.receive_boxes_from(p)]", (LAYOUT, "-k", "exchange")),
    Mutant("taken from the farthest replica's rows", "fastpar/core/transfer.py",
           "src_row + row - bounds[i]", "src_row", (LAYOUT, "-k", "exchange")),
    Mutant("a contracted factor leaves no partial value", "fastpar/rules/matmul.py",
           '(("b", "m", "n"),), reduced={"k": "sum"})', '(("b", "m", "n"),))', (RING, "-k", "grouped")),
    Mutant("rows and columns of a product swapped", "fastpar/rules/matmul.py",
           '(bias, ("m", "k"), ("k", "n")), (("m", "n"),)', '(bias, ("m", "k"), ("k", "n")), (("n", "m"),)',
           (RING, "-k", "grouped")),
    Mutant("a mean divided by half the rows", "fastpar/sharding/expand.py",
           "1.0 / count)", "2.0 / count)", (SPATIAL, "-k", "causal and ulysses")),
    Mutant("the all-reduce is left out", "passes/lower.py",
           "x = emit(all_reduce,", "emit(all_reduce,", (SPATIAL, "-k", "causal and ulysses")),
    Mutant("a causal row does not see itself", "fastpar/sharding/expand.py",
           "mask = index >= torch.arange", "mask = index > torch.arange", (SPATIAL, "-k", "causal and ulysses")),
    Mutant("a halo one row short", "fastpar/rules/spatial.py",
           "(n - 1) * stride + reach if n", "(n - 1) * stride + reach - 1 if n", (SPATIAL, "-k", "conv")),
    Mutant("padding on every rank", "fastpar/rules/spatial.py",
           "(before if at == 0 else 0)", "before", (SPATIAL, "-k", "conv")),
    Mutant("the mask's rows do not follow the queries", "fastpar/rules/attention.py",
           "dims.append(dim if dim is not None and dim.size == size > 1 else Dim.whole(size))",
           "dims.append(Dim.whole(size))", (RING, "-k", "masks_travel and batch_rows")),
    Mutant("the mask's columns stay those of the first step", "passes/attention_ring.py",
           "rotated(self.keys, step, self.mesh)", "rotated(self.keys, 0, self.mesh)",
           (RING, "-k", "masks_travel and keys")),
    Mutant("a ring passes on to the wrong rank", "passes/attention_ring.py",
           "(c - steps) % n", "(c - 2 * steps) % n", (RING, "-k", "grouped")),
    Mutant("one block attended twice", "passes/attention_ring.py",
           "blocks = following", "blocks = following if step else blocks", (RING, "-k", "grouped")),
    Mutant("a block without keys has a logsumexp of 0", "fastpar/ops/ring.py",
           "lse = lse.masked_fill(blind, -math.inf)", "lse = lse.masked_fill(blind, 0.0)", (RING, "-k", "merged")),
    Mutant("grouped heads cut through a group", "fastpar/rules/attention.py",
           "group, seg = dim.size // size, atom.segs[0]", "group, seg = 1, atom.segs[0]", (RING, "-k", "grouped")),
    Mutant("every rank uses rank 0's sizes", "fastpar/rules/views.py",
           "list(outs[0].local_shape(mesh, rank)), torch", "list(outs[0].local_shape(mesh, 0)), torch",
           (RING, "-k", "grouped")),
    Mutant("the other branch's half of the batch", "fastpar/core/transfer.py",
           "min(owners[i], key=lambda o: (own - o[0]) % count)", "owners[i][0]", (LAYOUT, "-k", "volume or exchange")),
)  # fmt: skip


def run(mutant: Mutant, folder: Path) -> tuple[str, float]:
    """(what became of it, seconds) on a copy of the tree in ``folder``."""
    target = folder / mutant.file
    text = target.read_text()
    if text.count(mutant.old) != 1:
        return f"text found {text.count(mutant.old)} times", 0.0
    target.write_text(text.replace(mutant.old, mutant.new))
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *mutant.tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CI": "true"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        verdict = {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"pytest ended with {done.returncode}")
    except subprocess.TimeoutExpired:
        verdict = "killed"  # a hang is noticed too
    target.write_text(text)
    return verdict, time.perf_counter() - begin


def copy(folder: Path) -> None:
    """The tree, with links that make ``fastpar.passes`` and ``fastpar.backends`` the copy's own."""
    for name in ("fastpar", "passes", "backends", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("passes", "backends"):
        (folder / "fastpar" / name).symlink_to(folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="mutants whose name contains this")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or args.only in m.name]
    table = Table("mutant", "file", "verdict", "seconds")
    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy(folder)
        for mutant in chosen:
            verdict, seconds = run(mutant, folder)
            bad += verdict != "killed"
            table.add_row(mutant.name, mutant.file, verdict, f"{seconds:.0f}")
            print(f"{verdict}: {mutant.name}", flush=True)
    Console().print(table)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants killed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
