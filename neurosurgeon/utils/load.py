"""How loaded a cloud is: what tasks waited and took of late. Pure: every method is told the time."""

from __future__ import annotations

import math
from typing import NamedTuple

TIME_CONSTANT_MS = 1000.0  # what is this old counts e times less; an edge plans on what was a second ago


class Load(NamedTuple):
    """What a task has to expect, ms."""

    queue_ms: float
    service_ms: float


class LoadMeter:
    """Takes in when tasks start and end; a task counts e times less with every time constant that passes.

    While nothing runs, the wait decays: whoever comes next finds no queue.
    """

    def __init__(self, time_constant_ms: float = TIME_CONSTANT_MS) -> None:
        self._time_constant_ms = time_constant_ms
        self._queue_sum = self._service_sum = self._weight = 0.0
        self._running = 0
        self._last_ms = -math.inf  # when the last task ended

    def started(self, count: int = 1) -> None:
        """So many tasks begin."""
        self._running += count

    def ended(self, queue_ms: float, service_ms: float, time_ms: float) -> None:
        """A task is done that waited and took so long; times do not run backwards."""
        kept = math.exp(min(0.0, self._last_ms - time_ms) / self._time_constant_ms)
        self._queue_sum = kept * self._queue_sum + queue_ms
        self._service_sum = kept * self._service_sum + service_ms
        self._weight = kept * self._weight + 1.0
        self._running -= 1
        self._last_ms = max(time_ms, self._last_ms)

    def load(self, time_ms: float) -> Load:
        """Return the load at that time."""
        if not self._weight:
            return Load(0.0, 0.0)
        idle_ms = 0.0 if self._running else max(0.0, time_ms - self._last_ms)
        waits = math.exp(-idle_ms / self._time_constant_ms)
        return Load(waits * self._queue_sum / self._weight, self._service_sum / self._weight)


class CloudLoad(NamedTuple):
    """What tasks wait and take in the cloud that this service belongs to, ms."""

    queue_ms: float = 0.0
    service_ms: float = 0.0

    def line(self) -> str:
        """Return the line with which the cloud tells it to its bandwidth service."""
        return f"load {self.queue_ms:.3f} {self.service_ms:.3f}"

    @classmethod
    def of_line(cls, line: str) -> CloudLoad | None:
        """Return what a line tells; None where it tells no load."""
        word, *numbers = line.split()[:4] or [""]
        try:
            load = cls(*map(float, numbers))
        except (TypeError, ValueError):
            return None
        sensible = len(numbers) == 2 and all(0 <= value < math.inf for value in load)
        return load if word == "load" and sensible else None
