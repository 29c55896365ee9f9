"""Hedging of stalled tasks: rates from acknowledged bytes, and when the edge computes a task itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.hedge import (
    GAIN,
    LATE_MS,
    MAX_TIMEOUT_FACTOR,
    WINDOW_MS,
    Hedging,
    RecentTransfer,
    TransferProgress,
)
from neurosurgeon.planner.transfer import SEGMENT_BYTES

SIZE_BYTES = 600_000


def hedging_after(acked_bytes: Callable[[float], float], until_ms: float, rtt_ms: float = 0.0) -> Hedging:
    """Return a `Hedging` that recorded the upload of one tensor from time 0 on."""
    hedging = Hedging()
    for time_ms in range(0, round(until_ms) + 1, 10):
        acked = min(round(acked_bytes(time_ms)), SIZE_BYTES)
        hedging.record_progress(time_ms, acked, SIZE_BYTES - acked, rtt_ms)
    return hedging


def test_recent_transfer_needs_a_whole_window() -> None:
    assert hedging_after(lambda time_ms: 1_000 * time_ms, WINDOW_MS - 10).recent_transfer() is None
    moved = hedging_after(lambda time_ms: 1_000 * time_ms, 3 * WINDOW_MS).recent_transfer()
    assert moved == RecentTransfer(round(1_000 * WINDOW_MS) + SEGMENT_BYTES, WINDOW_MS)
    assert moved.rate_bytes_per_s == pytest.approx(1e6, rel=0.03)
    assert (
        hedging_after(lambda time_ms: 10_000 * time_ms, 3 * WINDOW_MS).recent_transfer() is None
    )  # all bytes are acknowledged


def test_recent_transfer_begins_after_a_round_trip() -> None:
    moved = hedging_after(lambda time_ms: max(1_000 * (time_ms - 100), 0), 400, rtt_ms=100.0).recent_transfer()
    assert moved is not None and moved.rate_bytes_per_s == pytest.approx(1e6, rel=0.1)
    assert hedging_after(lambda time_ms: 0, 250, rtt_ms=100.0).recent_transfer() is None


def test_recent_transfer_is_none_for_a_sender_with_pauses() -> None:
    hedging = Hedging()
    for tensor in range(100):  # of 5 KB each, which is acknowledged when the next one is sent
        hedging.record_progress(30.0 * tensor, 5_000 * tensor, 5_000, 20.0)
        assert hedging.recent_transfer() is None


def test_recent_transfer_is_none_for_a_new_connection() -> None:
    hedging = hedging_after(lambda time_ms: 1_000 * time_ms, 200)
    hedging.record_progress(210.0, 100, SIZE_BYTES, 0.0)
    assert hedging.recent_transfer() is None


def test_left_ms_is_that_of_its_bytes_or_of_its_stall() -> None:
    assert TransferProgress(10.0, 50.0).left_ms == 0.0
    assert TransferProgress(10.0, 50.0, 1_000, RecentTransfer(100, 10.0)).left_ms == pytest.approx(100.0)
    assert TransferProgress(250.0, 50.0, stalled_ms=240.0).left_ms == 200.0  # its delay
    assert TransferProgress(250.0, 50.0, stalled_ms=20.0).left_ms == 20.0  # bytes were acknowledged since


def test_should_hedge_before_the_reply_is_due_if_the_link_stops() -> None:
    hedging = hedging_after(lambda time_ms: min(time_ms, 100) * 1_000, 100 + WINDOW_MS)
    progress = hedging.progress_of(100 + WINDOW_MS, 0.0, 700.0, SIZE_BYTES - 100_000)
    assert hedging.should_hedge(progress, edge_ms=500.0)


def test_should_hedge_is_false_for_a_small_error() -> None:
    hedging = hedging_after(lambda time_ms: 750 * time_ms, 300)  # instead of 1000
    assert not hedging.should_hedge(hedging.progress_of(300.0, 0.0, 600.0, SIZE_BYTES - 225_000), edge_ms=1.0)


@given(waited_ms=st.floats(0, 1e5), predicted_ms=st.floats(0, 1e5), edge_ms=st.floats(0, 1e5))
def test_should_hedge_only_a_late_task_with_a_gain(waited_ms: float, predicted_ms: float, edge_ms: float) -> None:
    progress = TransferProgress(waited_ms, predicted_ms, stalled_ms=waited_ms)
    if Hedging().should_hedge(progress, edge_ms):
        assert waited_ms > predicted_ms
        assert 2 * (waited_ms - predicted_ms) > LATE_MS
        assert progress.left_ms > GAIN * edge_ms


def test_record_outcome_changes_the_timeouts_within_limits() -> None:
    hedging, progress = Hedging(), TransferProgress(200.0, 50.0, stalled_ms=200.0)
    assert hedging.should_hedge(progress, 10.0)
    for _ in range(20):
        hedging.record_outcome(was_first=False)
    assert not hedging.should_hedge(progress, 10.0)
    assert hedging.should_hedge(TransferProgress(50.0 + MAX_TIMEOUT_FACTOR * LATE_MS, 50.0, stalled_ms=1e4), 10.0)
    for _ in range(5):
        hedging.record_outcome(was_first=True)
    assert hedging.should_hedge(progress, 10.0)
