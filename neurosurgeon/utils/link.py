"""The estimate of a link, as every part of the project knows it."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

DEFAULT_ERROR = 0.1  # of a rate about whose error nothing is known


class LinkSource(StrEnum):
    """Where an estimate comes from."""

    PROBE = "measured"
    TRANSFERS = "transfers"  # of real tensors
    LAST = "last value"
    GIVEN = "given"


class ProbeMethod(StrEnum):
    """How a probe measured the rate."""

    UDP_TRAIN = "udp train"
    TCP_BURST = "tcp burst"


class LinkEstimate(NamedTuple):
    """The link as the edge sees it; rates are those of TCP's payload."""

    rate_bytes_per_s: float
    rtt_ms: float
    source: LinkSource = LinkSource.PROBE
    age_s: float = 0.0
    queue_ms: float = 0.0  # what a task waits in the cloud behind it, of late
    host_ms: float = 0.0  # what an exchange takes beyond the network's round trip: waking up, reading (`net.probe`)
    error: float = DEFAULT_ERROR  # of the rate: one standard deviation, relative
    method: ProbeMethod | None = None
    udp_is_blocked: bool = False  # it was tried, and no rate came of it
    rtt_is_given: bool = False  # by the user; no measurement changes it
    down_bytes_per_s: float | None = None  # the other way, where it was asked for
    probe_bytes: int = 0  # what measuring it cost

    @property
    def exchange_ms(self) -> float:
        """How long a question and its answer take, their bytes apart: what tasks wait for."""
        return self.rtt_ms + max(self.host_ms, 0.0)

    @property
    def ping_ms(self) -> float:
        """How long a ping takes, less what its bytes would at the rate."""
        return self.rtt_ms + self.host_ms
