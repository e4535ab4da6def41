"""``python -m benchmarks.onesided_compile``: what one-sided transport adds to compiling FLUX.1 on 8 ranks.

On fake tensors, so 12B parameters take no memory. A two-sided compile localises one rank's program. A one-sided one
also needs the order and the sizes of what all ranks exchange (``backends/onesided/skeleton.py``), slots and credits
(``order.py``) and the rewrite. ``--check`` localises all ranks' programs too, and compares.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

PLANS = ("ulysses=8", "ulysses=4,ring=2", "torus=2,ulysses=4", "ring=8", "tp=8")


def measure(captured: Any, plan: str, check: bool) -> dict[str, Any]:
    """Seconds of each part of one plan, on rank 0."""
    from fastpar.backends.onesided.rewrite import planned, rewrite
    from fastpar.backends.onesided.skeleton import of_all
    from fastpar.run.build import build

    built = build(captured, plan, verify_structure=False)
    ranks, times = range(built.mesh.ranks), [time.perf_counter()]
    local = built.localise(0)
    times.append(time.perf_counter())
    every = of_all(built.lowered, built.mesh)
    times.append(time.perf_counter())
    heaps = planned(every, "heap")
    times.append(time.perf_counter())
    rewrite(local, 0, heaps)
    times.append(time.perf_counter())
    names = ("localise", "exchanges of all ranks", "slots and credits", "rewrite")
    row: dict[str, Any] = {"plan": plan, "nodes": built.lowered.num_nodes, "exchanges": len(every[0].exchanges)}
    row |= {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}
    if check:
        from fastpar.backends.onesided.skeleton import of_program

        begin = time.perf_counter()
        whole = [built.localise(rank) for rank in ranks]
        row["localise on all ranks"] = time.perf_counter() - begin
        row["equal"] = [of_program(p, r)[0] for r, p in enumerate(whole)] == every
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--layers", type=int, help="of two streams; FLUX.1's 19 without")
    parser.add_argument("--single", type=int, help="of one stream; FLUX.1's 38 without")
    parser.add_argument("--check", action="store_true", help="also localise every rank's program, and compare")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import fastpar
    from benchmarks.real_size import flux

    captured = fastpar.capture(*flux(args.layers, args.single, 4096, 512)).programs[0].program
    rows = []
    for plan in args.plans:
        rows.append(measure(captured, plan, args.check))
        shown = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
        print("  ".join(shown), flush=True)
    if args.out:
        from fastpar.core.record import write

        write(args.out, rows)


if __name__ == "__main__":
    main()
