"""The committed state of the zoo (``docs/zoo.json``): what may not get worse from one change to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Cases = dict[str, dict[str, Any]]


def read(path: Path) -> Any:
    """The ledger; an empty one where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}


def write(path: Path, ledger: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(ledger) + "\n", encoding="utf-8")


def _text(value: Any, depth: int = 0) -> str:
    """JSON with a line for every plan of every case, so that a change shows as the lines that it changes."""
    if not isinstance(value, dict) or depth == 4:
        return json.dumps(value, ensure_ascii=False)
    lines = [f"{' ' * (depth + 1)}{json.dumps(k, ensure_ascii=False)}: {_text(v, depth + 1)}" for k, v in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def fallbacks(cases: Cases, like: Cases | None = None) -> int:
    """Gathers that no plan asked for, all together; with ``like`` only under (case, plan) that it has too."""
    total = 0
    for name, record in cases.items():
        for plan, row in record["plans"].items():
            if like is None or plan in like.get(name, {"plans": {}})["plans"]:
                total += sum(f["count"] for f in row.get("fallbacks", []))
    return total


def lost(cases: Cases) -> Iterator[str]:
    """One line for every case that does not work, and why."""
    for name, record in cases.items():
        if "error" in record:
            yield f"{name}: {record['error']}"
        elif not record["capture_error"] < max(tolerance(record["dtype"]), record.get("conditioning", 0.0)):
            yield f"{name}: the captured graphs differ from eager by {record['capture_error']:.1e}"
        for plan, row in record["plans"].items():
            if "error" in row:
                yield f"{name} under {plan}: {row['error']}"
            elif not row["ok"]:
                where = row.get("diverged_at", "nowhere in particular")
                yield f"{name} under {plan}: off by {row['max_rel_err']:.1e} (allowed {row['tolerance']:.1e}), {where}"


def tolerance(dtype: str) -> float:
    """How far captured graphs may be from eager: the same operators in other kernels, some in float32 in any case.

    A norm in float32 sums in the order of its operand's memory, and a model has many of them. A model that makes more
    than that of the rounding of its inputs (a record's ``conditioning``) is allowed as much.
    """
    return 1e-6 if dtype == "float64" else 1e-5


def gone(before: Cases, now: Cases) -> list[str]:
    """Cases, and plans of cases, that the ledger has and a whole run no longer tried."""
    out = [f"{name}: is in the ledger and was not run" for name in before if name not in now]
    for name in now:
        plans = before.get(name, {"plans": {}})["plans"]
        out += [f"{name} under {p}: is in the ledger and was not run" for p in plans if p not in now[name]["plans"]]
    return out
