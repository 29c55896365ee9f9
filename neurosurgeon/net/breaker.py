"""A circuit breaker: when to look for a lost cloud again, and how carefully to use it when it is back. Pure.

    closed ──lost──▶ open ──reached──▶ half open ──answered──▶ closed
                      ▲                    │
                      └────────lost────────┘

Closed: tasks go to the cloud. Open: none do; it is looked for after pauses that grow. Half open: it can be reached
again, and gets one task at a time until it has answered one.
"""

from __future__ import annotations

from enum import Enum, auto

FIRST_PAUSE_MS, LONGEST_PAUSE_MS = 100.0, 2_000.0  # each twice the last; the first attempt of all is made at once


class BreakerState(Enum):
    """What is known of the cloud."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


class Breaker:
    """Starts closed; every method is told the time (`now_ms`). Whoever shares it holds a lock."""

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self._failures = 0  # since the last answer
        self._next_ms = 0.0

    def lost(self, time_ms: float) -> None:
        """The connection was lost, or an attempt to open one failed."""
        self.state = BreakerState.OPEN
        doublings = min(self._failures - 1, 16)
        pause_ms = min(FIRST_PAUSE_MS * 2**doublings, LONGEST_PAUSE_MS) if self._failures else 0.0
        self._failures += 1
        self._next_ms = time_ms + pause_ms

    def pause_ms(self, time_ms: float) -> float:
        """Return how long to wait with the next attempt."""
        return max(0.0, self._next_ms - time_ms)

    def reached(self) -> None:
        """There is a connection again."""
        self.state = BreakerState.HALF_OPEN

    def answered(self) -> None:
        """The cloud answered a task."""
        self.state = BreakerState.CLOSED
        self._failures = 0

    def admits(self, in_flight: int) -> bool:
        """Return whether a task may go to the cloud while so many are on their way."""
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and not in_flight)
