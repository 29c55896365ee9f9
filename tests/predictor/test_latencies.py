"""Refuse latencies outside their intervals, and add up the intervals of layers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.utils.errors import PlanningError

triples = st.tuples(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3)).map(sorted)


def latencies_of(layers: list[list[float]]) -> LayerLatencies:
    low, latency, high = ([layer[index] for layer in layers] for index in range(3))
    return LayerLatencies(latency, low, high, "test")


@given(st.lists(triples, max_size=20))
def test_the_interval_of_a_sum_holds_it_within_all_errors(
    layers: list[list[float]],
) -> None:
    latencies = latencies_of(layers)
    interval = latencies.interval()
    slack = 1e-9 * (1 + latencies.total())
    assert interval.low_ms - slack <= latencies.total() <= interval.high_ms + slack
    assert interval.low_ms >= sum(latencies.low_ms) - slack
    assert interval.high_ms <= sum(latencies.high_ms) + slack


@given(triples)
def test_the_interval_of_one_layer_is_its_own(layer: list[float]) -> None:
    assert latencies_of([layer]).interval() == pytest.approx((layer[0], layer[2]))


def test_errors_of_many_layers_average_out() -> None:
    one, many = (latencies_of([[0.5, 1.0, 1.5]] * count) for count in (1, 100))
    assert one.interval().high_ms / one.total() == pytest.approx(1.5)
    assert many.interval().high_ms / many.total() < 1.2


def test_scaling_scales_all() -> None:
    scaled = latencies_of([[1.0, 2.0, 3.0]]).scaled(2.0)
    assert (scaled.low_ms, scaled.latency_ms, scaled.high_ms) == ([2.0], [4.0], [6.0])


@pytest.mark.parametrize(
    ("latency", "low", "high"),
    [
        ([1.0], [], [1.0]),
        ([1.0], [2.0], [3.0]),
        ([-1.0], [-1.0], [1.0]),
        ([math.nan], [0.0], [1.0]),
        ([1.0], [0.0], [math.inf]),
    ],
)
def test_a_latency_outside_its_interval_is_refused(latency: list[float], low: list[float], high: list[float]) -> None:
    with pytest.raises(PlanningError):
        LayerLatencies(latency, low, high, "test")
