"""A timeline in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process per rank; in it a thread for what it computes and waits for, and one per group that it talks to.
"""

from __future__ import annotations

import json
from typing import Any

from fastpar.plan.timeline import Event, Timeline


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace as plain values for JSON. Times are microseconds, exact to the nanosecond, so that events of a thread
    never overlap; ``args`` have the model's line, the mesh's axes, the bytes that the rank sends, and, of a wait, the
    rank that came last."""
    events: list[dict[str, Any]] = []
    threads: dict[int, int] = {}
    for rank, row, found in timeline.rows():
        thread = threads[rank] = threads.get(rank, -1) + 1
        if thread == 0:
            events += _named("process", f"rank {rank}", rank, 0, rank)
        events += _named("thread", row, rank, thread, thread)
        events += (_complete(event, thread) for event in found)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def trace_text(timeline: Timeline) -> str:
    """``chrome_trace`` as JSON."""
    return json.dumps(chrome_trace(timeline), separators=(",", ":")) + "\n"


def _named(what: str, name: str, rank: int, thread: int, order: int) -> list[dict[str, Any]]:
    where = {"ph": "M", "pid": rank, "tid": thread}
    return [{"name": f"{what}_name", **where, "args": {"name": name}},
            {"name": f"{what}_sort_index", **where, "args": {"sort_index": order}}]  # fmt: skip


def _complete(event: Event, thread: int) -> dict[str, Any]:
    begin, end = round(1e9 * event.start), round(1e9 * event.end)
    args: dict[str, Any] = {"source": event.source}
    if event.axes:
        args |= {"axes": event.axes, "bytes": event.bytes}
    if event.late >= 0:
        args["late"] = event.late
    return {
        "name": event.name,
        "cat": event.stream,
        "ph": "X",
        "ts": begin / 1000,
        "dur": (end - begin) / 1000,
        "pid": event.rank,
        "tid": thread,
        "args": args,
    }
