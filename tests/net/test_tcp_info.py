"""The kernel's state of a connection's sender: its fields, and the window after an idle time."""

from __future__ import annotations

import math
import struct

import pytest

from neurosurgeon.net.connection import Connection
from neurosurgeon.net.tcp_info import UNLIMITED_SEGMENTS, acked_bytes, send_state

SEGMENT = 1448


def tcp_info(**fields: int) -> bytes:
    """Return a struct tcp_info with some fields at their offsets in linux/tcp.h."""
    offsets = {"rto": 8, "mss": 16, "silent": 44, "rtt": 68, "threshold": 76, "window": 80, "sent": 156}
    data = bytearray(240)
    for name, value in {"rto": 200_000, "mss": SEGMENT, "threshold": UNLIMITED_SEGMENTS, **fields}.items():
        if name in ("pace", "acked"):
            struct.pack_into("=Q", data, 104 if name == "pace" else 120, value)
        else:
            struct.pack_into("=I", data, offsets[name], value)
    return bytes(data)


def test_a_window_and_its_threshold_are_in_bytes() -> None:
    state = send_state(tcp_info(window=40, threshold=30, rtt=1_500), "cubic")
    assert state == (40 * SEGMENT, 30 * SEGMENT, math.inf, 0.0, 0.0015, False)
    unlimited = send_state(tcp_info(window=10), "reno")
    assert unlimited is not None and unlimited.threshold_bytes == math.inf


def test_an_idle_window_is_halved_down_to_the_initial_one() -> None:
    for silent_ms, segments in ((100, 80), (250, 40), (450, 20), (5_000, 10), (10**9, 10)):
        state = send_state(tcp_info(window=80, silent=silent_ms), "cubic")
        assert state is not None and state.window_bytes == segments * SEGMENT
    small = send_state(tcp_info(window=4, silent=5_000), "cubic")
    assert small is not None and small.window_bytes == 4 * SEGMENT


def test_a_paced_sender_keeps_its_window_and_its_pace() -> None:
    state = send_state(tcp_info(window=80, silent=5_000, pace=10**6, rtt=1_500, sent=4), "bbr")
    assert state == (80 * SEGMENT, math.inf, 10**6, 6 * SEGMENT, 0.0015, False)
    later = send_state(tcp_info(window=80, pace=10**6, sent=1_000), "bbr")
    assert later is not None and later.burst_bytes == pytest.approx(1e6 / 1024)


def test_too_few_fields_are_none() -> None:
    assert send_state(bytes(104), "cubic") is None


def test_a_connection_has_a_send_state(pair: tuple[Connection, Connection]) -> None:
    state = pair[0].send_state()
    assert state is None or state.window_bytes > 0
    pair[0].close()
    assert pair[0].send_state() is None


def test_acknowledged_bytes_are_counted() -> None:
    assert acked_bytes(tcp_info(acked=2**40)) == 2**40
    assert acked_bytes(bytes(120)) is None


def test_a_connection_counts_acknowledged_bytes(pair: tuple[Connection, Connection]) -> None:
    before = pair[0].acked_bytes()
    if before is None:
        pytest.skip("this system has no such count")
    pair[0].send_raw(bytes(1_000))
    pair[0].wait_until_delivered(5.0)
    after = pair[0].acked_bytes()
    assert after is not None and after - before == 1_000
    pair[0].close()
    assert pair[0].acked_bytes() is None
