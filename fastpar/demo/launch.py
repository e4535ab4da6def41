"""Start the demo's processes on this machine with torch's own launcher, and bring their errors home."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastpar.core.errors import FastparError
from fastpar.demo.worker import Job, Outcome, work


class DemoError(FastparError, RuntimeError):
    """A process of the demo failed; the message carries the tracebacks."""


def launch(job: Job, ranks: int) -> list[Outcome]:
    """Run ``job`` on ``ranks`` new processes and return rank 0's outcomes.

    Raises :class:`DemoError` with the tracebacks of the processes that failed; the others are ended.
    """
    with TemporaryDirectory(prefix="fastpar-demo-") as logs, _quiet_launcher():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="fastpar-demo",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # port 0: any free one, so that demos can run side by side
            local_addr="localhost",  # no name lookup: a laptop's own name often resolves to nothing
            logs_specs=DefaultLogsSpecs(log_dir=logs),  # the default folder would stay behind
            max_restarts=0,  # an error would be the same the second time
            shutdown_timeout=5,
        )
        try:
            outcomes: list[Outcome] | None = elastic_launch(config, work)(job)[0]
        except ChildFailedError as error:
            raise DemoError(_describe(error.failures, ranks)) from error
    assert outcomes is not None, "rank 0 returns the outcomes"
    return outcomes


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Silence the launcher's log of a failure: the raised error carries the same traceback."""
    log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _describe(failures: dict[int, ProcessFailure], ranks: int) -> str:
    """Every failure once: the launcher's "first" one is often a rank that only lost its peer."""
    by_text: dict[str, list[str]] = {}
    for rank, failure in sorted(failures.items()):
        by_text.setdefault(_traceback(failure), []).append(str(rank))
    return "\n".join(f"rank {', '.join(who)} of {ranks} failed:\n{text}" for text, who in by_text.items())


def _traceback(failure: ProcessFailure) -> str:
    """The worker's traceback out of the launcher's error file; a killed process leaves only a message."""
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        return str(message["extraInfo"]["py_callstack"])
    return failure.message
