"""Transfer time: round trips, the bytes of both directions, windows and pacing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.transfer import (
    IDLE,
    INITIAL_WINDOW_BYTES,
    WARM,
    Sender,
    frame_bytes,
    sending_s,
    transfer_time_ms,
)
from neurosurgeon.utils.units import s_to_ms

RATE, RTT_S = 12.5e6, 0.05  # bytes/s: 100 Mbit/s
SENDERS = st.builds(
    Sender,
    window_bytes=st.floats(1_000, 1e9),
    threshold_bytes=st.floats(1_000, 1e9) | st.just(math.inf),
    pace_bytes_per_s=st.floats(1e3, 1e9) | st.just(math.inf),
    burst_bytes=st.floats(0, 15_000),
    rtt_s=st.floats(0, 1) | st.just(math.inf),
)


def test_transfer_time_is_a_round_trip_and_both_frames() -> None:
    assert transfer_time_ms(900_000, 100_000, 10e6, 0.0) == pytest.approx((900_032 + 100_032 + 2 * 512) / 10e3)
    small = transfer_time_ms(10_000, 4_000, 10e6, 5.0)
    assert small == pytest.approx(5 + (frame_bytes(10_000) + frame_bytes(4_000)) / 10e3)


def test_transfer_time_of_no_bytes_is_0() -> None:
    assert transfer_time_ms(0, 4000, 1.0, 1000.0) == 0


def test_sending_waits_for_windows_on_an_idle_connection() -> None:
    size = 7 * INITIAL_WINDOW_BYTES  # windows of 1, 2 and 4: two pauses
    pauses_s = 2 * RTT_S - 3 * INITIAL_WINDOW_BYTES / RATE
    assert sending_s(size, RATE, RTT_S, IDLE) == pytest.approx(size / RATE + pauses_s)
    assert sending_s(INITIAL_WINDOW_BYTES, RATE, RTT_S, IDLE) == INITIAL_WINDOW_BYTES / RATE
    longest_s = sending_s(10**9, RATE, RTT_S, IDLE) - 10**9 / RATE
    assert sending_s(10**10, RATE, RTT_S, IDLE) - 10**10 / RATE == pytest.approx(longest_s, rel=1e-6)


def test_sending_has_no_pauses_on_a_short_link() -> None:
    assert sending_s(10**7, RATE, 0.001, IDLE) == 10**7 / RATE


def test_sending_window_grows_up_to_its_threshold() -> None:
    window = 100_000
    sender = Sender(window_bytes=window, threshold_bytes=window)
    pause_s = RTT_S - window / RATE
    assert sending_s(5 * window, RATE, RTT_S, sender) == pytest.approx(5 * window / RATE + 4 * pause_s)


def test_sending_with_pacing_spreads_and_doubles_its_window() -> None:
    sender = Sender(window_bytes=20_000, pace_bytes_per_s=1e6)
    assert sending_s(10_000, RATE, RTT_S, sender) == pytest.approx(0.01)
    assert sending_s(80_000, RATE, RTT_S, sender) == pytest.approx(0.02 + 2 * RTT_S)
    assert sending_s(10_000, RATE, RTT_S, Sender(20_000, math.inf, 1e6, 10_000)) == pytest.approx(10_000 / RATE)


def test_sending_uses_the_round_trip_of_kernels() -> None:
    kernel_s = RTT_S / 2
    for sender in (IDLE, Sender(window_bytes=20_000, pace_bytes_per_s=1e6)):
        quick = replace(sender, rtt_s=kernel_s)
        assert sending_s(80_000, RATE, RTT_S, quick) == sending_s(80_000, RATE, kernel_s, sender)
        assert sending_s(80_000, RATE, kernel_s / 2, quick) == sending_s(80_000, RATE, kernel_s / 2, sender)
        a_byte_ms = [transfer_time_ms(1, 1, RATE, s_to_ms(RTT_S), one) for one in (quick, sender)]
        assert a_byte_ms[0] == a_byte_ms[1]


def test_transfer_time_grows_by_0_1_percent_with_encryption() -> None:
    plain, encrypted = (
        transfer_time_ms(10**6, 4_000, RATE, 10.0, Sender(math.inf, is_encrypted=yes)) for yes in (False, True)
    )
    assert 1.001 < (encrypted - 10) / (plain - 10) < 1.002


@given(st.integers(1, 10**9), st.integers(0, 10**6), st.floats(1, 1e10), st.floats(0, 1e4))
def test_transfer_time_grows_with_bytes_and_a_slower_link(size: int, reply: int, rate: float, rtt_ms: float) -> None:
    for sender in (IDLE, WARM):
        time_ms = transfer_time_ms(size, reply, rate, rtt_ms, sender)
        assert time_ms >= rtt_ms
        assert transfer_time_ms(size + 1, reply, rate, rtt_ms, sender) >= time_ms
        assert transfer_time_ms(size, reply, rate / 2, rtt_ms, sender) >= time_ms * (1 - 1e-9)


@given(st.floats(1, 1e9), st.floats(1e3, 1e10), st.floats(0, 10), SENDERS)
def test_sending_is_never_faster_than_the_link(size: float, rate: float, rtt_s: float, sender: Sender) -> None:
    time_s = sending_s(size, rate, rtt_s, sender)
    assert size / rate * (1 - 1e-9) <= time_s < math.inf
    assert sending_s(2 * size, rate, rtt_s, sender) >= time_s
