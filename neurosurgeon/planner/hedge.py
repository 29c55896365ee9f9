"""A task that is stuck on its way: when it pays to compute the rest of it here, while the cloud may still answer.

A request is hedged when its answer is overdue, and the first answer wins (Dean and Barroso, The Tail at Scale, 2013).
Bytes tell earlier than answers: while fewer move than should, the answer is overdue before its time has come. And the
other way round: when to leave a task to the cloud that the edge computes, because the link is back.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from neurosurgeon.planner.transfer import SEGMENT_BYTES
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

WINDOW_MS, WINDOW_RTTS = 50.0, 2.0  # how long bytes are watched before they tell a rate; radios pause for less
MAX_ACK_MS = 300.0  # an acknowledgement that takes longer does not come from afar: the link is stuck
LATE_MS, LATE_SHARE = 100.0, 0.5  # of the prediction: an answer that is expected no later is none to worry about
GAIN = 1.25  # by so much the other way must be sooner: it may be in vain
MAX_PATIENCE = 8.0


def is_clearly_sooner(other_ms: float, left_ms: float) -> bool:
    """Return whether to drop what the edge computes for a task, because the cloud would be sooner after all.

    Args: other_ms: what the other way takes. left_ms: what this one still takes.
    """
    return left_ms > max(GAIN * other_ms, other_ms + LATE_MS)


class Moved(NamedTuple):
    """Bytes, and how long they took."""

    size_bytes: int
    took_ms: float

    @property
    def rate_bytes_per_s(self) -> float:
        """How fast that was."""
        return self.size_bytes / self.took_ms * MS_PER_S


class Seen(NamedTuple):
    """A look at a connection."""

    time_ms: float
    acked_bytes: int
    end_bytes: int  # acknowledged, when all is that was sent, or waited to be


class OnItsWay(NamedTuple):
    """A task that was given to the cloud, and has no answer yet."""

    waited_ms: float
    predicted_ms: float  # for its answer, with all waits that were known
    left_bytes: int = 0  # until its last one is acknowledged, with those before it
    moved: Moved | None = None  # of the bytes on this way, of late; None: not known
    still_ms: float = 0.0  # for how long nothing has moved

    @property
    def left_ms(self) -> float:
        """For how much longer it is stuck: its bytes at their newest rate; a silence lasts as long as it did so far."""
        crossing_ms = s_to_ms(self.left_bytes / self.moved.rate_bytes_per_s) if self.moved else 0.0
        return max(crossing_ms, min(self.waited_ms - self.predicted_ms, self.still_ms), 0.0)


class Hedging:
    """Watches one connection, and decides which of its tasks are stuck; whoever shares it holds a lock.

    Acknowledged is not arrived where a relay is on the way: the rate of late is an upper bound. Every hedge in vain
    makes it more patient.
    """

    def __init__(self) -> None:
        self._seen: deque[Seen] = deque()  # while some byte waited from the first to the last
        self._acked_bytes = -1
        self._moved_ms = 0.0
        self._asked_ms: float | None = None  # when bytes were sent of which nothing has been heard yet
        self._ack_ms = 0.0  # how long the first bytes of the last tensor took to be acknowledged
        self._window_ms = WINDOW_MS
        self._patience = 1.0

    def saw(self, time_ms: float, acked_bytes: int, left_bytes: int, rtt_ms: float) -> None:
        """Take in what is acknowledged of the connection's bytes, and what is sent, or waits to be, and is not."""
        if acked_bytes < self._acked_bytes:  # another connection
            self._seen.clear()
        if acked_bytes != self._acked_bytes:
            self._moved_ms = time_ms
            if self._asked_ms is not None:
                self._ack_ms = min(time_ms - self._asked_ms, MAX_ACK_MS)
            self._asked_ms = None
        self._acked_bytes = acked_bytes
        rtt_ms = max(rtt_ms, self._ack_ms)
        self._window_ms = self._patience * max(WINDOW_MS, WINDOW_RTTS * rtt_ms)
        while self._seen and self._seen[0].end_bytes <= acked_bytes:
            self._seen.popleft()
        if left_bytes and not self._seen:  # of the first bytes nothing is heard for a round trip
            self._asked_ms = time_ms
            self._seen.append(Seen(time_ms + rtt_ms, acked_bytes, acked_bytes + left_bytes))
        elif left_bytes and time_ms > self._seen[0].time_ms:
            self._seen.append(Seen(time_ms, acked_bytes, acked_bytes + left_bytes))
        while len(self._seen) > 2 and self._seen[1].time_ms <= time_ms - self._window_ms:
            self._seen.popleft()

    def newest(self) -> Moved | None:
        """Return how much moved of late, at most; None where nothing has waited for long enough to tell."""
        if not self._seen:
            return None
        first, last = self._seen[0], self._seen[-1]
        took_ms = last.time_ms - first.time_ms
        if took_ms < self._window_ms:
            return None
        return Moved(last.acked_bytes - first.acked_bytes + SEGMENT_BYTES, took_ms)

    def way(self, time_ms: float, sent_ms: float, predicted_ms: float, left_bytes: int) -> OnItsWay:
        """Return what is known now of a task that was sent at ``sent_ms``."""
        return OnItsWay(time_ms - sent_ms, predicted_ms, left_bytes, self.newest(), time_ms - self._moved_ms)

    def pays(self, way: OnItsWay, here_ms: float) -> bool:
        """Return whether to compute the rest of a task here.

        Args: here_ms: what that takes.
        """
        late_ms = way.waited_ms + way.left_ms - way.predicted_ms
        is_late = late_ms > self._patience * max(LATE_MS, LATE_SHARE * way.predicted_ms)
        return is_late and way.left_ms > self._patience * GAIN * here_ms

    def ended(self, *, was_first: bool) -> None:
        """Take in whether the edge had the answer first."""
        self._patience = max(self._patience / 2, 1.0) if was_first else min(self._patience * 2, MAX_PATIENCE)
