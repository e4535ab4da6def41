"""One row of what ``doctor`` finds, and checks that cannot fail nor hang."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, FAILED = "ok", "warning", "failed"
PATIENCE = 90.0
"""Seconds that a process of a check may take; importing torch on a busy machine takes a part of them."""


@dataclass(frozen=True)
class Fact:
    """What was looked at, how it is (``ok``, ``warning`` or ``failed``), what was found, and what to do about it.

    What is ``failed`` is needed; a ``warning`` is something that one can do without.
    """

    name: str
    status: str
    found: str
    advice: str = ""


Check = Callable[[], Iterable[Fact]]


def looked(name: str, check: Check) -> list[Fact]:
    """The facts of a check. Whatever it raises is a fact as well."""
    try:
        return list(check())
    except Exception as error:  # of any library, in any state: that is what a doctor is asked about
        return [Fact(name, WARNING, f"could not be looked at: {said(error)}")]


def said(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def ended(commands: Sequence[Sequence[str]], patience: float) -> list[tuple[int | None, str]]:
    """Of each command, run beside each other, its status and what it printed. None: it had not ended after ``patience``
    seconds, or was waiting for one that failed. All are ended, and none is waited for that cannot be."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastpar-") as folder:
        outs = [Path(folder) / str(i) for i in range(len(commands))]
        started: list[subprocess.Popen[bytes]] = []
        try:
            for command, out in zip(commands, outs, strict=True):
                with out.open("wb") as to:
                    started.append(subprocess.Popen(command, stdout=to, stderr=to, stdin=subprocess.DEVNULL))
            while any(p.poll() is None for p in started) and time.monotonic() - begin < patience:
                if any(p.poll() for p in started):
                    break
                time.sleep(0.02)
            statuses = [p.poll() for p in started]
        finally:
            for p in started:
                p.kill()
            for p in started:
                with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds does not even die
                    p.wait(5)
        return [(status, out.read_text(errors="replace")) for status, out in zip(statuses, outs, strict=True)]


def last_line(status: int | None, text: str) -> str:
    """What a process that failed said last."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with status {status}"


def elsewhere(name: str, function: str, patience: float | None = None) -> list[Fact]:
    """The facts that ``package.module:function`` gives in a process of its own: a driver that hangs, or a library that
    crashes, is a fact and not the end."""
    module, _, called = function.partition(":")
    code = (
        f"import dataclasses, json; from {module} import {called}; "
        f"print('facts', json.dumps([dataclasses.asdict(f) for f in {called}()]))"
    )
    patience = PATIENCE if patience is None else patience
    ((status, text),) = ended([[sys.executable, "-c", code]], patience)
    if status is None:
        return [Fact(name, FAILED, f"did not answer within {patience:g} s", "see whether nvidia-smi answers")]
    lines = [line for line in text.splitlines() if line.startswith("facts ")]
    if status or not lines:
        return [Fact(name, FAILED, last_line(status, text))]
    return [Fact(**fact) for fact in json.loads(lines[-1].removeprefix("facts "))]
