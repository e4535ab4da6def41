"""The GPU side of capturing: one stream and one pool per device, and a watch over replays."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Cuda:
    """``Device`` on a real GPU. ``late(what, seconds)`` is called, from a thread, where a replay does not end."""

    def __init__(self, device: torch.device, watch: Watch | None = None) -> None:
        self.device, self.watch = device, watch
        self.stream, self.pool = _shared(device)

    def aside(self, run: Callable[[], Sequence[Any]], reads: Sequence[torch.Tensor]) -> Sequence[Any]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = run()
        current.wait_stream(self.stream)
        # memory of one stream that the other uses must not be given away before that use has ended
        for tensor in reads:
            if tensor.is_cuda:
                tensor.record_stream(self.stream)
        for tensor in results:
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.record_stream(current)
        return results

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Callable[[], None], Sequence[Any]]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile (NCCL's watchdog asks for events) must not end the capture
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = run()
        return graph.replay, results

    def launched(self, what: str) -> None:
        if self.watch is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.watch.add(event, what)


_made: dict[torch.device, tuple[Any, Any]] = {}


def _shared(device: torch.device) -> tuple[Any, Any]:
    if device not in _made:
        with torch.cuda.device(device):
            _made[device] = (torch.cuda.Stream(device), torch.cuda.graph_pool_handle())
    return _made[device]


class Watch:
    """Looks after events that must come: no watchdog of NCCL sees the collectives of a captured graph.

    ``late(what, seconds)`` is called once where ``limit`` seconds pass in which the next event in line does not come.
    Steps may queue up for long; the limit is for each of them, from the end of the one before.
    """

    def __init__(self, limit: float, late: Callable[[str, float], None], pause: float = 0.5) -> None:
        self.limit, self.late, self.pause = limit, late, pause
        self._line: deque[tuple[Any, str]] = deque()
        self._since = 0.0
        self._guard = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, event: Any, what: str) -> None:
        """Put an event (``query() -> bool``) at the end of the line."""
        with self._guard:
            if not self._line:
                self._since = time.monotonic()
            self._line.append((event, what))
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="fastpar-watch", daemon=True)
                self._thread.start()
            self._guard.notify()

    def _look(self) -> None:
        while True:
            with self._guard:
                while not self._line:
                    self._guard.wait()
                while self._line and self._line[0][0].query():
                    self._line.popleft()
                    self._since = time.monotonic()
                late = self._line[0][1] if self._line and time.monotonic() - self._since > self.limit else None
                if late is not None:
                    self._line.clear()
            if late is not None:
                self.late(late, self.limit)
            time.sleep(self.pause)
