"""The estimate of a link between edge and cloud."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

DEFAULT_ERROR = 0.1  # of a rate whose error is unknown


class LinkSource(StrEnum):
    """The source of an estimate."""

    PROBE = "measured"
    TRANSFERS = "transfers"  # of the tensors of tasks
    LAST = "last value"
    GIVEN = "given"


class ProbeMethod(StrEnum):
    """The method by which a probe measured the rate."""

    UDP_TRAIN = "udp train"
    TCP_BURST = "tcp burst"


class LinkEstimate(NamedTuple):
    """The link as seen from the edge; rates are those of TCP's payload."""

    rate_bytes_per_s: float
    rtt_ms: float
    source: LinkSource = LinkSource.PROBE
    age_s: float = 0.0
    queue_ms: float = 0.0  # recent wait of a task in the cloud's queue
    host_ms: float = 0.0  # of an exchange, beyond the network's round trip: waking up, reading (`net.probe`)
    error: float = DEFAULT_ERROR  # of the rate: one standard deviation, relative
    method: ProbeMethod | None = None
    udp_is_blocked: bool = False  # a UDP probe was tried and measured no rate
    rtt_is_given: bool = False  # by the user; no measurement changes it
    down_bytes_per_s: float | None = None  # from cloud to edge, if it was measured
    probe_bytes: int = 0  # sent to measure the estimate

    @property
    def exchange_ms(self) -> float:
        """The duration of a request and its reply without the transfer of their bytes, ms; tasks wait for it."""
        return self.rtt_ms + max(self.host_ms, 0.0)

    @property
    def ping_ms(self) -> float:
        """The duration of a ping without the transfer of its bytes, ms."""
        return self.rtt_ms + self.host_ms
