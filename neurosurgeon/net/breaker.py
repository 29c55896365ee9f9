"""A circuit breaker: when to reconnect to a cloud, and how many tasks it gets after that. Pure.

    closed ──lost──▶ open ──reached──▶ half open ──answered──▶ closed
                      ▲                    │
                      └────────lost────────┘

Closed: tasks go to the cloud. Open: none do; attempts to reconnect follow after pauses that grow. Half open: it is
reconnected, and gets one task at a time until it has replied to one.
"""

from __future__ import annotations

from enum import Enum, auto

FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 100.0, 2_000.0  # each twice the last; the first attempt follows without a pause


class BreakerState(Enum):
    """The state of the connection to the cloud."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


class Breaker:
    """Starts closed. Has no clock: the caller passes the time (`now_ms`). Not thread-safe: guarded by its owner."""

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self._failures = 0  # since the last reply
        self._next_ms = 0.0

    def lost(self, time_ms: float) -> None:
        """The connection was lost, or an attempt to open one failed."""
        self.state = BreakerState.OPEN
        doublings = min(self._failures - 1, 16)
        pause_ms = min(FIRST_PAUSE_MS * 2**doublings, LONGEST_PAUSE_MS) if self._failures else 0.0
        self._failures += 1
        self._next_ms = time_ms + pause_ms

    def pause_ms(self, time_ms: float) -> float:
        """Return the time until the next attempt."""
        return max(0.0, self._next_ms - time_ms)

    def reached(self) -> None:
        """The cloud is reconnected."""
        self.state = BreakerState.HALF_OPEN

    def answered(self) -> None:
        """The cloud replied to a task."""
        self.state = BreakerState.CLOSED
        self._failures = 0

    def admits(self, in_flight: int) -> bool:
        """Return whether a task may go to the cloud while ``in_flight`` others are in flight."""
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and not in_flight)
