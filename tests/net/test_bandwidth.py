"""The estimator on synthetic probes: pauses of the sender do not count, and no input makes it divide by zero."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.bandwidth import (
    MAX_RATE_BYTES_PER_S,
    MIN_GAP_US,
    Burst,
    LinkEstimate,
    LinkSource,
    gap_free_burst,
    probe_rate_bytes_per_s,
    round_trip_ms,
)

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


def test_a_steady_probe_reads_the_link_rate() -> None:
    assert gap_free_burst(*windows(1, 100, 0)).rate_bytes_per_s == pytest.approx(RATE)


@pytest.mark.parametrize("rtt_ms", [2, 20, 200])
def test_the_pauses_of_slow_start_do_not_lower_the_rate(rtt_ms: int) -> None:
    times_us, sizes_bytes = windows(5, 20, rtt_ms * 1_000)
    assert gap_free_burst(times_us, sizes_bytes).rate_bytes_per_s == pytest.approx(RATE)
    naive = sum(sizes_bytes) * 1e6 / times_us[-1]
    assert naive < RATE / 1.5  # what the estimator is for


def test_a_window_that_doubles_reads_the_link_rate() -> None:
    times_us: list[int] = []
    now_us = 0
    for window in (10, 20, 40, 80):
        times_us += range(now_us, now_us + window * SPACING_US, SPACING_US)
        now_us = times_us[-1] + 50_000
    assert gap_free_burst(times_us, [SEGMENT] * len(times_us)).rate_bytes_per_s == pytest.approx(RATE)


def test_a_pause_too_short_to_tell_from_scheduling_counts() -> None:
    burst = gap_free_burst([0, 10, 20, 20 + MIN_GAP_US], [SEGMENT] * 4)
    assert burst == Burst(3 * SEGMENT, 20 + MIN_GAP_US)
    assert gap_free_burst([0, 10, 20, 21 + MIN_GAP_US], [SEGMENT] * 4) == Burst(2 * SEGMENT, 20, paused=True)


def test_a_slow_link_is_no_pause() -> None:
    times_us = list(range(0, 1_000_000, 100_000))  # a segment every tenth of a second
    assert gap_free_burst(times_us, [SEGMENT] * 10).rate_bytes_per_s == pytest.approx(12_500.0)


def test_the_first_arrival_only_starts_the_clock() -> None:
    assert gap_free_burst([0, 1_000], [1_000_000, SEGMENT]) == Burst(SEGMENT, 1_000)


@pytest.mark.parametrize("times_us", [[0], [5, 5, 5]], ids=["one arrival", "one tick of the clock"])
def test_a_probe_of_no_duration_reads_very_fast(times_us: list[int]) -> None:
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


def test_a_late_reader_does_not_raise_the_rate_above_the_senders_view() -> None:
    read_at_once = Burst(1_000_000, 100)  # 10 GB/s: out of the kernel's memory
    assert probe_rate_bytes_per_s(read_at_once, 1_000_000, elapsed_ms=85.0, rtt_ms=5.0) == pytest.approx(RATE)


def test_where_the_sender_paused_only_the_burst_tells() -> None:
    burst = Burst(1_000_000, 80_000, paused=True)
    assert probe_rate_bytes_per_s(burst, 1_000_000, elapsed_ms=900.0, rtt_ms=100.0) == pytest.approx(RATE)


def test_an_answer_faster_than_the_rtt_leaves_the_burst() -> None:
    assert probe_rate_bytes_per_s(Burst(1_250, 100), 1_250, elapsed_ms=1.0, rtt_ms=2.0) == pytest.approx(RATE)


def test_the_rtt_forgives_a_slow_exchange() -> None:
    assert round_trip_ms([1.0, 1.2, 90.0, 1.1, 0.9]) == 1.1


def test_an_estimate_is_measured_now_unless_it_says_otherwise() -> None:
    assert LinkEstimate(1.0, 2.0) == LinkEstimate(1.0, 2.0, LinkSource.PROBE, 0.0)
