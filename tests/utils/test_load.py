"""Load on a clock of the test's own: recent tasks count most, and an idle cloud has no queue."""

from __future__ import annotations

import math

import pytest

from utils.load import TIME_CONSTANT_MS, Load, LoadMeter, RecentMean


def test_without_samples_the_mean_is_nothing() -> None:
    assert RecentMean().value == 0.0


def test_samples_of_one_moment_count_alike() -> None:
    mean = RecentMean()
    for sample in (1.0, 2.0, 6.0):
        mean.add(sample, 100.0)
    assert mean.value == pytest.approx(3.0)


def test_an_older_sample_counts_less() -> None:
    mean = RecentMean()
    mean.add(10.0, 0.0)
    mean.add(20.0, TIME_CONSTANT_MS)
    weight = math.exp(-1)
    assert mean.value == pytest.approx((weight * 10 + 20) / (weight + 1))


def test_what_was_long_ago_is_forgotten() -> None:
    mean = RecentMean()
    mean.add(1e9, 0.0)
    mean.add(5.0, 1e9)
    assert mean.value == 5.0


def test_a_new_cloud_has_no_load() -> None:
    assert LoadMeter().load(12345.0) == Load(0.0, 0.0)


def test_the_load_is_what_tasks_waited_and_took() -> None:
    meter = LoadMeter()
    meter.started(2)
    for queue_ms in (10.0, 30.0):
        meter.ended(queue_ms, 5.0, 100.0)
    assert meter.load(100.0) == Load(pytest.approx(20.0), pytest.approx(5.0))


def test_the_wait_decays_only_while_nothing_runs() -> None:
    meter = LoadMeter()
    meter.started(2)
    meter.ended(10.0, 7.0, 0.0)
    assert meter.load(5000.0).queue_ms == pytest.approx(10.0)
    meter.ended(10.0, 7.0, 5000.0)
    assert meter.load(5000.0).queue_ms == pytest.approx(10.0)
    assert meter.load(5000.0 + TIME_CONSTANT_MS).queue_ms == pytest.approx(10.0 / math.e)
    assert meter.load(5000.0 + 100 * TIME_CONSTANT_MS).queue_ms == pytest.approx(0.0, abs=1e-6)
    assert meter.load(5000.0 + 100 * TIME_CONSTANT_MS).service_ms == pytest.approx(7.0)
