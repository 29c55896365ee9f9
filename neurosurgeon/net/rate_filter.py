"""The one estimator of a link's rate: smooth while the link is steady, quick when it changes, and with an error.

Theory of operation. `RateFilter.update` takes every sample, of one of three kinds:

- a probe: the rate that the link can carry;
- a transfer: the rate at which the tensors of one task arrived, after the last byte;
- a partial transfer: the bytes of the connection that moved recently, while a transfer has not ended.

Probes and transfers go through a Kalman filter of the logarithm of the rate (a random walk seen with noise: Kalman,
1960). The noise of a sample is its relative error. A sample beyond `OUTLIER_SIGMAS` standard deviations is held back as
an outlier candidate. If the next one agrees with it, their mean is the new rate. After three in a row on one side, the
new rate is the mean of those that agree with the newest. A sample within the range drops all candidates, one beyond on
the other side replaces them. A transfer that took `SURE_S` is never held back.

Transfers read lower than probes: TCP gets less of a link where packets are lost, or others send. The filter learns the
ratio while probes show a steady link, and applies it to the probes that follow.

A partial transfer matters if it is much slower than the estimate. The transfer then is stalled:

    no stalled transfer ── partial transfer below STALLED_SHARE of the rate ──▶ stalled, newer than the last probe
    stalled, newer      ── probe ─────────────────────────────────────────────▶ stalled, older than the last probe
    stalled, older      ── partial transfer below STALLED_SHARE of the rate ──▶ stalled, newer
    stalled, any        ── end of a transfer ─────────────────────────────────▶ no stalled transfer, wants a probe

While it is stalled and newer, the current rate is at most that of its last bytes; no other state changes it. At its
end the rate of its last bytes is a sample, if it was observed for long enough. The mean over the whole transfer is
none, as the rate changed during it. A lost connection ends no transfer: until the next one ends, a probe limits the
effect of the stalled one.

A filter has no thread, no lock and no clock: `net.link_watch` owns it, guards it and passes the time.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from neurosurgeon.net.bandwidth import Rate
from neurosurgeon.utils.link import LinkSource

DRIFT = 0.2  # of the logarithm: the standard deviation that a second adds; variances add up
OUTLIER_SIGMAS = 3.0  # a sample beyond so many standard deviations is an outlier candidate
MAX_CANDIDATES = 3  # so many candidates in a row on one side are a new rate, even if they do not agree
SURE_S = 0.5  # a transfer that took so long saw the link, and no short pause
STEADY_LOG_RATIO = 0.15  # probes whose logarithms differ by less show a steady link
RATIO_GAIN = 0.5  # of each new ratio of transfers to probes
SMALLEST_LOG_RATIO = math.log(0.02)
INITIAL_WINDOW_BYTES = 14_480  # of TCP, RFC 6928
TRANSFER_ERROR = 0.07  # relative error of a transfer's rate, if its sender never waited for acknowledgements
MAX_ERROR = 1.0
KEPT_TRANSFERS = 9  # since the last probe
MIN_TRANSFER_BYTES, MIN_TRANSFER_MS = 65_536, 2.0  # the time of smaller or shorter ones shows clocks and wake-ups
STALLED_SHARE = 0.5  # of the estimate; a partial transfer that is slower is stalled


class ProbeSample(NamedTuple):
    """The rate that a probe measured."""

    rate: Rate


class TransferSample(NamedTuple):
    """The rate of a transfer that has ended."""

    rate: Rate | None  # None: it was too small or too short to measure
    took_s: float = 0.0


class PartialSample(NamedTuple):
    """The bytes of the connection that moved recently; their rate is an upper bound."""

    rate_bytes_per_s: float
    size_bytes: int
    left_bytes: int = 0  # until the last byte that waits has moved


Sample = ProbeSample | TransferSample | PartialSample


class StalledTransfer(NamedTuple):
    """A transfer in flight that is much slower than the estimate."""

    last_sample: PartialSample
    since_s: float  # time of its first slow sample
    sampled_s: float  # time of the last one
    is_newer: bool = True  # than the last probe


class RateFilter:
    """Estimates a rate from samples with their errors; see the head of this file. Not thread-safe.

    Args: source: a rate that the user gave (`LinkSource.GIVEN`) ignores all samples. time_s: of ``first``.
    """

    def __init__(self, first: Rate, source: LinkSource = LinkSource.PROBE, time_s: float = 0.0) -> None:
        self.wants_probe = False  # set where the samples since the last probe do not determine the rate
        self._rate_bytes_per_s = first.bytes_per_s
        self._variance = first.error**2  # of the logarithm
        self.source = source
        self.updated_s = time_s
        self._outlier_candidates: list[tuple[float, float]] = []  # logarithm, variance
        self._log_ratio = 0.0  # of the rate of transfers to that of probes: its logarithm
        self._last_probe: float | None = None  # its logarithm
        self._transfers: list[float] = []  # logarithms since the last probe
        self._stalled: StalledTransfer | None = None

    @property
    def rate(self) -> Rate:
        """The rate from probes and transfers that have ended; its error is that of the last sample."""
        return Rate(self._rate_bytes_per_s, min(math.sqrt(self._variance), MAX_ERROR))

    @property
    def current_bytes_per_s(self) -> float:
        """The rate that planning should use: that of a stalled transfer if it is newer and lower, else `rate`."""
        if self._stalled and self._stalled.is_newer:
            return min(self._rate_bytes_per_s, self._stalled.last_sample.rate_bytes_per_s)
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
                self._update_from_transfer(rate, time_s, is_sure=sample.took_s >= SURE_S)

    def _update_from_probe(self, rate: Rate, time_s: float) -> None:
        log_rate = math.log(rate.bytes_per_s)
        is_steady = self._last_probe is not None and abs(log_rate - self._last_probe) < STEADY_LOG_RATIO
        if is_steady and len(self._transfers) > 1:
            log_ratio = max(SMALLEST_LOG_RATIO, min(statistics.median(self._transfers) - log_rate, 0.0))
            self._log_ratio += RATIO_GAIN * (log_ratio - self._log_ratio)
        self._last_probe = log_rate
        self._transfers.clear()
        if self._stalled:
            self._stalled = self._stalled._replace(is_newer=False)
        self.wants_probe = False
        self.source = LinkSource.PROBE
        self._add_to_kalman(log_rate + self._log_ratio, rate.error**2, time_s)

    def _update_from_transfer(self, rate: Rate, time_s: float, *, is_sure: bool) -> None:
        log_rate = math.log(rate.bytes_per_s)
        self._transfers = [*self._transfers, log_rate][-KEPT_TRANSFERS:]
        self.source = LinkSource.TRANSFERS
        self._add_to_kalman(log_rate, rate.error**2, time_s, is_sure=is_sure)

    def _update_stalled(self, sample: PartialSample, time_s: float) -> None:
        is_slow = sample.rate_bytes_per_s < STALLED_SHARE * self._rate_bytes_per_s
        before = self._stalled
        if before:
            self._stalled = StalledTransfer(sample, before.since_s, time_s, is_slow or before.is_newer)
        elif is_slow:
            self._stalled = StalledTransfer(sample, time_s, time_s)

    def _end_stalled(self, stalled: StalledTransfer, time_s: float) -> None:
        last = stalled.last_sample
        is_sure = last.size_bytes >= MIN_TRANSFER_BYTES or time_s - stalled.since_s >= SURE_S
        # The last bytes may have moved faster since the last sample.
        rate_bytes_per_s = max(last.rate_bytes_per_s, last.left_bytes / max(time_s - stalled.sampled_s, 1e-3))
        if stalled.is_newer and is_sure and rate_bytes_per_s < self._rate_bytes_per_s:
            self._update_from_transfer(Rate(rate_bytes_per_s, TRANSFER_ERROR), time_s, is_sure=True)
        self._stalled = None
        self.wants_probe = True

    # ---------------------------------------------------------------- the Kalman filter

    def _add_to_kalman(self, log_rate: float, variance: float, time_s: float, *, is_sure: bool = False) -> None:
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
    does not show which. So the rate lies between, and the error covers both. If more bytes arrived than slow start
    allows in that time, the connection was warm.

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
    waiting = min(waited_ms / receive_ms, 0.9) / 2  # half of its share: whether it waited is not known
    return Rate(size_bytes / receive_ms * 1e3 / (1 - waiting), TRANSFER_ERROR + waiting)
