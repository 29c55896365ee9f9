"""The rate between samples: steady links are smooth, outliers do not count, and changes are seen within three."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.net.bandwidth import Rate
from neurosurgeon.net.rate_filter import TRANSFER_ERROR, RateFilter, transfer_rate

RATE = 1e6
rates = st.floats(1e2, 1e10)
samples = st.lists(st.tuples(st.booleans(), rates, st.floats(0.01, 1.0), st.floats(0, 100)), max_size=40)


def settled(rate: float = RATE, error: float = 0.05) -> RateFilter:
    """Return a filter that has seen a steady link."""
    known = RateFilter(Rate(rate, error))
    for _ in range(5):
        known.saw_transfer(Rate(rate, error), 0.2)
    return known


def test_a_steady_link_becomes_surer_than_its_samples() -> None:
    draw = random.Random(1)
    known = RateFilter(Rate(RATE, 0.5))
    for _ in range(50):
        known.saw_transfer(Rate(RATE * math.exp(draw.gauss(0, 0.1)), 0.1), 0.1)
    assert known.rate.bytes_per_s == pytest.approx(RATE, rel=0.1)
    assert known.rate.error < 0.1


def test_silence_makes_it_unsure() -> None:
    known = settled()
    before = known.rate.error
    known.saw_transfer(Rate(RATE, 1.0), 30.0)
    assert known.rate.error > before


@pytest.mark.parametrize("factor", [0.05, 0.5, 2.0, 20.0])
def test_one_outlier_does_not_count(factor: float) -> None:
    known = settled()
    known.saw_transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE)
    assert known.doubts
    known.saw_transfer(Rate(RATE, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE)
    assert not known.doubts


def test_one_above_and_one_below_are_outliers_both() -> None:
    known = settled()
    for factor in (10.0, 0.1, 10.0, 0.1):
        known.saw_transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE)


@pytest.mark.parametrize("factor", [0.05, 0.5, 2.0, 20.0])
def test_two_that_agree_are_the_new_rate(factor: float) -> None:
    known = settled()
    for _ in range(2):
        known.saw_transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE * factor, rel=0.05)


def test_a_long_transfer_counts_at_once() -> None:
    known = settled()
    known.saw_transfer(Rate(RATE / 10, 0.05), 1.0, took_s=1.0)
    assert known.rate.bytes_per_s == pytest.approx(RATE / 10)


def test_three_on_one_side_are_a_new_rate_whatever_they_say_of_each_other() -> None:
    known = settled()
    for factor in (100.0, 10.0, 30.0):
        known.saw_transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE * 30)


def test_tensors_teach_what_probes_overestimate() -> None:
    known = RateFilter(Rate(RATE, 0.05))
    for _ in range(6):
        known.saw_probe(Rate(RATE, 0.01), 0.5)
        for _ in range(3):
            known.saw_transfer(Rate(RATE / 4, TRANSFER_ERROR), 0.2)
    known.saw_probe(Rate(RATE, 0.01), 0.5)
    assert known.rate.bytes_per_s == pytest.approx(RATE / 4, rel=0.1)
    for _ in range(2):  # the link halves: so does what tensors get
        known.saw_probe(Rate(RATE / 2, 0.01), 1.0)
    assert known.rate.bytes_per_s == pytest.approx(RATE / 8, rel=0.1)


@given(rates, samples)
def test_any_samples_leave_a_rate_among_them(first: float, sequence: list[tuple[bool, float, float, float]]) -> None:
    known = RateFilter(Rate(first, 0.1))
    for is_probe, rate, error, elapsed_s in sequence:
        (known.saw_probe if is_probe else known.saw_transfer)(Rate(rate, error), elapsed_s)
        assert 0 < known.rate.error <= 1
    seen = [first, *(rate for _, rate, _, _ in sequence)]
    assert known.rate.bytes_per_s <= max(seen) * (1 + 1e-6)
    assert known.rate.bytes_per_s >= min(seen) * 0.02 * (1 - 1e-6)


# ---------------------------------------------------------------- what one transfer tells


def test_a_warm_transfer_tells_the_rate() -> None:
    rate = transfer_rate(602_000, 48.0, rtt_ms=50.0)
    assert rate == Rate(pytest.approx(602_000 / 0.048), TRANSFER_ERROR)


def test_a_short_link_leaves_no_doubt() -> None:
    rate = transfer_rate(602_000, 48.0, rtt_ms=0.2)
    assert rate.bytes_per_s == pytest.approx(602_000 / 0.048, rel=0.02)
    assert rate.error < TRANSFER_ERROR + 0.02


def test_a_transfer_that_slow_start_may_have_held_up_tells_little() -> None:
    rate = transfer_rate(150_000, 180.0, rtt_ms=50.0)  # 60 ms of it at 2.4 MB/s
    assert 150_000 / 0.18 < rate.bytes_per_s < 2.5e6
    assert rate.error > 0.2


@given(st.integers(65_536, 10**9), st.floats(2.0, 1e6), st.floats(0, 1e4))
def test_any_transfer_gives_a_rate(size: int, receive_ms: float, rtt_ms: float) -> None:
    rate = transfer_rate(size, receive_ms, rtt_ms)
    assert size / receive_ms * 1e3 * (1 - 1e-9) <= rate.bytes_per_s < 3 * size / receive_ms * 1e3
    assert TRANSFER_ERROR <= rate.error < 1
