"""Processes of this machine that run one function as ranks of a world, and their errors brought home as one.

They are started with torch's own launcher. What the ranks return and raise is theirs; that a rank which fails ends the
others, and that its error is said once and not once per rank, is done here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastpar.core.errors import AgreementError, FastparError
from fastpar.core.quiet import LAUNCHER, OPERATORS, quiet

TIMEOUT = timedelta(minutes=5)
"""A rank that hangs must end the run with an error and not stay for gloo's half hour."""

_SHUTDOWN: dict[str, Any] = {"shutdown_timeout": 5} if "shutdown_timeout" in LaunchConfig.__annotations__ else {}
"""Seconds that the others have to end, where torch has the setting (2.11 has not)."""

J = TypeVar("J")
R = TypeVar("R")


class LaunchError(FastparError, RuntimeError):
    """A process that was started failed; the message says which and why."""


class _Told(Exception):
    """An error that a user can cause, on its way to the process that launched: its message is all there is to say."""


class _Disagreed(_Told):
    """One that says of another rank that something is wrong."""


def launch(work: Callable[[J], R | None], job: J, ranks: int, debug: bool = False) -> R:
    """Run ``work(job)`` on ``ranks`` new processes and return what rank 0's gives.

    Both travel by pickle. Raises :class:`LaunchError`: with the message where a process raised one of fastpar's own
    errors (with ``debug`` as for all others), else with the tracebacks of those that failed. The others are ended.
    """
    with TemporaryDirectory(prefix="fastpar-") as logs, quiet(*LAUNCHER):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="fastpar",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # port 0: any free one, so that runs can go on side by side
            local_addr="localhost",  # no name lookup: a laptop's own name often resolves to nothing
            logs_specs=DefaultLogsSpecs(log_dir=logs),  # the default folder would stay behind
            max_restarts=0,  # an error would be the same the second time
            **_SHUTDOWN,
        )
        try:
            result: R | None = elastic_launch(config, _telling)(work, job, debug)[0]
        except ChildFailedError as error:
            raise LaunchError(describe(error.failures, ranks)) from error
        except SignalException as error:  # the launcher's own word for Ctrl-C; by now it has ended the processes
            raise (KeyboardInterrupt if error.sigval == signal.SIGINT else SystemExit(128 + error.sigval)) from None
    assert result is not None, "rank 0 returns the result"
    return result


@contextmanager
def joined(device: str = "cpu", timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """This process as a rank of the world that its launcher has said; gives the device that is the rank's own.

    ``device`` is ``cpu`` (gloo) or ``cuda`` (NCCL, and gloo for what is on the host). No rank leaves the world while
    another one still reads from it.
    """
    # Before there is a group: a module that this imports keeps the world's of that moment as a default argument, for
    # ever, and threads of gloo's outlive the interpreter (``groups``).
    import torch._dynamo

    own = torch.device(device)
    if device == "cuda":
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timeout)
    try:
        yield own
        dist.barrier()
    finally:
        dist.destroy_process_group()


def own_error(error: BaseException) -> FastparError | None:
    """The error of fastpar's own that ``error`` is, or was made from: Dynamo wraps those of its backends."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, FastparError):
        seen = getattr(seen, "inner_exception", None) or seen.__cause__
    return seen


def _telling(work: Callable[[J], R], job: J, debug: bool) -> R:
    """``work(job)``, with errors of fastpar's own as what the launcher can tell from bugs."""
    try:
        with quiet(*([] if debug else [OPERATORS])):
            return work(job)
    except Exception as error:
        own = own_error(error)
        if own is None or debug:
            raise
        raise (_Disagreed if isinstance(own, AgreementError) else _Told)(str(own)) from None


def describe(failures: dict[int, ProcessFailure], ranks: int) -> str:
    """Every failure once: the launcher's "first" one is often a rank that only lost its peer.

    Where a rank said what is wrong, those that did not agree with it, or lost it, have nothing to add.
    """
    by_text: dict[tuple[str, str], list[str]] = {}
    for rank, failure in sorted(failures.items()):
        by_text.setdefault(_said(failure), []).append(str(rank))
    told = {key: who for key, who in by_text.items() if key[0] == _Told.__name__}
    return "\n".join(
        f"rank{'s' * (len(who) > 1)} {', '.join(who)} of {ranks} {said}" for (_, said), who in (told or by_text).items()
    )


def _said(failure: ProcessFailure) -> tuple[str, str]:
    """Which kind of error was told, if one was, and what to say: its message, else the worker's traceback out of the
    launcher's error file, and where there is none how the process ended."""
    message: Any = failure.error_file_data.get("message")
    if not isinstance(message, dict):
        how = f"status {failure.exitcode}" if failure.exitcode >= 0 else failure.signal_name()
        hint = ": often for want of memory" if how == "SIGKILL" else ""
        return "", f"ended with {how}, without a word{hint}"
    kind, _, text = str(message.get("message", "")).partition(": ")
    if kind in (_Told.__name__, _Disagreed.__name__):
        return kind, f"failed: {text}"
    return "", f"failed:\n{message['extraInfo']['py_callstack']}"
