"""The load of a cloud: the recent wait and service time of its tasks. The caller passes the time of each event."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

TIME_CONSTANT_MS = 1000.0  # a task this old has 1 / e of the weight; an edge plans with a load of a second ago


class Load(NamedTuple):
    """The expected wait in the queue and service time of a task, ms."""

    queue_ms: float = 0.0
    service_ms: float = 0.0

    def line(self) -> str:
        """Return the line by which a cloud reports its load to its bandwidth service."""
        return f"load {self.queue_ms:.3f} {self.service_ms:.3f}"

    @classmethod
    def of_line(cls, line: str) -> Load | None:
        """Return the load that a line reports; None if it is no such line."""
        word, *numbers = line.split()[:4] or [""]
        try:
            load = cls(*map(float, numbers))
        except (TypeError, ValueError):
            return None
        is_possible = len(numbers) == 2 and all(0 <= value < math.inf for value in load)
        return load if word == "load" and is_possible else None


class LoadMeter:
    """Average the wait and service time of tasks, with weights that decay exponentially.

    The wait also decays while no task runs: the next task finds an empty queue. Any thread may call it.
    """

    def __init__(self, time_constant_ms: float = TIME_CONSTANT_MS) -> None:
        self._time_constant_ms = time_constant_ms
        self._lock = threading.Lock()  # guards all below
        self._queue_sum = self._service_sum = self._weight = 0.0
        self._running = 0
        self._last_ms = -math.inf  # when the last task ended

    def started(self, count: int = 1) -> None:
        """Record that tasks start to run."""
        with self._lock:
            self._running += count

    def ended(self, queue_ms: float, service_ms: float, time_ms: float) -> None:
        """Record the end of a task at ``time_ms``, with its wait and service time, ms.

        A time before that of the last task, as of another worker, counts as the same.
        """
        with self._lock:
            kept = math.exp(min(0.0, self._last_ms - time_ms) / self._time_constant_ms)
            self._queue_sum = kept * self._queue_sum + queue_ms
            self._service_sum = kept * self._service_sum + service_ms
            self._weight = kept * self._weight + 1.0
            self._running -= 1
            self._last_ms = max(time_ms, self._last_ms)

    def load(self, time_ms: float) -> Load:
        """Return the load at ``time_ms``."""
        with self._lock:
            if not self._weight:
                return Load()
            idle_ms = 0.0 if self._running else max(0.0, time_ms - self._last_ms)
            kept = math.exp(-idle_ms / self._time_constant_ms)
            return Load(kept * self._queue_sum / self._weight, self._service_sum / self._weight)
