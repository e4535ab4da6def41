"""What stands beside figures that are kept: machine, versions, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastpar.core.files import write_whole


def environment(leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Machine and versions, without names or paths of the machine. ``leave_out``: options of ``command``."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "diffusers", "triton", "fastpar"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": packages,
        "command": command(leave_out),
    }


def recorded(results: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """``{"environment": ..., "results": ...}``"""
    return {"environment": environment(leave_out), "results": results}


def write(path: Path, results: Any) -> None:
    """``recorded(results)`` as JSON, whole or not at all."""
    write_whole(path, (json.dumps(recorded(results), indent=1) + "\n").encode())


def command(leave_out: Sequence[str] = ()) -> str:
    """How this process was started, without options that say where its output goes."""
    words: list[str] = []
    skip = False
    for word in sys.argv[1:]:
        if not skip and word.partition("=")[0] not in leave_out:
            words.append(word)
        skip = not skip and word in leave_out
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # a console script
        return shlex.join([Path(sys.argv[0]).name, *words])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *words])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
