"""Which published rows a model of this kind cannot explain, and why. No criterion looks at an error.

``reason`` gives one for rows that stand in the tables but not in the headline: what they ran is not what the planner
models, or not known, or another measurement of the same thing says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastpar.core.errors import FastparError
from fastpar.core.plan import Plan

APART = 1.2  # two measurements of one configuration that differ by more contradict each other

MODELS = {
    "hunyuanvideo-1.5": "no workload: the model picks tokens by the values of its masks, and fake tensors have none",
    "longcat-image": "the pipeline first has its text encoder write the prompt anew: of what length is unsaid",
}
"""Models none of whose pipelines' rows can be explained."""

_SAID = (
    ("offload", "weights are offloaded to the host"),
    ("qfloat8", "weights are quantised and made bf16 again before every product"),
    ("async", "communication overlapped with products: needs overlap scheduling, which the planner does not know"),
    ("overlapped all-to-all", "needs overlap scheduling, which the planner does not know"),
    ("all-to-all of Q, V, O in FP8", "communication in fp8 is not modelled"),
    ("all-to-all in FP8", "communication in fp8 is not modelled"),
    ("host synchronisation", "waits for the host at every attention"),
    ("masked attention: slow by its kernel", "a masked attention kernel"),
    ("copying slip", "the source repeats another cell's number"),
    ("guess", "the plan is not published"),
    ("plan and", "the plan is not published"),
)


def plan(row: Mapping[str, str]) -> Plan | None:
    """The row's plan; None where it has a term that the planner does not know or does not combine."""
    try:
        return Plan.parse(row["plan"] or "ulysses=1")
    except FastparError:
        return None


def reason(row: Mapping[str, str], rows: Sequence[Mapping[str, str]], known: bool) -> str:
    """Why the row is not explained; empty where it is. ``known``: there is a workload of its model."""
    if row["model"] in MODELS and row["scope"] == "pipeline":
        return MODELS[row["model"]]
    if not known:
        return "no workload: the model's configuration is not published, or diffusers does not have it"
    made = plan(row)
    if made is None:
        return f"plan {row['plan']!r} has a term or a combination that the planner does not have"
    if row["dtype"] == "fp4":
        return "fp4 products"
    if made.tp and row["model"] == "sdxl":
        return "tensor parallelism of convolutions is not modelled"
    for text, why in _SAID:
        if text in row["note"]:
            if text == "offload" and "on 1 GPU" in row["note"] and row["ranks"] != "1":
                continue
            return why
    return contradicted(row, rows)


def contradicted(row: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """Names another row of the same configuration, of another source, whose time is more than a fifth apart."""
    for other in rows:
        if other["source"] != row["source"] and _configuration(other) == _configuration(row):
            a, b = (_comparable(r) for r in (row, other))
            if max(a, b) / min(a, b) > APART:
                return f"contradicted by {other['id']}: {b / a:.2f} times its time for the same configuration"
    return ""


def _configuration(row: Mapping[str, str]) -> tuple[Any, ...]:
    steps = row["steps"] if row["scope"] == "pipeline" else ""
    return steps, *(row[k] for k in ("stack", "lowering", "model", "width", "height", "frames", "calls", "dtype",
                                     "device", "ranks", "plan", "scope"))  # fmt: skip


def _comparable(row: Mapping[str, str]) -> float:
    """Seconds, per step where the row is of the denoiser alone."""
    return float(row["seconds"]) / (int(row["steps"]) if row["scope"] == "transformer" else 1)
