"""What torch logs of an error that is about to be raised, and told once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """These loggers say nothing while it is entered. By a filter: torch sets levels anew when it is imported."""
    logs = [logging.getLogger(name) for name in loggers]
    for log in logs:
        log.addFilter(_nothing)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


OPERATORS = "torch._subclasses.fake_tensor"
"""Says which operator did not run on inputs that are not its own, with a traceback."""
LAUNCHER = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")
"""Say that a process failed, and that others are ended for it."""
