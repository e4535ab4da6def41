"""Numbers of a report in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpar.run.report import Report


def ms(milliseconds: float) -> str:
    """Three digits, or thousands."""
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:,.0f}"


def size(number: float) -> str:
    """Bytes in a unit that one reads."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f} B"


def once(report: Report) -> str:
    """What is done once per generation and stream, and what a later call is left with."""
    once = report.hoisted
    return (
        f"once per generation: {once.flops_share:.4f} of one device's FLOPs, {once.bytes:,} bytes, {once.collectives} "
        f"collectives; then {report.step_flops_share:.4f}, {report.step_bytes_per_rank:,}, {report.step_collectives}. "
        f"{once.values} values are kept ({once.kept_bytes:,} bytes), {once.checked_bytes:,} bytes checked per call"
        f"{f' and {once.agreements} all-reduces of the answer' if once.agreements else ''}; "
        f"changing from call to call: {', '.join(once.varying)}"
    )


def legend(values: Mapping[str, int]) -> str:
    """What a form's symbols stand for, as one reads it: ``57 attentions of 2-byte elements: Q = 14,155,776, ...``."""
    what = "attention" if "Q" in values else "sum over cut columns" if "S" in values else "output"
    what = what.replace("sum", "sums") if values["count"] > 1 and "S" in values else what
    plural = "s" * (values["count"] > 1 and "S" not in values)
    named = ", ".join(f"{name} = {value:,}" for name, value in values.items() if name not in ("count", "itemsize"))
    return f"{values['count']} {what}{plural} of {values['itemsize']}-byte elements: {named}"


def predicted(report: Report) -> str:
    """What the clock says of a call."""
    p = {name: 1e3 * value for name, value in report.predicted.items()}
    return (
        f"{ms(p['seconds'])} ms per call on {report.topology}: {ms(p['compute'])} computing, "
        f"{ms(p['communication'])} communicating, of which {ms(p['exposed'])} exposed"
    )


def sampling(run: Mapping[str, float]) -> str:
    """``Report.generation`` in a sentence."""
    steps, streams = int(run["steps"]), int(run["streams"])
    each = f" of {streams} calls" if streams > 1 else ""
    later = f", then {1e3 * run['step']:.3g} ms each" if steps > 1 else ""
    return (
        f"{run['seconds']:.3g} s in {steps} step{'s' * (steps > 1)}{each}: the first {1e3 * run['first']:.3g} ms"
        f"{later}; the sampler's own work is not counted"
    )
