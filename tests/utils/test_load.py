"""Average the load on a clock of the test: recent tasks have most weight, and an idle cloud has no queue."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from neurosurgeon.utils.load import TIME_CONSTANT_MS, Load, LoadMeter


def load_after(*tasks: tuple[float, float]) -> Load:
    """Return the load after tasks with these (wait, end), ms, whose service times are half their waits."""
    meter = LoadMeter()
    for wait_ms, end_ms in tasks:
        meter.started()
        meter.ended(wait_ms, wait_ms / 2, end_ms)
    return meter.load(tasks[-1][1])


def load_of(wait_ms: float) -> Load:
    return Load(pytest.approx(wait_ms), pytest.approx(wait_ms / 2))


def test_tasks_of_one_moment_have_the_same_weight() -> None:
    assert load_after((1.0, 100.0), (2.0, 100.0), (6.0, 100.0)) == load_of(3.0)


def test_an_older_task_has_less_weight() -> None:
    weight = math.exp(-1)
    assert load_after((10.0, 0.0), (20.0, TIME_CONSTANT_MS)) == load_of((weight * 10 + 20) / (weight + 1))


def test_a_task_of_long_ago_has_no_weight() -> None:
    assert load_after((1e9, 0.0), (5.0, 1e9)) == Load(5.0, 2.5)


def test_a_new_cloud_has_no_load() -> None:
    assert LoadMeter().load(12345.0) == Load(0.0, 0.0)


def test_the_load_is_the_mean_wait_and_service_time() -> None:
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


def test_a_load_is_not_read_while_a_task_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = LoadMeter()
    read: list[Future[Load]] = []

    def exp_while_another_thread_reads(value: float) -> float:
        monkeypatch.undo()
        read.append(pool.submit(meter.load, 0.0))
        with pytest.raises(TimeoutError):
            read[0].result(0.05)
        return math.exp(value)

    with ThreadPoolExecutor(1) as pool:
        meter.started()
        monkeypatch.setattr("neurosurgeon.utils.load.math", SimpleNamespace(exp=exp_while_another_thread_reads))
        meter.ended(10.0, 5.0, 0.0)
        assert read[0].result() == load_of(10.0)
