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
    LAST = "last value"
    GIVEN = "given"


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """The uplink as the edge sees it."""

    rate_bytes_per_s: float
    rtt_ms: float
    source: LinkSource = LinkSource.PROBE
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Burst:
    """The part of a probe in which bytes arrived without pause."""

    size_bytes: int
    duration_us: int

    @property
    def rate_bytes_per_s(self) -> float:
        """Rate of the burst, capped where the clock is too coarse to tell."""
        if not self.duration_us:
            return MAX_RATE_BYTES_PER_S
        return min(self.size_bytes * 1e6 / self.duration_us, MAX_RATE_BYTES_PER_S)


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
    pause_us = max(GAP_FACTOR * statistics.median(duration for duration, _ in intervals), MIN_GAP_US)
    kept = [(duration, size) for duration, size in intervals if duration <= pause_us]
    return Burst(sum(size for _, size in kept), sum(duration for duration, _ in kept))


def round_trip_ms(samples_ms: Sequence[float]) -> float:
    """Return the RTT (ms) from a few exchanges; the median forgives a slow one."""
    return statistics.median(samples_ms)
