"""pytest's marker ``gpu``, as one row per test that failed and one for all."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.part import Part, run


def results(path: Path) -> dict[str, Any]:
    """Counts, and messages of failed tests by name, from pytest's JUnit file."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        if wrong:
            failed[f"{case.get('classname')}::{case.get('name')}"] = str(wrong[0].get("message"))
        counts["failed" if wrong else "skipped" if case.find("skipped") is not None else "passed"] += 1
    return {**counts, "messages": failed}


def body(part: Part) -> None:
    found: dict[str, Any] = {}

    def tests() -> dict[str, Any]:
        part.need_cuda("the marker gpu")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "junit.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x" if part.size == "tiny" else "-q",
                       f"--junitxml={path}"]  # fmt: skip
            status = subprocess.run(command, timeout=max(part.left, 1)).returncode
            if not path.exists():
                raise RuntimeError(f"pytest ended with status {status} and without results")
            found.update(results(path))
        return {name: found[name] for name in ("passed", "failed", "skipped")}

    part.attempt("pytest -m gpu", tests)
    for name, message in found.get("messages", {}).items():

        def fail(message: str = message) -> None:
            raise AssertionError(message)

        part.attempt(name, fail)


if __name__ == "__main__":
    run(body)
