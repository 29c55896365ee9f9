"""Hedging of a task whose upload has stalled: when the edge computes the rest, although the cloud may still reply.

A request is hedged when its reply is overdue, and the first reply wins (Dean and Barroso, The Tail at Scale, 2013).
Acknowledged bytes show a stall before the reply is overdue: as long as fewer move than predicted, it will be late. The
opposite decision is here, too: when a task that the edge computes is faster in the cloud, because the link recovered.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from neurosurgeon.planner.transfer import SEGMENT_BYTES
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

WINDOW_MS, WINDOW_RTTS = 50.0, 2.0  # the time over which a rate is measured; radios pause for less
MAX_ACK_MS = 300.0  # an acknowledgement that takes longer does not mean a distant cloud: the link has stalled
LATE_MS, LATE_SHARE = 100.0, 0.5  # tolerated delay of a reply: in ms, and as a share of its predicted time
GAIN = 1.25  # by this factor the alternative must be faster, because it may be in vain
MAX_TIMEOUT_FACTOR = 8.0


def is_clearly_sooner(other_ms: float, left_ms: float) -> bool:
    """Return whether to stop computing a task on the edge, because sending it to the cloud is clearly faster.

    Args: other_ms: the time until the cloud's reply, if the task is sent now.
          left_ms: the time that the edge still needs.
    """
    return left_ms > max(GAIN * other_ms, other_ms + LATE_MS)


class RecentTransfer(NamedTuple):
    """Bytes that were acknowledged recently, and the time this took."""

    size_bytes: int
    duration_ms: float

    @property
    def rate_bytes_per_s(self) -> float:
        """Their rate."""
        return self.size_bytes / self.duration_ms * MS_PER_S


class AckSample(NamedTuple):
    """The acknowledged bytes of a connection at one time."""

    time_ms: float
    acked_bytes: int
    end_bytes: int  # the value of acked_bytes once all queued bytes are acknowledged


class TransferProgress(NamedTuple):
    """A task that was sent to the cloud and has no reply yet."""

    waited_ms: float
    predicted_ms: float  # until its reply, with all waits that were known when it was sent
    left_bytes: int = 0  # not yet acknowledged, of the task and of all that is sent before it
    recent: RecentTransfer | None = None  # None: no rate was measured recently
    stalled_ms: float = 0.0  # since bytes were last acknowledged

    @property
    def left_ms(self) -> float:
        """The expected time until its bytes are sent, at their recent rate.

        A stall is expected to last as long again, but no longer than the task is overdue.
        """
        sending_ms = s_to_ms(self.left_bytes / self.recent.rate_bytes_per_s) if self.recent else 0.0
        return max(sending_ms, min(self.waited_ms - self.predicted_ms, self.stalled_ms), 0.0)


class Hedging:
    """Watches the acknowledgements of one connection, and decides which of its tasks to hedge.

    Guarded by a lock of its owner, if several threads share it. A relay on the way may acknowledge bytes that have not
    arrived, so the recent rate is an upper bound. Each hedge in vain doubles all timeouts.
    """

    def __init__(self) -> None:
        self._samples: deque[AckSample] = deque()  # of the time in which bytes have been waiting without a break
        self._acked_bytes = -1
        self._last_ack_ms = 0.0
        self._unacked_since_ms: float | None = None  # when bytes were sent that are not acknowledged at all yet
        self._ack_delay_ms = 0.0  # time to acknowledge the first bytes of the last tensor
        self._window_ms = WINDOW_MS
        self._timeout_factor = 1.0

    def record_progress(self, time_ms: float, acked_bytes: int, left_bytes: int, rtt_ms: float) -> None:
        """Record the state of the connection at one time.

        Args: acked_bytes: acknowledged since the connection began. left_bytes: queued or sent, and not acknowledged.
        """
        if acked_bytes < self._acked_bytes:  # this is another connection
            self._samples.clear()
        if acked_bytes != self._acked_bytes:
            self._last_ack_ms = time_ms
            if self._unacked_since_ms is not None:
                self._ack_delay_ms = min(time_ms - self._unacked_since_ms, MAX_ACK_MS)
            self._unacked_since_ms = None
        self._acked_bytes = acked_bytes
        rtt_ms = max(rtt_ms, self._ack_delay_ms)
        self._window_ms = self._timeout_factor * max(WINDOW_MS, WINDOW_RTTS * rtt_ms)
        while self._samples and self._samples[0].end_bytes <= acked_bytes:
            self._samples.popleft()
        if left_bytes and not self._samples:  # the first bytes are acknowledged after a round trip
            self._unacked_since_ms = time_ms
            self._samples.append(AckSample(time_ms + rtt_ms, acked_bytes, acked_bytes + left_bytes))
        elif left_bytes and time_ms > self._samples[0].time_ms:
            self._samples.append(AckSample(time_ms, acked_bytes, acked_bytes + left_bytes))
        while len(self._samples) > 2 and self._samples[1].time_ms <= time_ms - self._window_ms:
            self._samples.popleft()

    def recent_transfer(self) -> RecentTransfer | None:
        """Return an upper bound of the recently moved bytes; None if bytes have waited for less than the window."""
        if not self._samples:
            return None
        first, last = self._samples[0], self._samples[-1]
        duration_ms = last.time_ms - first.time_ms
        if duration_ms < self._window_ms:
            return None
        return RecentTransfer(last.acked_bytes - first.acked_bytes + SEGMENT_BYTES, duration_ms)

    def progress_of(self, time_ms: float, sent_ms: float, predicted_ms: float, left_bytes: int) -> TransferProgress:
        """Return the progress of a task that was sent at ``sent_ms``."""
        return TransferProgress(
            time_ms - sent_ms, predicted_ms, left_bytes, self.recent_transfer(), time_ms - self._last_ack_ms
        )

    def should_hedge(self, progress: TransferProgress, edge_ms: float) -> bool:
        """Return whether to compute the rest of a task on the edge, too.

        Args: edge_ms: the time that this takes.
        """
        late_ms = progress.waited_ms + progress.left_ms - progress.predicted_ms
        is_late = late_ms > self._timeout_factor * max(LATE_MS, LATE_SHARE * progress.predicted_ms)
        return is_late and progress.left_ms > self._timeout_factor * GAIN * edge_ms

    def record_outcome(self, *, was_first: bool) -> None:
        """Record whether the edge finished a hedged task before the cloud's reply, and adapt the timeouts."""
        factor = self._timeout_factor / 2 if was_first else self._timeout_factor * 2
        self._timeout_factor = min(max(factor, 1.0), MAX_TIMEOUT_FACTOR)
