"""Workloads of the published rows' models: ``python -m benchmarks.published.workloads`` writes ``workloads.json``.

Every block of a stack is the same, so a model is captured with one and with two blocks of each stack, and what the
second one adds is counted as often as the published depth asks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.published import decoders
from benchmarks.published.models import MODELS, UNSAID, Size, all_valid, build
from benchmarks.published.split import read
from fastpar.plan.workload import Attention, Workload, workload

FILE = Path(__file__).with_name("workloads.json")
_ROW = ("flops", "activations", "weights", "carries", "attends")
_TOTALS = ("launches", "outputs", "parameters", "peak", "pointwise", "whole", "cut")


def key(row: Mapping[str, str]) -> str:
    """Which workload a published row runs: model, width x height x frames, tokens of text, batch of one call."""
    model = MODELS.get(row["model"])
    batch = int(row["calls"]) if model is not None and model.batched else 1
    return f"{row['model']} {row['width']}x{row['height']}x{row['frames']} {_text(row)} {batch}"


def _text(row: Mapping[str, str]) -> int:
    return int(row["text"] or (MODELS[row["model"]].text if row["model"] in MODELS else UNSAID))


def load(path: Path = FILE) -> tuple[dict[str, Workload], dict[str, Workload]]:
    """(denoisers by ``key``, decoders by ``decoders.keys``)."""
    data = json.loads(path.read_text())
    return tuple({k: _thawed(v) for k, v in data[part].items()} for part in ("denoisers", "decoders"))  # type: ignore


def capture(name: str, size: Size, batch: int) -> dict[str, Any]:
    """The workload of the model at its published depth, as it is stored."""
    depth = MODELS[name].depth
    first = _captured(name, size, batch, {stack: step for stack, (_, step) in depth.items()})
    parts = [(1, first)]
    for stack, (full, step) in depth.items():
        blocks = {other: s for other, (_, s) in depth.items()}
        more = _captured(name, size, batch, blocks | {stack: 2 * step})
        times = (full - step) // step
        parts += [(times, more), (-times, first)]
    return combined(parts)


def combined(parts: Iterable[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Stored workloads added up, each so many times. ``rows``, ``batch`` and the peak are the first one's."""
    parts = list(parts)
    out: dict[str, Any] = {k: parts[0][1][k] for k in ("rows", "batch", "peak")}
    for name in _TOTALS:
        if name != "peak":
            out[name] = sum(times * part.get(name, 0) for times, part in parts)
    for name in ("kinds", "attentions", "sums"):
        total: Counter[tuple[Any, ...]] = Counter()
        for times, part in parts:
            for *what, count in part.get(name, ()):
                total[tuple(what)] += times * count
        out[name] = sorted([*what, count] for what, count in total.items() if count)
        assert all(count > 0 for *_, count in out[name]), "blocks of one stack differ"
    return out


def frozen(work: Workload) -> dict[str, Any]:
    """As it is stored: operators and attentions as lists that end with their count."""
    kinds: Counter[tuple[Any, ...]] = Counter()
    for *what, count in zip(*(getattr(work, name).tolist() for name in _ROW), work.counts.tolist(), strict=True):
        kinds[tuple(int(x) for x in what)] += int(count)
    attentions: Counter[tuple[Any, ...]] = Counter()
    for a in work.attentions:
        attentions[(a.batch, a.heads, a.key_heads, a.queries, a.keys, a.width, a.itemsize, int(a.split))] += a.count
    return {
        "launches": work.launches, "outputs": work.outputs, "parameters": work.parameters, "peak": work.peak,
        "rows": work.rows, "batch": work.batch, "pointwise": int(work.pointwise[0]), "whole": int(work.pointwise[1]),
        "cut": int(work.cut),
        "kinds": sorted([*k, n] for k, n in kinds.items()),
        "attentions": sorted([*k, n] for k, n in attentions.items()),
        "sums": sorted([size, n] for size, n in work.sums),
    }  # fmt: skip


def _thawed(data: Mapping[str, Any]) -> Workload:
    flops, activations, weights, carries, attends, counts = zip(*data["kinds"], strict=True)
    return Workload(
        attentions=tuple(Attention(*a[:7], split=bool(a[7]), count=a[8]) for a in data["attentions"]),
        flops=np.array(flops, dtype=np.float64),
        activations=np.array(activations, dtype=np.float64),
        weights=np.array(weights, dtype=np.float64),
        carries=np.array(carries, dtype=bool),
        launches=data["launches"],
        outputs=data["outputs"],
        parameters=data["parameters"],
        peak=data["peak"],
        rows=data["rows"],
        batch=data["batch"],
        counts=np.array(counts, dtype=np.float64),
        attends=np.array(attends, dtype=bool),
        pointwise=(float(data["pointwise"]), float(data["whole"])),
        sums=tuple((size, n) for size, n in data.get("sums", ())),
        cut=float(data.get("cut", 0)),
    )


def _captured(name: str, size: Size, batch: int, blocks: dict[str, int]) -> dict[str, Any]:
    import torch

    import fastpar

    torch._dynamo.reset()
    model, inputs = build(name, size, batch, blocks)
    with all_valid(name):
        programs = fastpar.capture(model, inputs).programs
    works = [frozen(workload(p.program)) for p in programs]
    works.sort(key=lambda w: -w["peak"])
    return combined((1, w) for w in works)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name holds this; the others stay as they are")
    parser.add_argument("--new", action="store_true", help="only what the file does not have yet")
    args = parser.parse_args()
    data = json.loads(FILE.read_text()) if FILE.exists() else {"denoisers": {}, "decoders": {}}
    from benchmarks.published import ratios

    rows = [r for r in (*read(), *ratios.rows()) if args.only in r["model"]]
    for name, row in sorted({key(r): r for r in rows if r["model"] in MODELS}.items()):
        if args.new and name in data["denoisers"]:
            continue
        begin = time.perf_counter()
        width, height, frames = (int(row[k]) for k in ("width", "height", "frames"))
        size = Size(width, height, frames, _text(row))
        try:
            data["denoisers"][name] = made = capture(row["model"], size, int(name.split()[-1]))
        except Exception as error:  # the others are still worth having; the row says that it has no workload
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        flops = sum(k[0] * k[-1] for k in made["kinds"])
        print(f"{name}: {flops / 1e12:.1f} TFLOP, {made['launches']} launches, batch {made['batch']}, "
              f"{made['parameters'] / 2e9:.1f}B, {time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        _store(data)
    for name, row in sorted({k: r for r in rows if decoders.name(r) for k in decoders.keys(r)}.items()):
        if (args.new or args.only) and name in data["decoders"]:
            continue
        begin = time.perf_counter()
        data["decoders"][name] = made = decoders.capture(row, name.endswith("encoder"))
        flops = sum(k[0] * k[-1] for k in made["kinds"])
        print(f"{name}: {flops / 1e12:.1f} TFLOP, {time.perf_counter() - begin:.0f} s", flush=True)
        _store(data)


def _store(data: dict[str, Any]) -> None:
    """One line per workload: the file is read by programs, and compared line by line."""
    parts = []
    for part, works in data.items():
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in sorted(works.items()))
        parts.append(f"{json.dumps(part)}: {{\n{lines}\n}}")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
