"""Tasks that are stuck on their way: what moving bytes tell, and when the edge goes on alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.hedge import GAIN, LATE_MS, MAX_PATIENCE, WINDOW_MS, Hedging, Moved, OnItsWay
from neurosurgeon.planner.transfer import SEGMENT_BYTES

SIZE_BYTES = 600_000


def watched(acked_bytes: Callable[[float], float], until_ms: float, rtt_ms: float = 0.0) -> Hedging:
    """Return what has seen a tensor cross that was sent at time 0."""
    hedging = Hedging()
    for time_ms in range(0, round(until_ms) + 1, 10):
        acked = min(round(acked_bytes(time_ms)), SIZE_BYTES)
        hedging.saw(time_ms, acked, SIZE_BYTES - acked, rtt_ms)
    return hedging


def test_bytes_tell_a_rate_when_they_were_watched_for_long_enough() -> None:
    assert watched(lambda time_ms: 1_000 * time_ms, WINDOW_MS - 10).newest() is None
    moved = watched(lambda time_ms: 1_000 * time_ms, 3 * WINDOW_MS).newest()
    assert moved == Moved(round(1_000 * WINDOW_MS) + SEGMENT_BYTES, WINDOW_MS)
    assert moved.rate_bytes_per_s == pytest.approx(1e6, rel=0.03)
    assert watched(lambda time_ms: 10_000 * time_ms, 3 * WINDOW_MS).newest() is None  # all have arrived


def test_the_first_bytes_are_heard_of_after_a_round_trip() -> None:
    moved = watched(lambda time_ms: max(1_000 * (time_ms - 100), 0), 400, rtt_ms=100.0).newest()
    assert moved is not None and moved.rate_bytes_per_s == pytest.approx(1e6, rel=0.1)
    assert watched(lambda time_ms: 0, 250, rtt_ms=100.0).newest() is None


def test_a_sender_that_seldom_has_anything_to_send_tells_no_rate() -> None:
    hedging = Hedging()
    for tensor in range(100):  # of 5 KB each, which is acknowledged when the next one is sent
        hedging.saw(30.0 * tensor, 5_000 * tensor, 5_000, 20.0)
        assert hedging.newest() is None


def test_another_connection_begins_anew() -> None:
    hedging = watched(lambda time_ms: 1_000 * time_ms, 200)
    hedging.saw(210.0, 100, SIZE_BYTES, 0.0)
    assert hedging.newest() is None


def test_a_way_lasts_as_long_as_its_bytes_need_or_as_it_has_been_silent() -> None:
    assert OnItsWay(10.0, 50.0).left_ms == 0.0
    assert OnItsWay(10.0, 50.0, 1_000, Moved(100, 10.0)).left_ms == pytest.approx(100.0)
    assert OnItsWay(250.0, 50.0, still_ms=240.0).left_ms == 200.0  # late by so much
    assert OnItsWay(250.0, 50.0, still_ms=20.0).left_ms == 20.0  # but it moves


def test_a_link_that_stops_is_noticed_long_before_the_answer_is_due() -> None:
    hedging = watched(lambda time_ms: min(time_ms, 100) * 1_000, 100 + WINDOW_MS)
    way = hedging.way(100 + WINDOW_MS, 0.0, 700.0, SIZE_BYTES - 100_000)
    assert hedging.pays(way, here_ms=500.0)


def test_a_prediction_that_is_a_bit_off_is_no_reason() -> None:
    hedging = watched(lambda time_ms: 750 * time_ms, 300)  # instead of 1000
    assert not hedging.pays(hedging.way(300.0, 0.0, 600.0, SIZE_BYTES - 225_000), here_ms=1.0)


@given(waited_ms=st.floats(0, 1e5), predicted_ms=st.floats(0, 1e5), here_ms=st.floats(0, 1e5))
def test_no_task_is_taken_over_that_is_not_late_or_that_the_edge_would_finish_later(
    waited_ms: float, predicted_ms: float, here_ms: float
) -> None:
    way = OnItsWay(waited_ms, predicted_ms, still_ms=waited_ms)
    if Hedging().pays(way, here_ms):
        assert waited_ms > predicted_ms
        assert 2 * (waited_ms - predicted_ms) > LATE_MS
        assert way.left_ms > GAIN * here_ms


def test_hedges_in_vain_make_it_patient_up_to_a_point() -> None:
    hedging, way = Hedging(), OnItsWay(200.0, 50.0, still_ms=200.0)
    assert hedging.pays(way, 10.0)
    for _ in range(20):
        hedging.ended(was_first=False)
    assert not hedging.pays(way, 10.0)
    assert hedging.pays(OnItsWay(50.0 + MAX_PATIENCE * LATE_MS, 50.0, still_ms=1e4), 10.0)
    for _ in range(5):
        hedging.ended(was_first=True)
    assert hedging.pays(way, 10.0)
