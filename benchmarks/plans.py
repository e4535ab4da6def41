"""What the planner says of models at their real size, on machines that nobody here has: fake tensors, no GPU.

``python -m benchmarks.plans``: every plan for FLUX at 1024 and 4096 pixels on three topologies, predicted.
Times are predictions with assumed efficiencies, not measurements.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import fastpar
from benchmarks.real_size import flux
from benchmarks.record import write
from fastpar.plan.planner import choose
from fastpar.plan.topology import load
from fastpar.plan.workload import workload

MODELS = {"FLUX.1 1024 px": (4096, 512), "FLUX.1 4096 px": (65536, 512)}
MACHINES = {"h100-8": 8, "l40-8": 8, "a100-4x8": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plans.json"))
    args = parser.parse_args()
    results = []
    for name, (image, text) in MODELS.items():
        model, inputs = flux(None, None, image, text)
        work = workload(fastpar.capture(model, inputs).programs[0].program)
        for machine, ranks in MACHINES.items():
            begin = time.perf_counter()
            choice = choose(work, ranks, load(machine))
            print(f"{name}: {choice.note}")
            rows: list[dict[str, Any]] = []
            for v in choice.verdicts:
                p = v.prediction
                row: dict[str, Any] = {"plan": v.plan, "reason": v.reason}
                if p is not None:
                    row |= {"milliseconds": round(1e3 * p.seconds, 2), "exposed": round(1e3 * p.exposed, 2)}
                    row |= {"gigabytes": round(p.memory / 1e9, 1), "megabytes_sent": round(p.bytes / 1e6, 1)}
                rows.append(row)
                print(f"  {v.plan:22}{row.get('milliseconds', '-'):>10}  {v.reason}")
            took = time.perf_counter() - begin
            results.append({"model": name, "topology": machine, "ranks": ranks, "seconds": took, "plans": rows})
    write(args.out, results)


if __name__ == "__main__":
    main()
