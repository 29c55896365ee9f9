"""The one estimator of a link's rate: smooth while the link is steady, quick when it changes, and with an error.

Theory of operation. `RateFilter.update` takes every sample, of one of three kinds:

- a probe: the rate that the link can carry;
- a transfer: the rate at which the tensors of one task arrived, after the last byte;
- a partial transfer: the bytes that moved recently of a transfer that has not ended.

Probes and transfers go through a Kalman filter of the logarithm of the rate (a random walk seen with noise: Kalman,
1960). The noise of a sample is its relative error. A sample beyond `OUTLIER_SIGMAS` standard deviations is held back as
an outlier candidate. The next one that agrees with it, or the third in a row on the same side, makes it the new rate. A
sample within the range drops it, one beyond on the other side replaces it. A transfer that took `SURE_S` counts at
once.

Transfers read lower than probes: TCP gets less of a link where packets are lost, or others send. The filter learns the
ratio while probes show a steady link, and applies it to the probes that follow.

A partial transfer matters if it is much slower than the estimate. The transfer then is stalled:

    no stalled transfer ── partial transfer below STALLED_SHARE of the rate ──▶ stalled, newest
    stalled, newest     ── probe ─────────────────────────────────────────────▶ stalled, older than the probe
    stalled, older      ── partial transfer below STALLED_SHARE of the rate ──▶ stalled, newest
    stalled, any        ── end of a transfer ─────────────────────────────────▶ no stalled transfer, needs a probe

While it is stalled and newest, the current rate is at most that of its last bytes; no other state changes it. At its
end the rate of its last bytes is a sample, if it was observed for long enough. The mean over the whole transfer is
none, as the rate changed during it.

A filter has no thread, no lock and no clock: `net.link_watch` owns it, guards it and passes the time.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from neurosurgeon.net.bandwidth import Rate
from neurosurgeon.utils.link import LinkSource

DRIFT = 0.2  # standard deviation of the logarithm after a second without samples
OUTLIER_SIGMAS = 3.0  # a sample beyond so many standard deviations is an outlier candidate
MAX_CANDIDATES = 3  # so many candidates in a row on one side are a new rate, even if they do not agree
SURE_S = 0.5  # a transfer that took so long saw the link, and no short pause
STEADY_LOG_RATIO = 0.15  # probes whose logarithms differ by less show a steady link
SHARE_GAIN = 0.5  # of each new ratio of transfers to probes
SMALLEST_LOG_SHARE = math.log(0.02)
INITIAL_WINDOW_BYTES = 14_480  # of TCP, RFC 6928
TRANSFER_ERROR = 0.07  # relative error of a transfer's rate, if its sender never waited for acknowledgements
MAX_ERROR = 1.0
MIN_TRANSFER_BYTES, MIN_TRANSFER_MS = 65_536, 2.0  # below, clocks and wake-ups dominate the time
STALLED_SHARE = 0.5  # of the estimate; a partial transfer that is slower is stalled


class ProbeSample(NamedTuple):
    """The rate that a probe measured."""

    rate: Rate


class TransferSample(NamedTuple):
    """The rate of a transfer that has ended."""

    rate: Rate | None  # None: it was too small or too short to measure
    took_s: float = 0.0


class PartialSample(NamedTuple):
    """The bytes that moved recently of a transfer in flight; their rate is an upper bound."""

    rate_bytes_per_s: float
    size_bytes: int
    left_bytes: int = 0  # of the transfer, that have not moved


Sample = ProbeSample | TransferSample | PartialSample


class StalledTransfer(NamedTuple):
    """A transfer in flight that is much slower than the estimate."""

    newest: PartialSample
    since_s: float  # time of its first slow sample
    seen_s: float  # time of the newest
    is_newest: bool = True  # no probe came after it


class RateFilter:
    """Estimates a rate from samples with their errors; see the head of this file. Not thread-safe.

    Args: source: a rate that the user gave (`LinkSource.GIVEN`) ignores all samples. time_s: of ``first``.
    """

    def __init__(self, first: Rate, source: LinkSource = LinkSource.PROBE, time_s: float = 0.0) -> None:
        self.needs_probe = False  # the samples since the last probe do not determine the rate
        self._rate_bytes_per_s = first.bytes_per_s
        self._variance = first.error**2  # of the logarithm
        self.source = source
        self.updated_s = time_s
        self._outlier_candidates: list[tuple[float, float]] = []  # logarithm, variance
        self._log_share = 0.0  # of a probe's rate that transfers get
        self._last_probe: float | None = None  # its logarithm
        self._transfers: list[float] = []  # logarithms since the last probe
        self._stalled: StalledTransfer | None = None

    @property
    def rate(self) -> Rate:
        """The rate from probes and transfers that have ended; its error grows with time, and with every outlier."""
        return Rate(self._rate_bytes_per_s, min(math.sqrt(self._variance), MAX_ERROR))

    @property
    def current_bytes_per_s(self) -> float:
        """The rate that planning should use: that of a stalled transfer if it is newer and lower, else `rate`."""
        if self._stalled and self._stalled.is_newest:
            return min(self._rate_bytes_per_s, self._stalled.newest.rate_bytes_per_s)
        return self._rate_bytes_per_s

    @property
    def outlier_bytes_per_s(self) -> float | None:
        """The newest sample, if it is held back as an outlier candidate, else None."""
        return math.exp(self._outlier_candidates[-1][0]) if self._outlier_candidates else None

    def update(self, sample: Sample, time_s: float) -> None:
        """Record a sample.

        Args: time_s: the time at which it ended (monotonic).
        """
        if self.source is LinkSource.GIVEN:
            return
        match sample:
            case ProbeSample():
                self._update_from_probe(sample.rate, time_s)
            case PartialSample():
                self._update_stalled(sample, time_s)
            case TransferSample() if self._stalled:
                self._end_stalled(self._stalled, time_s)
            case TransferSample(Rate() as rate):
                self._update_from_transfer(rate, sample.took_s, time_s)

    def _update_from_probe(self, rate: Rate, time_s: float) -> None:
        log_rate = math.log(rate.bytes_per_s)
        is_steady = self._last_probe is not None and abs(log_rate - self._last_probe) < STEADY_LOG_RATIO
        if is_steady and len(self._transfers) > 1:
            log_share = max(SMALLEST_LOG_SHARE, min(statistics.median(self._transfers) - log_rate, 0.0))
            self._log_share += SHARE_GAIN * (log_share - self._log_share)
        self._last_probe = log_rate
        self._transfers.clear()
        if self._stalled:
            self._stalled = self._stalled._replace(is_newest=False)
        self.source = LinkSource.PROBE
        self._filter(log_rate + self._log_share, rate.error**2, time_s)

    def _update_from_transfer(self, rate: Rate, took_s: float, time_s: float) -> None:
        log_rate = math.log(rate.bytes_per_s)
        self._transfers = [*self._transfers[-8:], log_rate]
        self.source = LinkSource.TRANSFERS
        self._filter(log_rate, rate.error**2, time_s, is_sure=took_s >= SURE_S)

    def _update_stalled(self, sample: PartialSample, time_s: float) -> None:
        is_slow = sample.rate_bytes_per_s < STALLED_SHARE * self._rate_bytes_per_s
        before = self._stalled
        if before:
            self._stalled = StalledTransfer(sample, before.since_s, time_s, is_slow or before.is_newest)
        elif is_slow:
            self._stalled = StalledTransfer(sample, time_s, time_s)

    def _end_stalled(self, stalled: StalledTransfer, time_s: float) -> None:
        newest = stalled.newest
        is_sure = newest.size_bytes >= MIN_TRANSFER_BYTES or time_s - stalled.since_s >= SURE_S
        # The last bytes may have moved faster since the newest sample.
        rate_bytes_per_s = max(newest.rate_bytes_per_s, newest.left_bytes / max(time_s - stalled.seen_s, 1e-3))
        if stalled.is_newest and is_sure and rate_bytes_per_s < self._rate_bytes_per_s:
            self._update_from_transfer(Rate(rate_bytes_per_s, TRANSFER_ERROR), SURE_S, time_s)
        self._stalled = None
        self.needs_probe = True

    # ---------------------------------------------------------------- the Kalman filter

    def _filter(self, log_rate: float, variance: float, time_s: float, *, is_sure: bool = False) -> None:
        self._variance += DRIFT**2 * max(time_s - self.updated_s, 0.0)
        self.updated_s = time_s
        known = math.log(self._rate_bytes_per_s)
        sigmas = (log_rate - known) / math.sqrt(self._variance + variance)
        candidates = self._outlier_candidates
        if abs(sigmas) <= OUTLIER_SIGMAS:
            candidates.clear()
            gain = self._variance / (self._variance + variance)
            self._rate_bytes_per_s = math.exp(known + gain * (log_rate - known))
            self._variance *= 1 - gain
            return
        if candidates and (candidates[-1][0] > known) != (sigmas > 0):
            candidates.clear()  # one above, one below: both are outliers
        candidates.append((log_rate, variance))
        agree = [
            log for log, noise in candidates if abs(log - log_rate) <= OUTLIER_SIGMAS * math.sqrt(noise + variance)
        ]
        if len(agree) > 1 or len(candidates) >= MAX_CANDIDATES or is_sure:
            self._rate_bytes_per_s = math.exp(statistics.fmean(agree))
            self._variance = variance + (statistics.pvariance(agree) if len(agree) > 1 else variance)
            candidates.clear()


def transfer_rate(size_bytes: int, receive_ms: float, rtt_ms: float) -> Rate | None:
    """Return the rate of a transfer, or None if it is too small or too short to measure.

    On an idle connection TCP waits for its first windows to be acknowledged; on a warm one it does not, and the time
    does not show which. So the rate lies between, and the error covers both. More bytes than slow start could have
    sent in that time came over a warm connection.

    Args: receive_ms: from the arrival of its first byte to that of its last one, as the cloud reports it.
    """
    if size_bytes < MIN_TRANSFER_BYTES or not MIN_TRANSFER_MS <= receive_ms < math.inf:  # false for NaN, too
        return None
    rounds = receive_ms / max(rtt_ms, 1e-3)
    slow_start_bytes = 2 * INITIAL_WINDOW_BYTES * 2.0 ** min(rounds, 60)
    waited_ms = 0.0
    if size_bytes < slow_start_bytes:
        windows_to_fill = math.log2(max(size_bytes / max(rounds, 1e-9) / INITIAL_WINDOW_BYTES, 1.0))
        waited_ms = min(windows_to_fill, rounds) * rtt_ms
    share = min(waited_ms / receive_ms, 0.9) / 2
    return Rate(size_bytes / receive_ms * 1e3 / (1 - share), TRANSFER_ERROR + share)
