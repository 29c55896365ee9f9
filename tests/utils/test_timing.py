"""Durations: a clock that never runs backwards, samples summarised, short functions timed in batches."""

from __future__ import annotations

import pytest

from neurosurgeon.utils import timing
from neurosurgeon.utils.timing import STAGE_NAMES, StageTimes, Timing, measure, now_ms


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


class FakeClock:
    """A clock that only the measured function moves."""

    def __init__(self, call_ms: float) -> None:
        self.call_ms = call_ms
        self.ms = 0.0
        self.calls = 0

    def now(self) -> float:
        return self.ms

    def function(self) -> None:
        self.calls += 1
        self.ms += self.call_ms


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock(request.param)
    monkeypatch.setattr(timing, "now_ms", clock.now)
    return clock


@pytest.mark.parametrize("fake", [10.0], indirect=True)
def test_a_long_function_is_called_until_the_budget_is_spent(fake: FakeClock) -> None:
    result = measure(fake.function, min_samples=2, budget_ms=70.0)
    assert result == Timing(10.0, 10.0, 10.0, 0.0, 7)
    assert fake.calls == timing.WARMUP_RUNS + 1 + 7


@pytest.mark.parametrize("fake", [100.0], indirect=True)
def test_there_are_enough_samples_even_above_the_budget(fake: FakeClock) -> None:
    assert measure(fake.function, min_samples=5, budget_ms=1.0).samples == 5


@pytest.mark.parametrize("fake", [0.01], indirect=True)
def test_a_short_function_is_called_often_in_a_sample(fake: FakeClock) -> None:
    result = measure(fake.function, min_samples=3, budget_ms=0.5)
    assert result.samples == 3
    assert result.median_ms == pytest.approx(0.01)
    assert fake.calls == timing.WARMUP_RUNS + 1 + 3 * 20
