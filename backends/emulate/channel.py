"""Channels: queues of exchanges of one group on one device, each of which takes the time that it is given.

Exchanges of a channel come one after the other, as on a communicator's stream; channels run beside each other and
beside what computes. On CUDA a channel is a stream of high priority (an exchange begins when it is due, not when some
product leaves a multiprocessor to it), and waiting orders streams, as NCCL's waits do. On the CPU it is a thread that
copies and sleeps, and waiting holds the caller.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastpar.backends.emulate.spin import Spinner

Move = Callable[[], None]
"""Writes what an exchange brings."""


class ThreadWork(dist.Work):
    """One exchange of a CPU channel."""

    def __init__(self, outputs: Sequence[torch.Tensor], patience: float) -> None:
        super().__init__()
        self.outputs, self.patience = list(outputs), patience
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._future: torch.futures.Future[Any] = torch.futures.Future()

    def finish(self, error: BaseException | None) -> None:
        self.error = error
        if error is None:
            self._future.set_result(self.outputs)
        else:
            self._future.set_exception(error)
        self.done.set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Hold the caller until the exchange is over. Raises RuntimeError after ``timeout``, by default the group's."""
        seconds = (timeout.total_seconds() if timeout else 0) or self.patience
        if not self.done.wait(seconds):
            raise RuntimeError(f"an emulated exchange was not over within {seconds:g} s, or its process group is gone")
        if self.error is not None:
            raise self.error
        return True

    def is_completed(self) -> bool:
        return self.done.is_set()

    def is_success(self) -> bool:
        return self.done.is_set() and self.error is None

    def exception(self) -> BaseException | None:
        return self.error

    def result(self) -> list[torch.Tensor]:
        return self.outputs

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future


class ThreadChannel:
    """Exchanges of CPU tensors: a daemon thread that copies, then sleeps until the exchange is over."""

    def __init__(self, name: str, patience: float) -> None:
        self.patience = patience
        self._queue: queue.SimpleQueue[tuple[float, float, Move, ThreadWork] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        _threads.add(self)

    def occupy(self, seconds: float, move: Move, outputs: Sequence[torch.Tensor], held: Sequence[Any]) -> ThreadWork:
        """Start an exchange of so many seconds. ``move`` keeps what it reads and writes alive by itself."""
        if self._closed.is_set():
            raise RuntimeError("the emulated process group has been destroyed")
        work = ThreadWork(outputs, self.patience)
        self._queue.put((time.monotonic(), seconds, move, work))
        return work

    def _run(self) -> None:
        free = 0.0  # when the last exchange was over; by the plan, so that late wake-ups do not add up
        while (item := self._queue.get()) is not None:
            asked, seconds, move, work = item
            free = max(asked, free) + seconds
            error: BaseException | None = None
            try:
                with torch.inference_mode():  # outputs may be inference tensors, whatever thread made them
                    move()
            except Exception as raised:  # belongs to whoever waits
                error = raised
            while (left := free - time.monotonic()) > 0 and not self._closed.wait(left):
                pass
            work.finish(error)
            del item, move, work  # not alive until the next exchange comes

    def close(self) -> None:
        """No further exchanges; those begun are over as soon as they have copied."""
        self._closed.set()
        self._queue.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the thread's end, at most so long."""
        self._thread.join(seconds)


_threads: weakref.WeakSet[ThreadChannel] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """A thread that copies while the interpreter goes away would abort the process."""
    channels = list(_threads)
    for channel in channels:
        channel.close()
    for channel in channels:
        channel.join(10)


class StreamWork(dist.Work):
    """One exchange of a CUDA channel. ``host``: waiting also holds the caller, as a barrier does."""

    def __init__(self, stream: torch.cuda.Stream, outputs: Sequence[torch.Tensor], held: Sequence[Any], host: bool):
        super().__init__()
        self.stream, self.outputs, self.held, self.host = stream, list(outputs), list(held), host
        self.done = torch.cuda.Event()
        self.done.record(stream)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Make the current stream wait for the exchange; the caller goes on."""
        torch.cuda.current_stream(self.stream.device).wait_event(self.done)
        if self.host:
            self.done.synchronize()
        self.held = []
        return True

    def is_completed(self) -> bool:
        return self.done.query()

    def is_success(self) -> bool:
        return self.done.query()

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return self.outputs

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future(devices=[self.stream.device])
        with torch.cuda.stream(self.stream):
            future.set_result(self.outputs)
        return future

    def __del__(self) -> None:
        for tensor in self.held:  # nobody waited, so the allocator has to
            tensor.record_stream(self.stream)


class StreamChannel:
    """Exchanges of tensors on one GPU: a side stream that copies, then spins until the exchange is over."""

    def __init__(self, device: torch.device, spinner: Spinner) -> None:
        self.device, self.spinner = device, spinner
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.began = torch.zeros(1, dtype=torch.int64, device=device)
        self._closed = False

    def occupy(
        self, seconds: float, move: Move, outputs: Sequence[torch.Tensor], held: Sequence[Any], host: bool = False
    ) -> StreamWork:
        """Start an exchange of so many seconds behind what the current stream has to do.

        ``held`` are the tensors that ``move`` reads and writes: they are kept until somebody waits.
        """
        if self._closed:
            raise RuntimeError("the emulated process group has been destroyed")
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), torch.inference_mode():
            if seconds:
                self.spinner.mark(self.began)
            move()
            if seconds:
                self.spinner.spin(self.began, seconds)
            return StreamWork(self.stream, outputs, held, host)

    def close(self) -> None:
        """No further exchanges; those begun are finished."""
        self._closed = True
