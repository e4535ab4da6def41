"""What fastpar makes of one case of the zoo: captured once, verified under every plan; plain values, for JSON."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

import fastpar
from fastpar import Captured, Report

from . import CASES, Case
from .check import difference
from .ledger import tolerance

Record = dict[str, Any]


def measure(name: str, plans: Sequence[str]) -> Record:
    """The record of case ``name`` under ``plans`` (their texts). What raises is recorded under ``error``."""
    case = CASES[name]
    record: Record = {
        "class": case.cls,
        "family": case.family,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
    }
    torch._dynamo.reset()
    begin = time.perf_counter()
    try:
        captured, record["capture_error"] = capture(case)
        if record["capture_error"] >= tolerance(record["dtype"]):
            record["conditioning"] = conditioning(case)
    except Exception as error:  # whatever it is, the other cases go on
        return {**record, "graphs": 0, "error": describe(error), "plans": {}}
    record["graphs"] = len(captured.programs)
    record["seconds"] = round(time.perf_counter() - begin, 1)
    record["plans"] = {plan: under(captured, plan) for plan in plans}
    torch._dynamo.reset()
    return record


def capture(case: Case) -> tuple[Captured, float]:
    """The captured case, and how far what it returned is from an eager call (relative)."""
    model = case.build()
    captured = fastpar.capture(model, case.inputs)
    with torch.no_grad():
        return captured, difference(captured.outputs, model(**case.inputs()))


def conditioning(case: Case) -> float:
    """How far eager is from itself (relative) where numbers of the input are off by half a unit in the last place:
    captured graphs need not be nearer."""
    model, worst = case.build(), 0.0
    with torch.no_grad():
        expected = model(**case.inputs())
        for sign in (1, -1):
            given = case.inputs()
            for name, x in given.items():
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    given[name] = x * (1 + sign * torch.finfo(x.dtype).eps / 2 * 1.01)
            worst = max(worst, difference(model(**given), expected))
    return worst


def under(captured: Captured, plan: str) -> Record:
    """One verification."""
    begin = time.perf_counter()
    try:
        report = fastpar.verify(captured, plan=plan)
    except Exception as error:
        return {"ok": False, "error": describe(error)}
    return {**summary(report), "seconds": round(time.perf_counter() - begin, 1)}


def summary(report: Report) -> Record:
    """The numbers of a report that are worth keeping; fallbacks that share all but their place in time are one."""
    found = Counter((f.operator, f.kind, f.source, f.reason) for f in report.fallbacks)
    record: Record = {
        "ok": report.ok,
        "max_rel_err": report.max_rel_err,
        "tolerance": report.tolerance,
        "flops_share": round(report.flops_share, 4),
        "attainable_share": round(report.attainable_share, 4),
        "collectives": sum(c.count for c in report.collectives),
        "bytes": report.bytes_per_rank,
        "bytes_formula": report.bytes_formula,
        "fallbacks": [
            {"operator": op, "kind": kind, "source": source, "reason": reason, "count": count}
            for (op, kind, source, reason), count in found.items()
        ],
    }
    if report.diverged_at:
        record["diverged_at"] = report.diverged_at
    return record


_FOLDERS = re.compile(r"(?:/[^/\s'\":]+)+(?=(?:/[^/\s'\":]+){3})")


def describe(error: Exception) -> str:
    """Type and message on one line; of absolute paths only the last three parts, so that machines agree."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {_FOLDERS.sub('', text)[:400]}"
