"""The estimator on synthetic probes: pauses of the sender do not count, and no input makes it divide by zero."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.net.bandwidth import (
    MAX_RATE_BYTES_PER_S,
    MIN_GAP_US,
    MIN_PIECE,
    SMALLEST_ERROR,
    Burst,
    Echo,
    gap_free_burst,
    probe_rate_bytes_per_s,
    train_rate,
)
from neurosurgeon.utils.link import LinkEstimate, LinkSource

SEGMENT = 1_250  # bytes; one in 100 us is 12.5 MB/s, a link of 100 Mbit/s
SPACING_US = 100
RATE = 12_500_000.0

samples = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6)), min_size=1, max_size=50)


def windows(count: int, segments: int, pause_us: int) -> tuple[list[int], list[int]]:
    """Return arrivals of ``count`` windows of segments at link rate, with a pause of the sender between them."""
    times_us, now_us = [], 0
    for _ in range(count):
        for _ in range(segments):
            times_us.append(now_us)
            now_us += SPACING_US
        now_us += pause_us
    return times_us, [SEGMENT] * len(times_us)


def test_a_steady_probe_has_the_link_rate() -> None:
    assert gap_free_burst(*windows(1, 100, 0)).rate_bytes_per_s == pytest.approx(RATE)


@pytest.mark.parametrize("rtt_ms", [2, 20, 200])
def test_the_pauses_of_slow_start_do_not_lower_the_rate(rtt_ms: int) -> None:
    times_us, sizes_bytes = windows(5, 20, rtt_ms * 1_000)
    assert gap_free_burst(times_us, sizes_bytes).rate_bytes_per_s == pytest.approx(RATE)
    naive = sum(sizes_bytes) * 1e6 / times_us[-1]
    assert naive < RATE / 1.5  # the reason for the estimator


def test_a_window_that_doubles_has_the_link_rate() -> None:
    times_us: list[int] = []
    now_us = 0
    for window in (10, 20, 40, 80):
        times_us += range(now_us, now_us + window * SPACING_US, SPACING_US)
        now_us = times_us[-1] + 50_000
    assert gap_free_burst(times_us, [SEGMENT] * len(times_us)).rate_bytes_per_s == pytest.approx(RATE)


def test_a_pause_as_short_as_scheduling_counts() -> None:
    burst = gap_free_burst([0, 10, 20, 20 + MIN_GAP_US], [SEGMENT] * 4)
    assert burst == Burst(3 * SEGMENT, 20 + MIN_GAP_US)
    assert gap_free_burst([0, 10, 20, 21 + MIN_GAP_US], [SEGMENT] * 4) == Burst(2 * SEGMENT, 20, paused=True)


def test_a_slow_link_is_no_pause() -> None:
    times_us = list(range(0, 1_000_000, 100_000))  # a segment every tenth of a second
    assert gap_free_burst(times_us, [SEGMENT] * 10).rate_bytes_per_s == pytest.approx(12_500.0)


def test_the_first_arrival_gives_only_its_time() -> None:
    assert gap_free_burst([0, 1_000], [1_000_000, SEGMENT]) == Burst(SEGMENT, 1_000)


@pytest.mark.parametrize("times_us", [[0], [5, 5, 5]], ids=["one arrival", "one tick of the clock"])
def test_a_probe_of_no_duration_has_the_maximum_rate(times_us: list[int]) -> None:
    burst = gap_free_burst(times_us, [16_384] * len(times_us))
    assert burst.duration_us == 0
    assert 1e9 < burst.rate_bytes_per_s <= MAX_RATE_BYTES_PER_S


def test_no_link_is_faster_than_the_cap() -> None:
    assert Burst(10**12, 1).rate_bytes_per_s == MAX_RATE_BYTES_PER_S


@given(samples)
def test_any_probe_gives_a_rate_within_bounds(arrivals: list[tuple[int, int]]) -> None:
    gaps_us, sizes_bytes = zip(*arrivals, strict=True)
    burst = gap_free_burst(list(itertools.accumulate(gaps_us)), sizes_bytes)
    assert 0 < burst.rate_bytes_per_s <= MAX_RATE_BYTES_PER_S
    assert burst.size_bytes <= sum(sizes_bytes)
    assert burst.duration_us <= sum(gaps_us)


@given(samples, st.integers(0, 10**9))
def test_the_origin_of_the_clock_does_not_matter(arrivals: list[tuple[int, int]], origin_us: int) -> None:
    gaps_us, sizes_bytes = zip(*arrivals, strict=True)
    times_us = list(itertools.accumulate(gaps_us))
    assert gap_free_burst([origin_us + time for time in times_us], sizes_bytes) == gap_free_burst(times_us, sizes_bytes)


def test_a_late_reader_does_not_exceed_the_senders_rate() -> None:
    read_at_once = Burst(1_000_000, 100)  # 10 GB/s: out of the kernel's memory
    assert probe_rate_bytes_per_s(read_at_once, 1_000_000, elapsed_ms=85.0, rtt_ms=5.0) == pytest.approx(RATE)


def test_after_pauses_only_the_burst_counts() -> None:
    burst = Burst(1_000_000, 80_000, paused=True)
    assert probe_rate_bytes_per_s(burst, 1_000_000, elapsed_ms=900.0, rtt_ms=100.0) == pytest.approx(RATE)


def test_a_reply_faster_than_the_rtt_leaves_the_burst() -> None:
    assert probe_rate_bytes_per_s(Burst(1_250, 100), 1_250, elapsed_ms=1.0, rtt_ms=2.0) == pytest.approx(RATE)


def test_the_bytes_of_a_ping_are_not_part_of_the_rtt() -> None:
    slow = 125_000.0  # bytes/s: 1 Mbit/s
    assert Echo(29.024, 0.0).rtt_ms(slow, slow) == pytest.approx(20.0)
    assert Echo(1.0, 0.0).rtt_ms(slow, slow) == 1.0  # they passed at another rate
    assert LinkEstimate(slow, 20.0, host_ms=0.5).exchange_ms == 20.5
    assert LinkEstimate(slow, 20.0, host_ms=-0.5).exchange_ms == 20.0


# ---------------------------------------------------------------- trains of packets

PACKET = 1_500
GAP_US = 120  # 12.5 MB/s


def train(packets: int, gap_us: float = GAP_US, start_us: float = 0) -> tuple[list[int], list[int]]:
    """Return a train that left the bottleneck at an even pace."""
    return [round(start_us + gap_us * index) for index in range(packets)], [PACKET] * packets


def joined(*trains: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    return list(itertools.chain(*(times for times, _ in trains))), list(
        itertools.chain(*(sizes for _, sizes in trains))
    )


def test_an_even_train_has_the_link_rate() -> None:
    rate = train_rate([train(20), train(76)])
    assert rate is not None
    assert rate.bytes_per_s == pytest.approx(RATE)
    assert rate.error == SMALLEST_ERROR


def test_lost_packets_do_not_change_the_rate() -> None:
    times_us, sizes_bytes = train(43)  # the queue had room for no more of 76
    rate = train_rate([(times_us, sizes_bytes)])
    assert rate is not None and rate.bytes_per_s == pytest.approx(RATE)


@pytest.mark.parametrize("burst", [3, 6, 11, 21, 43])
def test_the_burst_of_a_token_bucket_does_not_count(burst: int) -> None:
    fast_us = 24  # 500 Mbit/s
    bursty = joined(train(burst, fast_us), train(76 - burst, GAP_US, fast_us * burst + GAP_US))
    first = train(20, fast_us) if burst > 20 else bursty  # a bucket that passes all of the first train
    rate = train_rate([first, bursty])
    assert rate is not None and rate.bytes_per_s == pytest.approx(RATE, rel=0.02)


@pytest.mark.parametrize(("at_once", "free"), [(5, 0), (5, 27), (10, 0), (10, 27), (13, 0)])
def test_batches_of_a_token_bucket_have_its_rate(at_once: int, free: int) -> None:
    fast_us, slow_us = 3, GAP_US * at_once
    starts_us = [slow_us * max(number - free // at_once, 0) + fast_us * at_once for number in range(76 // at_once)]
    bursty = joined(*(train(at_once, fast_us, start_us) for start_us in starts_us))
    rate = train_rate([train(20, fast_us), (sorted(bursty[0]), bursty[1])])
    assert rate is not None and rate.bytes_per_s == pytest.approx(RATE, rel=0.02)


def test_one_pause_in_a_train_does_not_count() -> None:
    paused = joined(train(40), train(36, GAP_US, 40 * GAP_US + 20_000))
    rate = train_rate([train(20), paused])
    assert rate is not None and rate.bytes_per_s == pytest.approx(RATE, rel=0.01)
    assert rate.error >= SMALLEST_ERROR


@pytest.mark.parametrize("pauses_at", [(9,), (70,), (79, 89), (60, 90), (40, 80)])
def test_pauses_are_not_taken_for_a_token_bucket(pauses_at: tuple[int, ...]) -> None:
    gap_us, pause_us = 24, 600  # 500 Mbit/s
    starts = [0, *pauses_at, 100]
    parts = [
        train(end - start, gap_us, start * gap_us + pause_us * number)
        for number, (start, end) in enumerate(itertools.pairwise(starts))
    ]
    rate = train_rate([train(20, gap_us), joined(*parts)])
    assert rate is not None and rate.bytes_per_s == pytest.approx(PACKET / gap_us * 1e6, rel=0.05)


def test_too_few_packets_have_no_rate() -> None:
    assert train_rate([]) is None
    assert train_rate([([], []), train(MIN_PIECE)]) is None
    assert train_rate([train(MIN_PIECE + 1)]) is not None


@given(st.lists(samples, min_size=1, max_size=3))
def test_any_train_gives_a_rate_within_bounds(trains: list[list[tuple[int, int]]]) -> None:
    arrivals = []
    for packets in trains:
        gaps_us, sizes_bytes = zip(*packets, strict=True)
        arrivals.append((list(itertools.accumulate(gaps_us)), sizes_bytes))
    rate = train_rate(arrivals)
    assert rate is None or (0 < rate.bytes_per_s <= MAX_RATE_BYTES_PER_S and rate.error >= SMALLEST_ERROR)


def test_defaults_of_an_estimate() -> None:
    assert LinkEstimate(1.0, 2.0) == LinkEstimate(1.0, 2.0, LinkSource.PROBE, 0.0)
