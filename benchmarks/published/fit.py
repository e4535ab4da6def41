"""Fits the constants to the rows that may be fitted to, and scores predictions.

Least absolute logarithmic error, so that no row weighs more than its error in per cent, plus a pull towards the common
values (``PULL`` for each squared spread), which decides where few rows know a device. Every constant in turn takes a
step up or down where that helps, with steps that shrink; no constant sees the rows of the test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.published.latency import Model
from benchmarks.published.machines import DEVICE, LINK, LINKS, Constants, names, of

PULL = 0.05
ROUND = 0.03  # errors below it weigh less: a search along one constant at a time stops at every kink
STEPS = (0.3, 0.15, 0.08, 0.04, 0.02)
AGAIN = STEPS[2:]  # from constants that were fitted to nearly the same rows

Row = Mapping[str, str]


def error(predicted: float, published: float) -> float:
    """Relative: 0.1 is a tenth too slow."""
    return predicted / published - 1


def fit(model: Model, rows: Sequence[Row], start: Constants | None = None, steps: Sequence[float] = STEPS) -> Constants:
    """Constants for these rows, all of which the model can predict."""
    now = start or Constants()
    wanted = names(rows)
    seeing = {name: [i for i, row in enumerate(rows) if name in of(row)] for name in wanted}
    losses = [_loss(model, row, now) for row in rows]
    for step in steps:
        for _ in range(4):
            moved = False
            for name in wanted:
                for sign in (1, -1):
                    trial = now.changed(name, now[name] * math.exp(sign * step))
                    if trial[name] == now[name]:
                        continue
                    new = {i: _loss(model, rows[i], trial) for i in seeing[name]}
                    gain = sum(losses[i] - x for i, x in new.items())
                    gain += PULL * (now.distance(name) ** 2 - trial.distance(name) ** 2)
                    if gain > 1e-9:
                        now, moved = trial, True
                        for i, x in new.items():
                            losses[i] = x
                        break
            if not moved:
                break
    return now


def _loss(model: Model, row: Row, constants: Constants) -> float:
    seconds = model.seconds(row, constants)
    assert seconds is not None, row["id"]
    return math.hypot(math.log(seconds / float(row["seconds"])), ROUND)


def without(model: Model, rows: Sequence[Row], device: str, start: Constants) -> Constants:
    """Fitted without this device's rows; its constants are its data sheet at the others' mean efficiencies."""
    others = [row for row in rows if row["device"] != device]
    apart = Constants({k: v for k, v in start.values.items() if k[1] != device})
    fitted = fit(model, others, apart, AGAIN)
    known = names(others)
    means = fitted.mean(n for n in known if n[2] in DEVICE or n[2] in LINK)
    values = dict(fitted.values)
    for kind in DEVICE:
        values[("device", device, kind)] = means[kind]
    for kind in LINK:
        if ("link", LINKS[device], kind) not in known:
            values[("link", LINKS[device], kind)] = means[kind]
    return Constants(values)


def median(values: Sequence[float]) -> float:
    """NaN of nothing."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def baseline(rows: Sequence[Row], fitted: Sequence[Row], least: Callable[[Row], float]) -> dict[str, float]:
    """Seconds per row id where every device reaches one share of ``least``, fitted to the same rows."""
    factor = median([float(r["seconds"]) / least(r) for r in fitted])
    return {r["id"]: factor * least(r) for r in rows}


def pairs(rows: Sequence[Row], predicted: Mapping[str, float], apart: float = 0.05) -> list[tuple[str, str, bool]]:
    """(a, b, ranked right) of plans of one configuration whose published times differ by more than ``apart``."""
    same = ("source", "model", "width", "height", "frames", "steps", "calls", "dtype", "device", "stack", "lowering",
            "ranks", "scope")  # fmt: skip
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in same), []).append(row)
    out = []
    for group in groups.values():
        for i, a in enumerate(group):
            for b in group[i + 1 :]:
                x, y = float(a["seconds"]), float(b["seconds"])
                if a["plan"] == b["plan"] or abs(x - y) <= apart * min(x, y):
                    continue
                out.append((a["id"], b["id"], (predicted[a["id"]] < predicted[b["id"]]) == (x < y)))
    return out
