"""Durations: a monotonic clock, and summaries of samples."""

from __future__ import annotations

from neurosurgeon.utils.timing import STAGE_NAMES, StageTimes, Timing, now_ms


def test_the_clock_never_runs_backwards() -> None:
    times = [now_ms() for _ in range(1000)]
    assert times == sorted(times)


def test_a_total_is_the_sum_of_its_stages() -> None:
    times = StageTimes(1.0, 2.0, 4.0)
    assert times.total_ms == 7.0
    assert times.as_dict() == {"edge_ms": 1.0, "transfer_ms": 2.0, "cloud_ms": 4.0, "total_ms": 7.0}
    assert tuple(times.as_dict()) == STAGE_NAMES


def test_samples_are_summarised_by_median_and_quartiles() -> None:
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 1.0, 5.0, 2.0, 5)


def test_one_sample_has_no_spread() -> None:
    assert Timing.of([2.5]) == Timing(2.5, 2.5, 2.5, 0.0, 1)
