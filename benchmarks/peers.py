"""fastpar beside other libraries, and beside one process, on CPUs: the same weights, inputs and ranks, in turns.

``python -m benchmarks.peers --ranks 2``: each rank is a process with one thread, and gloo between them. Bytes are those
that really went over the loopback device in a call, so nobody's bookkeeping is believed. Other libraries are called as
their own documentation does (``benchmarks/gpu/peers.py``); those that are missing or fail are listed with the error.
Links of a machine's own memory show nothing about a cluster's: what a call computes, sends and starts is compared here.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.models import MODELS, Made, make
from benchmarks.gpu.part import Unavailable
from benchmarks.gpu.peers import PEERS, arrived
from benchmarks.gpu.timing import conversions
from fastpar.graph.capture import raise_recompile_limits
from fastpar.run.launch import joined, launch
from fastpar.run.stream import generation

WARM = 3
RESULTS, PAGE = Path("benchmarks/results/peers.json"), Path("docs/peers.md")
BEGIN, END = "<!-- table -->\n", "<!-- end -->"


def _ours(model: Any, ranks: int, plan: str, lowering: str) -> Callable[..., Any]:
    options = {"plan": plan.format(ranks), "lowering": lowering}
    call, steps = torch.compile(model, backend="fastpar", options=options), generation(streams=1)

    def run(**inputs: Any) -> Any:
        with steps:  # calls are steps of one sampling run
            return call(**inputs)

    return run


ONE: dict[str, Callable[[Any, int], Any]] = {
    "one process": lambda model, _: model,
    "one process, compiled": lambda model, _: torch.compile(model, dynamic=False),
}
"""What rank 0 does alone while the others wait; the first is what is true."""
OURS = {
    f"fastpar {plan.format('N')}{', compiled' * (lowering == 'inductor')}": partial(_ours, plan=plan, lowering=lowering)
    for lowering in ("eager", "inductor")
    for plan in ("ulysses={}", "gather={}", "ring={}")
}
THEIRS = {name: build for name, build in PEERS.items() if "CUDA" not in name}
APART = ("cache-dit", "ParaAttention")
"""They change diffusers where they are imported, so each has processes of its own."""
ENTRIES = {**ONE, **OURS, **THEIRS}


@dataclass(frozen=True)
class Job:
    """What takes turns: ``entries``, with the first of ``ONE`` before them."""

    model: str
    size: str
    ranks: int
    rounds: int
    entries: tuple[str, ...]


@dataclass
class Entry:
    """One way to run the model; ``error`` where it does not."""

    name: str
    alone: bool
    call: Callable[[], torch.Tensor] | None = None
    error: str | None = None
    off: float = 0.0
    bytes: int = 0
    started: int = 0
    recompiled: int = 0
    seconds: list[float] = field(default_factory=list)

    def row(self, first: Entry, ranks: int) -> dict[str, Any]:
        if self.error is not None:
            return {"name": self.name, "error": self.error}
        return {
            "name": self.name,
            "processes": 1 if self.alone else ranks,
            "ms": 1e3 * statistics.median(self.seconds),
            "least": 1e3 * min(self.seconds),
            "most": 1e3 * max(self.seconds),
            "speedup": statistics.median(a / b for a, b in zip(first.seconds, self.seconds, strict=True)),
            "kilobytes": self.bytes / ranks / 1e3,
            "collectives": self.started,
            "relative error": self.off,
            **({"recompiled": self.recompiled} if self.recompiled else {}),
        }


def work(job: Job) -> list[dict[str, Any]] | None:
    """All entries, as one rank; rank 0 returns a row for each."""
    torch.set_num_threads(1)
    raise_recompile_limits()  # all are compiled from the same code
    torch.accelerator.device_count = lambda: 1  # diffusers and cache-dit divide by it; the device is the CPU
    warnings.simplefilter("ignore")
    with joined() as device, torch.no_grad():
        made = make(job.model, job.size, device)
        (whole,) = made.model(**made.inputs)
        entries = [_prepared(name, made, whole, job.ranks) for name in (next(iter(ONE)), *job.entries)]
        running = [entry for entry in entries if entry.call is not None]
        gc.collect()
        broken = _broken(running[0])
        if broken is not None:
            for entry in entries:
                entry.error = entry.error or f"the same model without it does not run any more: {broken}"
            running = []
        for entry in running:
            _count(entry)
        for _ in range(job.rounds):
            for entry in running:
                entry.seconds.append(_turn(entry))
        return [entry.row(entries[0], job.ranks) for entry in entries] if dist.get_rank() == 0 else None


def _broken(first: Entry) -> str | None:
    """What the reference raises once all others are there, on all ranks."""
    said: list[str | None] = [None]
    assert first.call is not None
    try:
        first.call()
    except Exception as error:  # whatever a library's patches lead to
        said[0] = f"{type(error).__name__}: {error}"[:300]
    dist.broadcast_object_list(said)
    return said[0]


def _prepared(name: str, made: Made, whole: torch.Tensor, ranks: int) -> Entry:
    """Compiled and called, with its error if it has one on any rank: then no rank calls it again."""
    entry = Entry(name, name in ONE)
    said = None
    if not entry.alone or dist.get_rank() == 0:
        try:
            model = ENTRIES[name](made.shared(), ranks)
            call = partial(_output, model, made.inputs)
            for _ in range(WARM):
                out = call()
            if out.shape != whole.shape:
                raise ValueError(f"gives {tuple(out.shape)} instead of {tuple(whole.shape)}: not the whole output")
            entry.off = float((out - whole).abs().max() / whole.abs().max())
            entry.call = call
        except Exception as error:  # whatever a library raises is its result
            said = f"{'skipped' if isinstance(error, Unavailable) else type(error).__name__}: {error}"[:400]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (said, entry.off))
    entry.error = next((text for text, _ in every if text), None)
    entry.off = max(off for _, off in every)
    if entry.error is not None:
        entry.call = None
    elif entry.call is None:
        entry.call = lambda: whole  # another rank's turn
    return entry


def _output(model: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor:
    return arrived(model(**inputs)[0])


def _turn(entry: Entry) -> float:
    """Seconds of the rank that took longest."""
    assert entry.call is not None
    dist.barrier()
    before, begin = conversions(), time.perf_counter()
    entry.call()
    took = torch.tensor(time.perf_counter() - begin)
    entry.recompiled += conversions() - before
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _count(entry: Entry) -> None:
    """Bytes that all ranks together send in a call, and exchanges that one rank starts."""
    assert entry.call is not None
    dist.barrier()
    before = _loopback()
    dist.barrier()
    idle = _loopback() - before  # what meeting costs
    dist.barrier()
    before = _loopback()
    entry.call()
    dist.barrier()
    entry.bytes = 0 if entry.alone else max(_loopback() - before - idle, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        entry.call()
    entry.started = sum(event.name.startswith("gloo:") for event in found.events())


def _loopback() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    raise RuntimeError("no loopback device in /proc/net/dev: this benchmark needs Linux")


def together(match: list[str]) -> list[tuple[str, ...]]:
    """Names of entries that take turns with one another: all that leave each other as they are."""
    names = [name for name in list(ENTRIES)[1:] if not match or any(text in name for text in match)]
    groups = [[n for n in names if not n.startswith(APART)], *([n for n in names if n.startswith(a)] for a in APART)]
    return [tuple(group) for group in groups if group]


def table(model: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"{model:34}{'ms':>9}{'least':>9}{'speedup':>9}{'kB sent':>11}{'colls':>7}{'error':>10}"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['name']:34}  {row['error'].splitlines()[0][:100]}")
            continue
        lines.append(
            f"{row['name']:34}{row['ms']:9.1f}{row['least']:9.1f}{row['speedup']:9.2f}{row['kilobytes']:11.1f}"
            f"{row['collectives']:7}{row['relative error']:10.1e}"
            + (f"  compiled again {row['recompiled']} times meanwhile" if "recompiled" in row else "")
        )
    return "\n".join(lines)


def page(models: list[dict[str, Any]]) -> None:
    """Put what ran between the page's marks as a table, and below it why the rest did not."""
    lines = ["| model | | ms | least | times one process | MB that leave a rank | exchanges |", "|" + "---|" * 7]
    failed: dict[str, list[str]] = {}
    for model, row in ((found["model"], row) for found in models for row in found["rows"]):
        if "error" in row:
            library = row["name"].partition(",")[0]
            failed.setdefault(f"{library}: {row['error'].splitlines()[0]}", []).append(model)
            continue
        sent = f"{row['kilobytes'] / 1e3:.2f}" if row["processes"] > 1 else ""
        cells = (model, row["name"], f"{row['ms']:.0f}", f"{row['least']:.0f}", f"{row['speedup']:.2f}", sent,
                 str(row["collectives"] or ""))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Did not run:", ""]
    lines += [f"- {what} ({', '.join(dict.fromkeys(where))})" for what, where in failed.items()]
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["flux", "wan", "pixart"], choices=list(MODELS))
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--match", nargs="+", default=[], help="entries whose names have one of these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help=f"only write the table of {RESULTS} into {PAGE}")
    args = parser.parse_args()
    if args.page:
        page(json.loads(RESULTS.read_text())["results"]["models"])
        return 0
    found = []
    for model in args.models:
        rows = []
        for names in together(args.match):
            rows += launch(work, Job(model, args.size, args.ranks, args.rounds, names), args.ranks)[bool(rows) :]
        print(table(model, rows), flush=True)
        found.append({"model": model, "size": args.size, "ranks": args.ranks, "rows": rows})
    if args.out:
        from fastpar.core.record import write

        write(args.out, {"libraries": _versions(), "models": found})
    return 0


def _versions() -> dict[str, str | None]:
    """Of the libraries that are no dependency of ours; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in ("cache-dit", "para-attn", "yunchang"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
