"""The predicted timeline of a plan as files: a Chrome trace and a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastpar.core.errors import OptionError

if TYPE_CHECKING:
    from fastpar.run.report import Report


def check_files(trace: Path | None, picture: Path | None, topology: str | None, steps: int | None) -> None:
    """Raise OptionError, before anything takes long, for times without a topology and files that cannot be written."""
    for option, asked in (("--trace", trace), ("--picture", picture), ("--steps", steps)):
        if asked is not None and topology is None:
            from fastpar.plan.topology import presets

            raise OptionError(f"{option} is about predicted times, which need a topology; add --topology with a "
                              f"preset ({', '.join(presets())}) or a TOML file")  # fmt: skip
    for option, path, suffix in (("--trace", trace, ".json"), ("--picture", picture, ".png")):
        if path is not None:
            check_file(option, path, suffix)


def check_file(option: str, path: Path, suffix: str) -> None:
    """Raise OptionError, before anything takes long, for a file that cannot be written."""
    if path.suffix != suffix:
        raise OptionError(f"{option}: expected the name of a {suffix} file, not {str(path)!r}")
    if path.is_dir():
        raise OptionError(f"{option}: cannot write {str(path)!r}: it is a folder")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OptionError(f"{option}: cannot write {str(path)!r}: {str(above)!r} is no folder to write to")


def write_timeline(report: Report, trace: Path | None, picture: Path | None, model: str) -> None:
    """Write what was asked for. Both are made before either is written. Raises OptionError where one cannot be."""
    if (trace is None and picture is None) or report.timeline is None:
        return
    from fastpar.core.files import write_whole
    from fastpar.plan.picture import png
    from fastpar.plan.trace import trace_text

    made = []
    if trace is not None:
        made.append(("--trace", trace, trace_text(report.timeline).encode()))
    if picture is not None:
        made.append(("--picture", picture, png(report.timeline, f"{model}, {report.plan} on {report.topology}")))
    for option, path, data in made:
        try:
            write_whole(path, data)
        except OSError as error:
            raise OptionError(f"{option}: cannot write {str(path)!r}: {error}") from error
