"""Predicts every published latency: ``python -m benchmarks.published``.

Constants are fitted to the third of the rows that ``split.may_fit`` names; everything else is predicted. Writes
``benchmarks/results/published.json`` and ``docs/published.md``.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.published import judge, page, ratios
from benchmarks.published.fit import baseline, error, fit, median, pairs, without
from benchmarks.published.latency import Model
from benchmarks.published.machines import PER, PRESETS, Constants, names
from benchmarks.published.split import may_fit, read
from fastpar.core.record import write
from fastpar.plan.topology import load

RESULTS = Path("benchmarks/results/published.json")
DOCS = Path("docs/published.md")


def rows_of(model: Model, rows: Sequence[Mapping[str, str]], constants: Constants) -> list[dict[str, Any]]:
    """Every row with its prediction, its error and, where it is not explained, the reason."""
    out = []
    for row in rows:
        parts = model.parts(row, constants)
        made: dict[str, Any] = {
            "id": row["id"], "published": float(row["seconds"]), "predicted": None, "error": None,
            "fitted": may_fit(row["id"]), "reason": judge.reason(row, rows, model.known(row)),
        }  # fmt: skip
        if parts is not None:
            made["predicted"] = _short(parts.total)
            made["error"] = round(error(parts.total, made["published"]), 4)
            made["decoder"], made["text"] = _short(parts.decoder), _short(parts.text)
        out.append(made)
    return out


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of absolute errors: of fitted and of test rows, of those explained and of all that are predicted."""

    def of(fitted: bool, explained: bool) -> float:
        return round(median([abs(r["error"]) for r in rows if r["fitted"] == fitted and r["error"] is not None
                             and not (explained and r["reason"])]), 4)  # fmt: skip

    return {
        "rows": len(rows),
        "fitted": sum(r["fitted"] and not r["reason"] for r in rows),
        "test": sum(not r["fitted"] and not r["reason"] for r in rows),
        "median_fit": of(True, True),
        "median_test": of(False, True),
        "median_test_all_predicted": of(False, False),
        "unexplained": sum(bool(r["reason"]) for r in rows),
        "not_predicted": sum(r["error"] is None for r in rows),
    }


def ranking(rows: Sequence[Mapping[str, str]], made: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pairs of plans that differ by over 5 %: how many are ranked right, of explained rows and of all predicted, and
    each with the ratio of its times, published and predicted."""
    by = {m["id"]: m for m in made}
    seconds = {m["id"]: m["predicted"] for m in made if m["predicted"]}
    found = pairs([r for r in rows if r["id"] in seconds], seconds)
    explained = [p for p in found if not (by[p[0]]["reason"] or by[p[1]]["reason"])]
    out: dict[str, Any] = {
        name: {"pairs": len(some), "right": sum(ok for *_, ok in some)}
        for name, some in (("explained", explained), ("all_predicted", found))
    }
    out["pairs"] = [
        [a, b, *(round(by[a][k] / by[b][k], 3) for k in ("published", "predicted")), (a, b, ok) in explained]
        for a, b, ok in found
    ]
    return out


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    model, rows = Model(), read()
    explained = [r for r in rows if not judge.reason(r, rows, model.known(r))]
    fitted, test = ([r for r in explained if may_fit(r["id"]) == which] for which in (True, False))
    constants = fit(model, fitted)
    made = rows_of(model, rows, constants)
    used = names(fitted)
    counts = {where: Counter(what for w, what, _ in used if w == where) for where in PER}

    hidden, apart = [], {}
    for device in sorted({r["device"] for r in test}):
        blind = without(model, fitted, device, constants)
        its = [r for r in test if r["device"] == device]
        errors = [abs(error(model.seconds(r, blind) or 0.0, float(r["seconds"]))) for r in its]
        apart[device] = {"rows": len(errors), "median": round(median(errors), 4)}
        hidden += errors

    def least(row: Mapping[str, str]) -> float:
        return (model.flops(row) or 0.0) / (int(row["ranks"]) * load(PRESETS[row["device"]]).device.flops)

    trivial = baseline(test, fitted, least)
    results = {
        "summary": summary(made)
        | {
            "constants": len(used),
            "constants_most_per": {where: max(c.values(), default=0) for where, c in counts.items()},
            "median_without_the_hardware": round(median(hidden), 4),
            "median_baseline": round(median([abs(error(trivial[r["id"]], float(r["seconds"]))) for r in test]), 4),
            "baseline_constants": 1,
        },
        "ranking": ranking(rows, made),
        "without_the_hardware": apart,
        "constants": [[*name, _short(constants[name])] for name in used],
        "rows": made,
        "ratios": ratios.predicted(model, constants),
    }
    write(args.out, results)
    args.docs.write_text(page.text(results, rows))
    print(page.table(results, rows))
    print(page.headline(results))


if __name__ == "__main__":
    main()
