"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hypothesis import Phase, settings

# No deadline: workers share few cores, and the first example of a test pays for its imports.
# On CI the examples are always the same ones, so that a red run is about the change.
settings.register_profile("fastpar", deadline=None, derandomize=bool(os.environ.get("CI")))
# What fails need not be made small: it was broken on purpose.
settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=[Phase.generate])
settings.load_profile("fastpar")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Statistics that tests recorded (``record_property("statistics", text)``), also from xdist's workers."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        given: Mapping[str, Any] = dict(report.user_properties)
        if "statistics" in given:
            terminalreporter.section(report.nodeid.rsplit("::", 1)[-1])
            terminalreporter.write_line(str(given["statistics"]))
