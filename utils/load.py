"""How loaded a cloud is: what tasks waited and took of late. Pure: every method is told the time."""

from __future__ import annotations

import math
from typing import NamedTuple

TIME_CONSTANT_MS = 1000.0  # what is this old counts e times less; an edge plans on what was a second ago


class Load(NamedTuple):
    """What a task has to expect, ms."""

    queue_ms: float
    service_ms: float


class RecentMean:
    """A mean in which a sample counts e times less with every time constant that passes."""

    def __init__(self, time_constant_ms: float = TIME_CONSTANT_MS) -> None:
        self._time_constant_ms = time_constant_ms
        self._sum, self._weight, self._time_ms = 0.0, 0.0, -math.inf

    def add(self, sample: float, time_ms: float) -> None:
        """Take in a sample of that time; times do not run backwards."""
        kept = math.exp(min(0.0, self._time_ms - time_ms) / self._time_constant_ms)
        self._sum = kept * self._sum + sample
        self._weight = kept * self._weight + 1.0
        self._time_ms = max(time_ms, self._time_ms)

    @property
    def value(self) -> float:
        """The mean; 0 where there is no sample."""
        return self._sum / self._weight if self._weight else 0.0


class LoadMeter:
    """Takes in when tasks start and end. While nothing runs, the wait decays: whoever comes next finds no queue."""

    def __init__(self, time_constant_ms: float = TIME_CONSTANT_MS) -> None:
        self._time_constant_ms = time_constant_ms
        self._queue, self._service = RecentMean(time_constant_ms), RecentMean(time_constant_ms)
        self._running = 0
        self._idle_since_ms = 0.0

    def started(self, count: int = 1) -> None:
        """So many tasks begin."""
        self._running += count

    def ended(self, queue_ms: float, service_ms: float, time_ms: float) -> None:
        """A task is done that waited and took so long."""
        self._queue.add(queue_ms, time_ms)
        self._service.add(service_ms, time_ms)
        self._running -= 1
        self._idle_since_ms = time_ms

    def load(self, time_ms: float) -> Load:
        """Return the load at that time."""
        idle_ms = 0.0 if self._running else max(0.0, time_ms - self._idle_since_ms)
        return Load(self._queue.value * math.exp(-idle_ms / self._time_constant_ms), self._service.value)
