"""Settings that all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: workers share few cores, and the first example of a test pays for its imports.
# On CI the examples are always the same ones, so that a red run is about the change.
settings.register_profile("fastpar", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fastpar")
