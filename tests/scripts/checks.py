"""Checks for ``doctor``, each in a process of its own: one that is fine, and those that are not."""

from __future__ import annotations

import os
import time

from fastpar.cli.health.fact import OK, Fact


def fine() -> list[Fact]:
    print("a library that talks")
    return [Fact("fine", OK, "é")]


def crash() -> list[Fact]:
    os._exit(3)


def hang() -> list[Fact]:
    time.sleep(1000)
    return []


def raises() -> list[Fact]:
    raise RuntimeError("the driver\nis gone")
