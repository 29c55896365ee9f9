"""Transfer time of the tensors of a cut, from their bytes, the link's rate and round trip, and the sender's window.

TCP starts with a window of ten segments and doubles it with every round trip (RFC 5681, RFC 6928). So a connection that
has been idle needs longer than bytes / rate, and more so if the round trip is long. A connection that has just sent
tensors keeps its window. A sender with pacing (BBR) spreads each window over the round trip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neurosurgeon.utils.units import ms_to_s, s_to_ms

SEGMENT_BYTES = 1448  # an Ethernet packet less the headers of IP and TCP, with time stamps
INITIAL_WINDOW_BYTES = 10 * SEGMENT_BYTES  # RFC 6928
FRAME_BYTES = 512  # the head of a frame (`net.frames`)
ALIGNMENT_BYTES = 64  # of the tensors in it
TENSOR_MS = 0.01  # of each tensor of a frame but the first: both ends describe it and handle one more buffer
TLS_SHARE = 22 / 16_384  # header, tag and type of every full record (RFC 8446, sec. 5)


@dataclass(frozen=True, slots=True)
class Sender:
    """How much the sending end of a connection may send before it receives acknowledgements."""

    window_bytes: float = INITIAL_WINDOW_BYTES
    threshold_bytes: float = math.inf  # the window is doubled up to this
    pace_bytes_per_s: float = math.inf  # of the first window; infinite: it is sent at the link's rate
    burst_bytes: float = 0.0  # sent before pacing begins
    rtt_s: float = math.inf  # of segments and acknowledgements, if it is known; at most that of an exchange
    is_encrypted: bool = False


IDLE = Sender()
WARM = Sender(window_bytes=math.inf)


def transfer_time_ms(
    boundary_bytes: int, reply_bytes: int, rate_bytes_per_s: float, rtt_ms: float, sender: Sender = WARM
) -> float:
    """Return the time to send the boundary tensors and to receive the reply, ms.

    It consists of a round trip, the frames of both directions at the link's rate, and the sender's waits for
    acknowledgements. The downlink is assumed to be as fast as the uplink. Without boundary tensors the time is 0.

    Args: rate_bytes_per_s: of TCP's payload.
    """
    if not boundary_bytes:
        return 0.0
    rtt_s, share = ms_to_s(rtt_ms), 1 + TLS_SHARE * sender.is_encrypted
    request_s = sending_s(share * frame_bytes(boundary_bytes), rate_bytes_per_s, rtt_s, sender)
    reply_s = sending_s(share * frame_bytes(reply_bytes), rate_bytes_per_s, rtt_s, IDLE)
    return s_to_ms(request_s + reply_s) + rtt_ms


def frame_bytes(tensor_bytes: int) -> int:
    """Return the bytes of a message with one tensor."""
    return FRAME_BYTES + tensor_bytes + -tensor_bytes % ALIGNMENT_BYTES


def sending_s(size_bytes: float, rate_bytes_per_s: float, rtt_s: float, sender: Sender) -> float:
    """Return the time from the start of the first byte to the end of the last one, s, without the link's delay."""
    rtt_s = min(rtt_s, sender.rtt_s)  # a window waits for kernels only, an exchange also for processes to wake up
    if math.isfinite(sender.pace_bytes_per_s):
        return _paced_s(size_bytes, rate_bytes_per_s, rtt_s, sender)
    return size_bytes / rate_bytes_per_s + _pauses_s(size_bytes, rate_bytes_per_s, rtt_s, sender)


def _pauses_s(size_bytes: float, rate_bytes_per_s: float, rtt_s: float, sender: Sender) -> float:
    """Return the time for which the link is idle, s, because the sender waits until a window is acknowledged."""
    pauses_s, left_bytes, window_bytes = 0.0, size_bytes, sender.window_bytes
    while left_bytes > window_bytes and window_bytes < rate_bytes_per_s * rtt_s:
        pause_s = rtt_s - window_bytes / rate_bytes_per_s
        if window_bytes >= sender.threshold_bytes:  # beyond it, its growth is too slow to matter
            return pauses_s + pause_s * (math.ceil(left_bytes / window_bytes) - 1)
        pauses_s += pause_s
        left_bytes -= window_bytes
        window_bytes = min(2 * window_bytes, max(sender.threshold_bytes, window_bytes))
    return pauses_s


def _paced_s(size_bytes: float, rate_bytes_per_s: float, rtt_s: float, sender: Sender) -> float:
    """Return the time of a sender that doubles its rate with every round trip, evenly, s.

    After time t it has sent window * 2 ** (t / RTT), at a rate of ln 2 / RTT times that, up to the link's rate.
    """
    first_bytes = min(size_bytes, sender.window_bytes)
    pace_bytes_per_s = min(rate_bytes_per_s, sender.pace_bytes_per_s)
    first_s = max((first_bytes - sender.burst_bytes) / pace_bytes_per_s, first_bytes / rate_bytes_per_s)
    if size_bytes <= sender.window_bytes:
        return first_s
    full_bytes = max(sender.window_bytes, rate_bytes_per_s * rtt_s / math.log(2))
    growing_bytes = min(size_bytes, full_bytes)
    growing_s = rtt_s * math.log2(growing_bytes / sender.window_bytes)
    return first_s + growing_s + (size_bytes - growing_bytes) / rate_bytes_per_s
