"""The kernel's state of the sending end of a TCP connection (struct tcp_info, linux/tcp.h), parsed without sockets."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

UNLIMITED_SEGMENTS = 0x7FFFFFFF  # the slow-start threshold before the first loss
INITIAL_SEGMENTS = 10  # RFC 6928
UNPACED_SEGMENTS = 10  # the kernel does not pace the first ones of a connection
PIECE_S = 1 / 1024  # the kernel passes the bytes of so long to the device in one piece (tcp_tso_autosize)
PACED = frozenset({"bbr", "bbr2", "bbr3"})  # they space packets, and keep their estimate of the link while idle
_ACKED = struct.Struct("=120xQ")  # bytes_acked, Linux 4.1
_FIELDS = struct.Struct("=8xI4xI24xI20xI4xII20xQ44xI")  # up to data_segs_out, Linux 4.6


class SendState(NamedTuple):
    """The bytes that may be sent before an acknowledgement, and their pace; see `planner.transfer.Sender`."""

    window_bytes: float
    threshold_bytes: float
    pace_bytes_per_s: float
    burst_bytes: float
    rtt_s: float
    is_encrypted: bool = False


class TcpInfo(NamedTuple):
    """The fields of struct tcp_info that are used here."""

    rto_us: int
    segment_bytes: int
    silent_ms: int  # since the last segment was sent
    rtt_us: int  # smoothed, of segments and their acknowledgements: most of these wait for no process
    threshold_segments: int
    window_segments: int
    pace_bytes_per_s: int
    segments_sent: int


def send_state(data: bytes, congestion_control: str) -> SendState | None:
    """Return the state of a connection's sender, or None if the kernel returns too few fields.

    Args: data: from getsockopt(TCP_INFO).
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
    """Return the bytes that the peer's kernel has acknowledged, or None if the kernel returns too few fields.

    Args: data: from getsockopt(TCP_INFO).
    """
    if len(data) < _ACKED.size:
        return None
    acked: int = _ACKED.unpack_from(data)[0]
    return acked


def _window_after_silence(info: TcpInfo) -> int:
    """Return the window of the next segment: it is halved with every idle retransmission timeout (RFC 2861)."""
    timeouts = min(info.silent_ms * 1_000 // max(info.rto_us, 1), 32)
    floor = min(info.window_segments, INITIAL_SEGMENTS)
    return max(info.window_segments >> timeouts, floor)
