"""What the kernel says of the sending end of a TCP connection (struct tcp_info, linux/tcp.h), read without sockets."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

UNLIMITED_SEGMENTS = 0x7FFFFFFF  # a threshold that has not been found yet
INITIAL_SEGMENTS = 10  # RFC 6928
UNPACED_SEGMENTS = 10  # the kernel paces none of a connection's first ones
PIECE_S = 1 / 1024  # of the pace: what the kernel hands to the device in one piece (tcp_tso_autosize), at once
PACED = frozenset({"bbr", "bbr2", "bbr3"})  # they space packets, and keep their estimate of the link while idle
_ACKED = struct.Struct("=120xQ")  # bytes_acked, Linux 4.1
_FIELDS = struct.Struct("=8xI4xI24xI20xI4xII20xQ44xI")  # up to data_segs_out, Linux 4.6


class SendState(NamedTuple):
    """What may be sent before the peer is heard from; `planner.transfer.Sender` says what comes of it."""

    window_bytes: float
    threshold_bytes: float
    pace_bytes_per_s: float
    burst_bytes: float
    rtt_s: float
    is_encrypted: bool = False


class TcpInfo(NamedTuple):
    """The fields that matter here."""

    rto_us: int
    segment_bytes: int
    silent_ms: int  # since anything was sent
    rtt_us: int  # smoothed, of segments and their acknowledgements: for most of these no process has to wake up
    threshold_segments: int
    window_segments: int
    pace_bytes_per_s: int
    segments_sent: int


def send_state(data: bytes, congestion_control: str) -> SendState | None:
    """Return the state of a connection's sender; None where the kernel says too little.

    Args: data: what getsockopt(TCP_INFO) brought.
    """
    if len(data) < _FIELDS.size:
        return None
    info = TcpInfo(*_FIELDS.unpack_from(data))
    if congestion_control in PACED:
        unpaced = max(0, UNPACED_SEGMENTS - info.segments_sent)
        window_bytes, pace_bytes_per_s = info.window_segments * info.segment_bytes, max(info.pace_bytes_per_s, 1)
        burst_bytes = max(unpaced * info.segment_bytes, PIECE_S * pace_bytes_per_s)
        return SendState(window_bytes, math.inf, pace_bytes_per_s, burst_bytes, info.rtt_us / 1e6)
    window = _window_after_silence(info) * info.segment_bytes
    knows_threshold = info.threshold_segments < UNLIMITED_SEGMENTS
    threshold = info.threshold_segments * info.segment_bytes if knows_threshold else math.inf
    return SendState(window, threshold, math.inf, 0.0, info.rtt_us / 1e6)


def acked_bytes(data: bytes) -> int | None:
    """Return how many bytes of a connection its peer has acknowledged; None where the kernel says too little.

    Args: data: what getsockopt(TCP_INFO) brought.
    """
    if len(data) < _ACKED.size:
        return None
    acked: int = _ACKED.unpack_from(data)[0]
    return acked


def _window_after_silence(info: TcpInfo) -> int:
    """Return the window that the next segment finds: it halves with every timeout of silence (RFC 2861)."""
    timeouts = min(info.silent_ms * 1_000 // max(info.rto_us, 1), 32)
    floor = min(info.window_segments, INITIAL_SEGMENTS)
    return max(info.window_segments >> timeouts, floor)
