"""From samples of a probe to rate and RTT: pure functions, so that an estimator can be replaced and tested alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from utils.units import BYTES_PER_MB

GAP_FACTOR = 4.0  # an interval this many times the median one is a pause of the sender, not of the link
MIN_GAP_US = 1_000  # shorter pauses cannot be told from scheduling
MAX_RATE_BYTES_PER_S = 20_000.0 * BYTES_PER_MB  # faster than a memory copy: too few samples to tell


class LinkSource(StrEnum):
    """Where an estimate comes from."""

    PROBE = "measured"
    TRANSFERS = "transfers"  # of real tensors
    LAST = "last value"
    GIVEN = "given"


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """The uplink as the edge sees it."""

    rate_bytes_per_s: float
    rtt_ms: float
    source: LinkSource = LinkSource.PROBE
    age_s: float = 0.0
    queue_ms: float = 0.0  # what a task waits in the cloud behind it, of late


@dataclass(frozen=True, slots=True)
class Echo:
    """What pings tell: the round trip, and what a task waits in the cloud of late."""

    rtt_ms: float
    queue_ms: float


@dataclass(frozen=True, slots=True)
class Burst:
    """The part of a probe in which bytes arrived without pause."""

    size_bytes: int
    duration_us: int
    paused: bool = False  # the sender made pauses, which are not part of the burst

    @property
    def rate_bytes_per_s(self) -> float:
        """Rate of the burst, capped where the clock is too coarse to tell."""
        return _rate_bytes_per_s(self.size_bytes, self.duration_us)


def gap_free_burst(times_us: Sequence[int], sizes_bytes: Sequence[int]) -> Burst:
    """Return bytes and time of a probe without the pauses of its sender.

    TCP's slow start sends a window and waits a round trip, so bytes / time reads low on long links (Neurosurgeon's
    monitor: up to -96 %). Within a window the bytes arrive at the rate of the link.

    Args: times_us: arrival times, (n,), ascending. sizes_bytes: bytes that each arrival brought, (n,).
    """
    durations_us = [after - before for before, after in itertools.pairwise(times_us)]
    intervals = list(zip(durations_us, sizes_bytes[1:], strict=True))
    if not intervals:
        return Burst(sum(sizes_bytes), 0)
    pause_us = max(GAP_FACTOR * statistics.median(durations_us), MIN_GAP_US)
    kept = [(duration, size) for duration, size in intervals if duration <= pause_us]
    return Burst(
        size_bytes=sum(size for _, size in kept),
        duration_us=sum(duration for duration, _ in kept),
        paused=len(kept) < len(intervals),
    )


def probe_rate_bytes_per_s(burst: Burst, size_bytes: int, elapsed_ms: float, rtt_ms: float) -> float:
    """Return the rate that a probe tells of.

    Without pauses the sender's view bounds the receiver's: a reader that wakes late finds the bytes in its kernel
    and reads them at the speed of a memory copy.

    Args: size_bytes, elapsed_ms: the probe's length, and the time from its first byte to the server's answer.
    """
    if burst.paused:
        return burst.rate_bytes_per_s
    return min(burst.rate_bytes_per_s, _rate_bytes_per_s(size_bytes, round((elapsed_ms - rtt_ms) * 1_000)))


def _rate_bytes_per_s(size_bytes: int, duration_us: int) -> float:
    return min(size_bytes * 1e6 / max(duration_us, 1), MAX_RATE_BYTES_PER_S)


def round_trip_ms(samples_ms: Sequence[float]) -> float:
    """Return the RTT (ms) from a few exchanges; the median forgives a slow one."""
    return statistics.median(samples_ms)
