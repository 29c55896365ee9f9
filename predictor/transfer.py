"""How long a cut's tensors take to cross: the link enters planning as two numbers, rate and RTT."""

from __future__ import annotations

from utils.units import s_to_ms


def transfer_time_ms(crossing_bytes: int, reply_bytes: int, rate_bytes_per_s: float, rtt_ms: float) -> float:
    """Return the time (ms) to send what crosses and to get the answer back.

    One round trip, and the bytes of both ways at the link's rate (the downlink is taken to be as fast). Nothing
    crosses when the whole network runs on the edge: 0.
    """
    if not crossing_bytes:
        return 0.0
    return rtt_ms + s_to_ms((crossing_bytes + reply_bytes) / rate_bytes_per_s)
