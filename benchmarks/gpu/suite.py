"""``python -m benchmarks gpu`` (``make gpu``): every part that one GPU can measure, in one JSON and a short table.

Each part is a process of its own with a budget of seconds, so that one that fails, hangs or loses its GPU's context
takes nothing else with it; its rows are kept as they come. Exit status 1 if anything failed: entries that raised, parts
that died or were stopped. What cannot run here (no GPU, a library that is not installed) is skipped with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import MODEL, SIZES
from fastpar.core.record import write


@dataclass(frozen=True)
class Entry:
    """One part: the module that runs it, its seconds, what it shows, and the model if it is not ``part.MODEL``."""

    module: str
    budget: float
    shows: str
    model: str = MODEL


PARTS = {
    "ranks": Entry("benchmarks.gpu.ranks", 155, "rank 0 of 8 on emulated links: plans, passes one by one, peers"),
    "ranks-2048": Entry("benchmarks.gpu.ranks", 75, "the same with 2048 x 2048 pixels", "flux-2048"),
    "step": Entry("benchmarks.gpu.step", 125, "one step on one GPU: eager, Inductor's modes, fastpar"),
    "links": Entry("benchmarks.gpu.links", 25, "emulated collectives against the link model, overlap, own overhead"),
    "kernels": Entry("benchmarks.gpu.kernels", 40, "Triton kernels: equal to their references, against the byte floor"),
    "hoist": Entry("benchmarks.gpu.hoist", 65, "PixArt and Wan, with and without hoist"),
    "tests": Entry("benchmarks.gpu.tests", 55, "pytest's marker gpu"),
}
"""The most telling first, for budgets end."""
GRACE = 8.0
"""Seconds over its budget after which a part is stopped; entries look at the clock only between them."""
LEAVE = 20.0
"""Seconds that a process which has written everything may take to go away."""


def unpacked(wheels: Path | None, into: Path) -> list[str]:
    """Folders for ``PYTHONPATH`` with the pure-Python wheels of a folder, for machines without pip's network."""
    if wheels is None:
        return []
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels {wheels}: there are no .whl files")
    for wheel in found:
        if not wheel.name.endswith("-none-any.whl"):
            raise SystemExit(f"--wheels: {wheel.name} is not pure Python; install it instead")
        zipfile.ZipFile(wheel).extractall(into)
    return [str(into)]


def rows_of(path: Path, ended: str | None) -> list[dict[str, Any]]:
    """What a part wrote; an entry that it began and did not finish failed with ``ended``."""
    rows, begun = [], dict[str, None]()
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a part that was stopped
            continue
        if "begun" in row:
            begun[row["begun"]] = None
        elif "ended" in row:
            continue
        else:
            begun.pop(row["name"], None)
            rows.append(row)
    why = ended or "the part ended without a result"
    rows += [{"name": name, "error": why} for name in begun]
    if ended and not begun:
        rows.append({"name": "(part)", "error": ended})
    return rows


def run_part(name: str, args: argparse.Namespace, paths: list[str], folder: Path) -> dict[str, Any]:
    entry, out = PARTS[name], folder / f"{name}.jsonl"
    budget = args.budget or entry.budget
    command = [sys.executable, "-m", entry.module, "--size", args.size, "--model", entry.model,
               "--budget", str(budget), "--rows", str(out), "--began", str(time.time())]  # fmt: skip
    for match in args.match:
        command += ["--match", match]
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    begin, ended = time.perf_counter(), None
    process = subprocess.Popen(command, env=os.environ | ({"PYTHONPATH": path} if path else {}),
                               start_new_session=True)  # fmt: skip
    try:
        try:
            status = process.wait(budget + GRACE)
        except subprocess.TimeoutExpired:
            if not out.exists() or '"ended"' not in out.read_text():
                raise
            status = process.wait(LEAVE)  # all is written, and the process is about to go
        if status:
            ended = f"the part's process ended with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {time.perf_counter() - begin:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
            process.wait()
    return {"shows": entry.shows, "seconds": round(time.perf_counter() - begin, 1), "rows": rows_of(out, ended)}


def table(results: dict[str, Any]) -> str:
    """A line per row: its name and figures, or why there are none."""
    lines = []
    for part, found in results.items():
        lines.append(f"\n{part}: {found['shows']} ({found['seconds']:.0f} s)")
        for row in found["rows"]:
            told = {k: v for k, v in row.items() if k not in ("name", "error", "skipped", "details")}
            text = "  ".join(f"{k} {_short(v)}" for k, v in told.items())
            text += f"  FAILED: {first(row['error'])}" if "error" in row else ""
            text += f"  skipped: {first(row['skipped'])}" if "skipped" in row else ""
            lines.append(f"  {row['name']:44} {text.strip()}")
    return "\n".join(lines)


def first(text: str, width: int = 150) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no message"
    return line if len(line) <= width else line[: width - 3] + "..."


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="some of the parts")
    parser.add_argument("--size", choices=list(SIZES), default="full", help=f"of the models: {SIZES}")
    parser.add_argument("--budget", type=float, help="seconds of every part, instead of its own")
    parser.add_argument("--match", action="append", default=[], help="only entries whose names have this in them")
    parser.add_argument("--wheels", type=Path, help="a folder of pure-Python wheels (diffusers, peers) to run with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = unpacked(args.wheels, Path(folder) / "wheels")
        sys.path[:0] = paths  # where versions are looked up
        for name in args.only:
            print(f"== {name}: {PARTS[name].shows}", flush=True)
            results[name] = run_part(name, args, paths, Path(folder))
            found = {"device": device(), "peers": versions(), "size": args.size, "parts": results}
            write(args.out, found)  # after each part: nothing is lost
    failed = [(part, row) for part, found in results.items() for row in found["rows"] if "error" in row]
    print(table(results))
    print(f"\n{len(failed)} failed" + (":" if failed else ""))
    for part, row in failed:
        print(f"  {part}, {row['name']}: {first(row['error'])}")
    print(f"written to {args.out}")
    return bool(failed)


def versions() -> dict[str, str | None]:
    """Of the libraries that fastpar is compared with; None where there is none."""
    found: dict[str, str | None] = {}
    for name in ("diffusers", "cache-dit", "para-attn", "xfuser", "yunchang"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device() -> dict[str, Any]:
    """The GPU, its driver's CUDA and memory; without one, that."""
    import torch

    if not torch.cuda.is_available():
        return {"name": None, "why": "torch finds no CUDA device"}
    found = torch.cuda.get_device_properties(0)
    return {"name": found.name, "memory": found.total_memory, "cuda": torch.version.cuda,
            "multiprocessors": found.multi_processor_count, "count": torch.cuda.device_count()}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
