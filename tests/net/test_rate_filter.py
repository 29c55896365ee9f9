"""The rate filter: smooth on steady links, without outliers, and at a new rate after at most three samples."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.net.bandwidth import Rate
from neurosurgeon.net.rate_filter import TRANSFER_ERROR, ProbeSample, RateFilter, TransferSample, transfer_rate

RATE = 1e6
rates = st.floats(1e2, 1e10)
samples = st.lists(st.tuples(st.booleans(), rates, st.floats(0.01, 1.0), st.floats(0, 100)), max_size=40)


class Samples:
    """A filter and its clock."""

    def __init__(self, first: Rate) -> None:
        self.filter = RateFilter(first)
        self.time_s = 0.0

    @property
    def rate(self) -> Rate:
        return self.filter.rate

    @property
    def has_outlier(self) -> bool:
        return self.filter.outlier_bytes_per_s is not None

    def probe(self, rate: Rate, elapsed_s: float) -> None:
        self.time_s += elapsed_s
        self.filter.update(ProbeSample(rate), self.time_s)

    def transfer(self, rate: Rate, elapsed_s: float, took_s: float = 0.0) -> None:
        self.time_s += elapsed_s
        self.filter.update(TransferSample(rate, took_s), self.time_s)


def settled(rate: float = RATE, error: float = 0.05) -> Samples:
    """Return a filter after some samples of a steady link."""
    known = Samples(Rate(rate, error))
    for _ in range(5):
        known.transfer(Rate(rate, error), 0.2)
    return known


def test_a_steady_link_has_a_smaller_error_than_its_samples() -> None:
    draw = random.Random(1)
    known = Samples(Rate(RATE, 0.5))
    for _ in range(50):
        known.transfer(Rate(RATE * math.exp(draw.gauss(0, 0.1)), 0.1), 0.1)
    assert known.rate.bytes_per_s == pytest.approx(RATE, rel=0.1)
    assert known.rate.error < 0.1


def test_the_error_grows_without_samples() -> None:
    known = settled()
    before = known.rate.error
    known.transfer(Rate(RATE, 1.0), 30.0)
    assert known.rate.error > before


@pytest.mark.parametrize("factor", [0.05, 0.5, 2.0, 20.0])
def test_one_outlier_does_not_count(factor: float) -> None:
    known = settled()
    known.transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE)
    assert known.has_outlier
    known.transfer(Rate(RATE, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE)
    assert not known.has_outlier


def test_one_above_and_one_below_are_both_outliers() -> None:
    known = settled()
    for factor in (10.0, 0.1, 10.0, 0.1):
        known.transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE)


@pytest.mark.parametrize("factor", [0.05, 0.5, 2.0, 20.0])
def test_two_that_agree_are_the_new_rate(factor: float) -> None:
    known = settled()
    for _ in range(2):
        known.transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE * factor, rel=0.05)


def test_a_long_transfer_counts_at_once() -> None:
    known = settled()
    known.transfer(Rate(RATE / 10, 0.05), 1.0, took_s=1.0)
    assert known.rate.bytes_per_s == pytest.approx(RATE / 10)


def test_three_on_one_side_are_a_new_rate() -> None:
    known = settled()
    for factor in (100.0, 10.0, 30.0):
        known.transfer(Rate(RATE * factor, 0.05), 0.2)
    assert known.rate.bytes_per_s == pytest.approx(RATE * 30)


def test_transfers_correct_the_overestimate_of_probes() -> None:
    known = Samples(Rate(RATE, 0.05))
    for _ in range(6):
        known.probe(Rate(RATE, 0.01), 0.5)
        for _ in range(3):
            known.transfer(Rate(RATE / 4, TRANSFER_ERROR), 0.2)
    known.probe(Rate(RATE, 0.01), 0.5)
    assert known.rate.bytes_per_s == pytest.approx(RATE / 4, rel=0.1)
    for _ in range(2):  # the link is half as fast, and so are its transfers
        known.probe(Rate(RATE / 2, 0.01), 1.0)
    assert known.rate.bytes_per_s == pytest.approx(RATE / 8, rel=0.1)


@given(rates, samples)
def test_the_rate_lies_between_its_samples(first: float, sequence: list[tuple[bool, float, float, float]]) -> None:
    known = Samples(Rate(first, 0.1))
    for is_probe, rate, error, elapsed_s in sequence:
        (known.probe if is_probe else known.transfer)(Rate(rate, error), elapsed_s)
        assert 0 < known.rate.error <= 1
    seen = [first, *(rate for _, rate, _, _ in sequence)]
    assert known.rate.bytes_per_s <= max(seen) * (1 + 1e-6)
    assert known.rate.bytes_per_s >= min(seen) * 0.02 * (1 - 1e-6)


# ---------------------------------------------------------------- the rate of one transfer


def test_a_warm_transfer_has_the_rate() -> None:
    rate = transfer_rate(602_000, 48.0, rtt_ms=50.0)
    assert rate == Rate(pytest.approx(602_000 / 0.048), TRANSFER_ERROR)


def test_a_short_round_trip_has_a_small_error() -> None:
    rate = transfer_rate(602_000, 48.0, rtt_ms=0.2)
    assert rate.bytes_per_s == pytest.approx(602_000 / 0.048, rel=0.02)
    assert rate.error < TRANSFER_ERROR + 0.02


def test_a_transfer_of_slow_start_has_a_large_error() -> None:
    rate = transfer_rate(150_000, 180.0, rtt_ms=50.0)  # 60 ms of it at 2.4 MB/s
    assert 150_000 / 0.18 < rate.bytes_per_s < 2.5e6
    assert rate.error > 0.2


@given(st.integers(65_536, 10**9), st.floats(2.0, 1e6), st.floats(0, 1e4))
def test_any_transfer_has_a_rate(size: int, receive_ms: float, rtt_ms: float) -> None:
    rate = transfer_rate(size, receive_ms, rtt_ms)
    assert size / receive_ms * 1e3 * (1 - 1e-9) <= rate.bytes_per_s < 3 * size / receive_ms * 1e3
    assert TRANSFER_ERROR <= rate.error < 1
