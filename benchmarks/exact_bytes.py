"""What lowered programs of models at their real size send, held against the closed forms: no GPU, nothing is run.

``python -m benchmarks.exact_bytes``: one row per model and plan. Bytes that leave the busiest rank, numbers of
collectives, and bytes that leave the busiest machine for others, each counted in the program's layouts and by
``fastpar/plan/cost.py``. Axes stand in a plan's own order. Machines have eight ranks under plans of 32, else two.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastpar
from benchmarks.models import full_size
from fastpar.core.plan import Plan
from fastpar.core.record import write
from fastpar.graph.count import bytes_crossing, bytes_per_rank, collectives
from fastpar.plan.expand import pipeline_text
from fastpar.plan.formula import dealt_bytes, volume
from fastpar.run.build import build

MODELS = ("FLUX.1 1024 px", "CogVideoX-5B 20 s", "Wan2.1-14B 720p")
PLANS = ("ulysses=8", "ring=8", "gather=8", "tp=8", "ulysses=4,ring=2", "torus=4,ulysses=2", "torus=4,ring=2",
         "cfg=2,ulysses=4", "ulysses=5", "ulysses=7", "ring=7", "gather=5", "torus=4,ulysses=8", "torus=4,ring=8",
         "ulysses=8,ring=4", "ulysses=32", "ring=32")  # fmt: skip
"""5, 7 and 32 do not divide the heads of all models, and 7 not their tokens."""
GUIDED = "cfg=2,ulysses=4"
"""Once more with the other way to run guidance: as a batch of 2, or as calls of their own."""
ALLOWED = 1.05


def row(name: str, captured: fastpar.Captured, batch: int, plan: str) -> dict[str, Any]:
    """One plan: counted, by the form, and the ratios. Of dealt calls the mean over calls, as in ``explain``."""
    begin = time.perf_counter()
    (recorded,) = captured.programs
    written = pipeline_text(Plan.parse(plan), schedule=False)  # messages of one place are not joined yet
    built = build(recorded.program, plan, passes=written, verify_structure=False)  # structure is what tests check
    mesh, form = built.mesh, volume(built.lowered, built.plan, built.mesh)
    deal = mesh.size((built.dealt,)) if built.dealt else 1
    span = 8 if mesh.ranks > 8 else 2
    results = dealt_bytes(built.captured, deal) // deal if built.dealt else 0  # sent by the runtime
    number = sum(c.count for c in collectives(built.lowered)) + len(built.captured.outputs) * bool(built.dealt)
    sent = max(bytes_per_rank(built.lowered)) // deal + results
    left = max(bytes_crossing(built.lowered, span)) // deal
    left += min(span, mesh.ranks // deal) * results if built.dealt and mesh.names[0] == built.dealt else 0
    expected = form.crossing(mesh, span)
    return {
        "model": name,
        "batch": batch,
        "plan": plan,
        "mesh": str(mesh),
        "bytes": sent,
        "bytes_formula": form.bytes,
        "ratio": round(sent / max(1, form.bytes), 5),
        "collectives": number,
        "collectives_formula": form.collectives,
        "ranks_of_a_machine": span,
        "bytes_between_machines": left,
        "bytes_between_machines_formula": expected,
        "ratio_between_machines": round(left / max(1, expected), 5) if left or expected else 1.0,
        "symbols": form.values,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def rows(name: str, plans: tuple[str, ...] = PLANS) -> list[dict[str, Any]]:
    """All plans of one model; captured once for each way to run guidance."""
    out = []
    for other in (False, True):
        chosen = [GUIDED] if other and GUIDED in plans else [] if other else plans
        if not chosen:
            continue
        loaded = full_size(name)
        assert isinstance(loaded.inputs, dict)
        usual = int(loaded.inputs["hidden_states"].shape[0])
        batch = 3 - usual if other else usual
        if other:
            loaded = full_size(name, batch)
        torch._dynamo.reset()
        captured = fastpar.capture(loaded.model, loaded.inputs)
        for plan in chosen:
            out.append(row(name, captured, batch, plan))
            show(out[-1])
    return out


def wrong(found: dict[str, Any]) -> list[str]:
    """What a row breaks, in words."""
    out = []
    for key in ("ratio", "ratio_between_machines"):
        if not 1 / ALLOWED <= found[key] <= ALLOWED:
            out.append(f"{key} {found[key]}")
    if found["collectives"] != found["collectives_formula"]:
        out.append(f"{found['collectives']} collectives, not {found['collectives_formula']}")
    return out


def show(r: dict[str, Any]) -> None:
    said = "; ".join(wrong(r)) or "ok"
    print(
        f"{r['model']:18} {r['batch']} {r['plan']:20}{r['bytes'] / 1e6:>12.1f} MB{r['ratio']:>9.4f}"
        f"{r['collectives']:>6}{r['collectives_formula']:>6}"
        f"{r['bytes_between_machines'] / 1e6:>12.1f} MB{r['ratio_between_machines']:>9.4f}"
        f"{r['seconds']:>7.1f} s  {said}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeated for more; default all")
    parser.add_argument("--plan", action="append", help="repeated for more; default all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = [r for name in args.model or MODELS for r in rows(name, tuple(args.plan or PLANS))]
    if args.out:
        write(args.out, results)
    return int(any(map(wrong, results)))


if __name__ == "__main__":
    sys.exit(main())
