"""How long a proof takes: capture, build and simulate a small model for several plans and rank counts.

``python -m benchmarks.verify_speed``: the demo's trained transformer in float64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import fastpar
from fastpar.demo.model import load_digits

PLANS = ("gather=2", "gather=8", "ulysses=2", "ulysses=8", "ring=4", "ulysses=4,ring=2", "cfg=2,ulysses=4")


def measure() -> list[dict[str, Any]]:
    """One row per plan: seconds of capture (once), passes and the whole proof."""
    torch.manual_seed(0)
    model = load_digits(torch.float64)
    inputs = {
        "hidden_states": torch.randn(2, 1, 16, 16, dtype=torch.float64),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([3, 10]),
    }
    begin = time.perf_counter()
    captured = fastpar.capture(model, inputs)
    capture = time.perf_counter() - begin
    rows = []
    for plan in PLANS:
        begin = time.perf_counter()
        report = fastpar.verify(captured, plan=plan)
        rows.append(
            {
                "plan": plan,
                "ok": report.ok,
                "max_rel_err": report.max_rel_err,
                "nodes": sum(r.program.num_nodes for r in captured.programs),
                "seconds_capture": capture,
                "seconds_passes": sum(report.seconds.values()),
                "seconds_verify": time.perf_counter() - begin,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    for row in rows:
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if args.out:
        from fastpar.core.record import write

        write(args.out, rows)


if __name__ == "__main__":
    main()
