"""What the planner says of models at their real size, on machines that nobody here has: fake tensors, no GPU.

``python -m benchmarks.plans``: every plan for FLUX at 1024 and 4096 pixels, CogVideoX 20 s and Wan 720p on three
topologies, predicted, and those that are near each other scheduled. ``--table`` prints docs/planning.md's table of the
results in --out instead.
Times are predictions with assumed efficiencies, not measurements.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import fastpar
from benchmarks.models import CASES, full_size
from fastpar.core.record import write
from fastpar.run.build import planned

MACHINES = {"h100-8": 8, "l40-8": 8, "a100-4x8": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plans.json"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text())["results"]))
        return
    results = []
    for name in CASES:
        loaded = full_size(name)
        torch._dynamo.reset()
        program = fastpar.capture(loaded.model, loaded.inputs).programs[0].program
        for machine, ranks in MACHINES.items():
            begin = time.perf_counter()
            choice = planned(program, "auto", ranks, machine)[2]
            assert choice is not None
            print(f"{name}: {choice.note}", flush=True)
            rows: list[dict[str, Any]] = []
            for v in choice.verdicts:
                p = v.prediction
                row: dict[str, Any] = {"plan": v.plan, "reason": v.reason}
                if p is not None:
                    row |= {"milliseconds": round(1e3 * p.seconds, 2), "exposed": round(1e3 * p.exposed, 2)}
                    row |= {"gigabytes": round(p.memory / 1e9, 1), "megabytes_sent": round(p.bytes / 1e6, 1)}
                    row |= {"order": list(p.order), "links": p.links}
                rows.append(row)
                print(f"  {v.plan:22}{row.get('milliseconds', '-'):>10}  {v.reason}")
            took = time.perf_counter() - begin
            results.append({"model": name, "topology": machine, "ranks": ranks, "seconds": took, "plans": rows})
    write(args.out, results)


def table(results: list[dict[str, Any]]) -> str:
    """Of every model and machine the plan that was chosen, beside one device and one kind of exchange everywhere."""
    lines = ["| model | machine | chosen | ms | one device | a ring everywhere | gather everywhere |", "|" + "---|" * 7]
    for result in results:
        rows, ranks = {r["plan"]: r for r in result["plans"]}, result["ranks"]
        won = result["plans"][0]
        chosen = f"`{won['plan']}`"
        others = [rows[plan].get("milliseconds") for plan in ("one device", f"ring={ranks}", f"gather={ranks}")]
        cells = [f"{x:,.1f}" if x < 1000 else f"{x:,.0f}" for x in (won["milliseconds"], *others)]
        lines.append(f"| {' | '.join([result['model'], result['topology'], chosen, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
