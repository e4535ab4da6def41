"""A timeline as a PNG: a row per rank and stream, and computing, communication and waits in different colours."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastpar.core.errors import OptionError
from fastpar.core.files import write_whole
from fastpar.plan.timeline import COMMUNICATION, COMPUTE, WAIT, Event, Timeline

LATE = "late"
COLOURS = {COMPUTE: (70, 130, 180), COMMUNICATION: (240, 170, 60), WAIT: (210, 50, 45), LATE: (130, 60, 150)}
"""Red, green and blue of what a rank does."""
_LEGEND = {
    COMPUTE: "computing",
    COMMUNICATION: "communicating",
    WAIT: "waiting for an exchange (exposed)",
    LATE: "waiting for a rank that comes later",
}
WIDTH = 1600  # pixels of the time axis
ROW, GAP, BETWEEN, MARGIN = 12, 3, 8, 16  # a row, below it, below a rank, around all
_WHITE, _EMPTY, _INK, _LINE = (255, 255, 255), (238, 238, 238), (30, 30, 30), (200, 200, 200)


def draw(
    timeline: Timeline, path: str | Path, title: str = "", begin: float = 0.0, end: float | None = None
) -> None:
    """Write the timeline's events, or what of them is between ``begin`` and ``end`` (seconds), as a PNG.

    Where several things share a pixel, it has the colour of what takes most of it; nothing that was done vanishes.
    Raises OptionError for a span in which there is nothing, OSError where the file cannot be written.
    """
    write_whole(path, png(timeline, title, begin, end))


def png(timeline: Timeline, title: str = "", begin: float = 0.0, end: float | None = None) -> bytes:
    """``draw`` as bytes."""
    end = max((e.end for e in timeline.events), default=0.0) if end is None else end
    if not 0 <= begin < end:
        raise OptionError(f"a picture from {begin!r} to {end!r} seconds of a timeline of {timeline.seconds!r}: "
                          "begin is at least 0 and less than end")  # fmt: skip
    rows = list(timeline.rows())
    font = ImageFont.load_default(size=11)
    labels = [f"rank {rank}" if row == COMPUTE else row.removeprefix("communication ") for rank, row, _ in rows]
    left = MARGIN + 8 + math.ceil(max((font.getlength(x) for x in labels), default=0))
    tops, top = [], MARGIN + 50
    for i, (rank, _, _) in enumerate(rows):
        top += BETWEEN if i and rank != rows[i - 1][0] else 0
        tops.append(top)
        top += ROW + GAP
    sheet = np.full((top + 40, left + WIDTH + MARGIN, 3), _WHITE, dtype=np.uint8)
    for y, (_, _, events) in zip(tops, rows, strict=True):
        sheet[y : y + ROW, left : left + WIDTH] = _strip(events, begin, end)
    image = Image.fromarray(sheet)
    pen = ImageDraw.Draw(image)
    for y, label in zip(tops, labels, strict=True):
        pen.text((left - 8, y + ROW // 2), label, fill=_INK, font=font, anchor="rm")
    of = f"{len({rank for rank, _, _ in rows})} ranks, {_seconds(timeline.seconds)}: {_seconds(timeline.compute)} "
    of += f"computing, {_seconds(timeline.exposed)} exposed on the rank that is last"
    pen.text((MARGIN, MARGIN), f"{title}: {of}" if title else of, fill=_INK, font=ImageFont.load_default(size=14))
    x = MARGIN
    for kind, said in _LEGEND.items():
        pen.rectangle((x, MARGIN + 26, x + 11, MARGIN + 37), fill=COLOURS[kind])
        pen.text((x + 17, MARGIN + 32), said, fill=_INK, font=font, anchor="lm")
        x += 40 + round(font.getlength(said))
    _axis(pen, font, left, top + 4, begin, end)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _strip(events: Sequence[Event], begin: float, end: float) -> np.ndarray:
    """[WIDTH, 3] colours of one row."""
    kinds = list(COLOURS)
    covered = np.zeros((len(kinds), WIDTH + 2))
    for i, kind in enumerate(kinds):
        own = [e for e in events if (LATE if e.late >= 0 else e.stream) == kind]
        if not own:
            continue
        x = np.array([(e.start, e.end) for e in own]).T
        x0, x1 = np.clip((x - begin) / (end - begin) * WIDTH, 0, WIDTH)
        # An interval is a whole number of pixels between its ends (a step up and a step down), and a part at each.
        first, last = x0.astype(int), x1.astype(int)
        steps = np.zeros(WIDTH + 2)
        np.add.at(steps, first, 1.0)
        np.add.at(steps, last, -1.0)
        covered[i] = np.cumsum(steps)
        np.add.at(covered[i], first, first - x0)
        np.add.at(covered[i], last, x1 - last)
    covered = covered[:, :WIDTH]
    palette = np.array([*COLOURS.values(), _EMPTY], dtype=np.uint8)
    return palette[np.where(covered.max(0) > 1e-6, covered.argmax(0), len(kinds))]


def _axis(pen: ImageDraw.ImageDraw, font: Any, left: int, y: int, begin: float, end: float) -> None:
    """Ticks at round numbers, about ten of them, and the unit."""
    scale, unit = _unit(end)
    rough = (end - begin) / scale / 10
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * rough)
    pen.line((left, y, left + WIDTH, y), fill=_INK)
    places = max(0, -math.floor(math.log10(step)))
    for k in range(math.ceil(begin / scale / step), math.floor(end / scale / step * (1 + 1e-9)) + 1):
        x = left + round((k * step * scale - begin) / (end - begin) * WIDTH)
        pen.line((x, y, x, y + 4), fill=_INK)
        pen.text((x, y + 7), f"{k * step:.{places}f} {unit}", fill=_INK, font=font, anchor="ma")


def _unit(seconds: float) -> tuple[float, str]:
    """The font has no µ."""
    return next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "us"))


def _seconds(seconds: float) -> str:
    scale, unit = _unit(seconds)
    return f"{seconds / scale:.3g} {unit}"
