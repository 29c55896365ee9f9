"""From samples of a probe to rate and RTT: pure functions, so that an estimator can be replaced and tested alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neurosurgeon.utils.link import DEFAULT_ERROR
from neurosurgeon.utils.units import BYTES_PER_MB, s_to_ms

GAP_FACTOR = 4.0  # an interval this many times the median one is a pause of the sender, not of the link
MIN_GAP_US = 1_000  # a shorter pause may be one of the scheduler
MAX_RATE_BYTES_PER_S = 20_000.0 * BYTES_PER_MB  # faster than a memory copy: not measured
NORMAL_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
SMALLEST_ERROR = 0.01  # clocks, and links that are never quite steady
PING_BYTES = 512 + 52  # the head of a frame, and the headers of TCP and IP
MIN_PIECE = 8  # packets; the rate of fewer is mostly jitter
PIECES = 5  # of each train: their median ignores two that met other traffic, or a pause
BATCH_GAPS, TOGETHER = 3, 0.1  # packets closer than this share of the third widest gap are one batch
BURST_DROP = 0.8  # if the rate falls below this share of the first, the first was the burst of a token bucket

Arrivals = tuple[Sequence[int], Sequence[int]]  # times (us, ascending) and sizes (bytes) of a train's packets, (n,)


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate and its error."""

    bytes_per_s: float
    error: float = DEFAULT_ERROR  # one standard deviation, relative


def less_bytes_ms(took_ms: float, bytes_ms: float) -> float:
    """Return a duration without the time of its bytes, both ms.

    If the bytes alone would have taken longer, they passed at another rate: then it returns the whole duration.
    """
    return took_ms - bytes_ms if bytes_ms < took_ms else took_ms


@dataclass(frozen=True, slots=True)
class Echo:
    """The result of pings: the duration of an exchange, and the recent wait of a task in the cloud."""

    exchange_ms: float
    queue_ms: float

    def rtt_ms(self, up_bytes_per_s: float, down_bytes_per_s: float) -> float:
        """Return the round trip without the bytes of a ping: at 1 Mbit/s these take 9 ms both ways."""
        return less_bytes_ms(self.exchange_ms, s_to_ms(PING_BYTES / up_bytes_per_s + PING_BYTES / down_bytes_per_s))


@dataclass(frozen=True, slots=True)
class Burst:
    """The part of a probe in which bytes arrived without a pause."""

    size_bytes: int
    duration_us: int
    paused: bool = False  # the sender paused, and the pauses are not part of the burst

    @property
    def rate_bytes_per_s(self) -> float:
        """Rate of the burst, at most that which the clock can measure."""
        return _rate_bytes_per_s(self.size_bytes, self.duration_us)


def gap_free_burst(times_us: Sequence[int], sizes_bytes: Sequence[int]) -> Burst:
    """Return the bytes and the time of a probe without the pauses of its sender.

    TCP's slow start sends a window and waits a round trip, so bytes / time reads low on long links (Neurosurgeon's
    monitor: up to -96 %). Within a window the bytes arrive at the rate of the link.

    Args: times_us: arrival times, (n,), ascending. sizes_bytes: bytes of each arrival, (n,).
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
    """Return the rate of a probe.

    Without pauses, the sender's duration bounds the rate: a receiver that wakes up late reads the bytes from its kernel
    at the speed of a memory copy.

    Args: size_bytes, elapsed_ms: the probe's length, and the time from its first byte to the service's reply.
    """
    if burst.paused:
        return burst.rate_bytes_per_s
    return min(burst.rate_bytes_per_s, _rate_bytes_per_s(size_bytes, round((elapsed_ms - rtt_ms) * 1_000)))


def train_rate(trains: Sequence[Arrivals]) -> Rate | None:
    """Return the rate at which trains of packets left the link's bottleneck, or None if too few arrived.

    Packets that wait in one queue leave it at the link's rate (packet trains: Jain and Routhier, 1986). A token bucket
    passes a burst faster: only the packets after the burst count, and a train that it passed whole does not count.
    A batch counts as one packet: a sender's kernel that cuts datagrams late passes many at a time to a bucket.
    """
    steady = [steady_part(in_batches(train)) for train in trains if len(train[0]) > MIN_PIECE]
    if not steady:
        return None
    slowest = min(map(_middle_rate, steady))
    kept = [train for train in steady if _middle_rate(train) * BURST_DROP <= slowest]
    rates = [_rate_of(*piece) for train in kept for piece in _pieces(train)]
    middle = statistics.median(rates)
    deviation = statistics.median(abs(rate - middle) for rate in rates) / middle if len(rates) > 1 else DEFAULT_ERROR
    return Rate(middle, max(SMALLEST_ERROR, NORMAL_MAD * deviation / math.sqrt(len(rates))))


def in_batches(train: Arrivals) -> Arrivals:
    """Return a train with each batch of packets as one packet, at the arrival of its last one.

    The first batch did not wait in full, and is left out. A train with only one or two pauses is returned unchanged.
    """
    times_us, sizes_bytes = train
    gaps_us = sorted(after - before for before, after in itertools.pairwise(times_us))
    together_us = TOGETHER * gaps_us[-min(BATCH_GAPS, len(gaps_us))]
    times, sizes = [times_us[0]], [sizes_bytes[0]]
    for (before, time), size in zip(itertools.pairwise(times_us), sizes_bytes[1:], strict=True):
        if time - before < together_us:
            times[-1], sizes[-1] = time, sizes[-1] + size
        else:
            times.append(time)
            sizes.append(size)
    return (times[1:], sizes[1:]) if 2 < len(times) < len(times_us) else train


def steady_part(train: Arrivals) -> Arrivals:
    """Return a train without the burst that a token bucket passed first.

    The knee is the packet at which the train is furthest ahead of an even flow. After a burst every packet is slower:
    the whole part and the median gap. If only the whole part is, there was a pause, and the train is unchanged.
    """
    times_us, sizes_bytes = train
    arrived_bytes = list(itertools.accumulate(sizes_bytes))
    span_us = max(times_us[-1] - times_us[0], 1)
    even = (arrived_bytes[-1] - arrived_bytes[0]) / span_us
    ahead_bytes = [arrived - even * (time - times_us[0]) for arrived, time in zip(arrived_bytes, times_us, strict=True)]
    knee = max(range(1, len(times_us)), key=ahead_bytes.__getitem__)
    before, after = (times_us[: knee + 1], sizes_bytes[: knee + 1]), (times_us[knee + 1 :], sizes_bytes[knee + 1 :])
    if len(after[0]) <= MIN_PIECE:
        return train
    return after if all(rate(*after) < BURST_DROP * rate(*before) for rate in (_rate_of, _rate_of_gaps)) else train


def _pieces(train: Arrivals) -> Iterator[Arrivals]:
    """Yield parts of a train that share their ends: the first packet of each gives only its time."""
    times_us, sizes_bytes = train
    gaps = len(times_us) - 1
    count = max(1, min(PIECES, gaps // MIN_PIECE))
    ends = [round(index * gaps / count) for index in range(count + 1)]
    for start, end in itertools.pairwise(ends):
        yield times_us[start : end + 1], sizes_bytes[start : end + 1]


def _middle_rate(train: Arrivals) -> float:
    return statistics.median(_rate_of(*piece) for piece in _pieces(train))


def _rate_of_gaps(times_us: Sequence[int], sizes_bytes: Sequence[int]) -> float:
    gaps = zip(itertools.pairwise(times_us), sizes_bytes[1:], strict=True)
    return statistics.median(_rate_bytes_per_s(size, after - before) for (before, after), size in gaps)


def _rate_of(times_us: Sequence[int], sizes_bytes: Sequence[int]) -> float:
    return _rate_bytes_per_s(sum(sizes_bytes[1:]), times_us[-1] - times_us[0])


def _rate_bytes_per_s(size_bytes: int, duration_us: int) -> float:
    return min(size_bytes * 1e6 / max(duration_us, 1), MAX_RATE_BYTES_PER_S)
