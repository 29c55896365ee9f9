"""Transfer time: one round trip, the bytes of both ways, and nothing where nothing crosses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.transfer import transfer_time_ms


def test_a_transfer_is_a_round_trip_and_the_bytes_of_both_ways() -> None:
    assert transfer_time_ms(900_000, 100_000, 10e6, 5.0) == pytest.approx(5.0 + 100.0)


def test_nothing_crosses_for_free() -> None:
    assert transfer_time_ms(0, 4000, 1.0, 1000.0) == 0


@given(st.integers(1, 10**9), st.integers(0, 10**6), st.floats(1, 1e10), st.floats(0, 1e4))
def test_more_bytes_or_a_slower_link_never_take_less(size: int, reply: int, rate: float, rtt_ms: float) -> None:
    time_ms = transfer_time_ms(size, reply, rate, rtt_ms)
    assert time_ms >= rtt_ms
    assert transfer_time_ms(size + 1, reply, rate, rtt_ms) >= time_ms
    assert transfer_time_ms(size, reply, rate / 2, rtt_ms) >= time_ms
