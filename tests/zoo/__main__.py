"""`python -m tests.zoo [--eager] [NAME ...]`: check cases, print a table. NAME is a prefix of case names."""

from __future__ import annotations

import argparse
import sys
import traceback

import torch

from . import CASES, UNAVAILABLE, missing, model_classes
from .check import check


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("names", nargs="*", help="prefixes of case names; default all")
    args = parser.parse_args()
    torch.set_num_threads(1)

    chosen = [c for c in CASES.values() if not args.names or c.name.startswith(tuple(args.names))]
    print(f"{'case':45} {'family':6} {'params':>8} {'tokens':>6} {'eager s':>8} {'graphs':>6} {'diff':>8}")
    bad = 0
    for case in chosen:
        try:
            r = check(case, compiled=not args.eager)
        except Exception:
            bad += 1
            print(f"{case.name:45} {case.family:6} FAILED\n{traceback.format_exc(limit=-3)}", flush=True)
            continue
        bad += bool(r.problems)
        row = f"{r.params:8,} {r.tokens:6} {r.seconds:8.3f} {r.graphs:6} {r.error:8.1e}"
        print(f"{case.name:45} {case.family:6} {row} {'; '.join(r.problems)}", flush=True)

    classes, gone = model_classes(), missing()
    print(f"\n{len(chosen)} cases, {bad} bad; {len(classes)} exported classes, {len(gone)} without a case")
    for name in gone:
        print(f"no case: {name}")
    for name, reason in UNAVAILABLE.items():
        print(f"unavailable: {name}: {reason}")
    return 1 if bad or gone else 0


if __name__ == "__main__":
    sys.exit(main())
