"""The rate of a link from samples that come one by one: smooth while it is steady, quick when it changes, and unsure.

A Kalman filter of the logarithm of the rate, whose noise is the relative error of each sample (a random walk seen with
noise: Kalman, 1960). A sample that the filter cannot explain is kept aside: the next one that agrees with it, or the
third in a row on the same side, makes it the new rate; anything else makes it an outlier. What a transfer saw for long
is no accident: it counts at once.

A probe tells what the link can carry, tensors tell what TCP gets of it: less where packets are lost, or others send.
What they differ by is learnt while probes say that the link stays as it is, and taken off the probes that follow.
"""

from __future__ import annotations

import math
import statistics

from neurosurgeon.net.bandwidth import Rate

DRIFT = 0.2  # of the logarithm, in a second: by so much a link that nobody touches moves
SURPRISE = 3.0  # standard deviations that are no chance any more
ROW = 3  # samples in a row on one side: whatever they say of each other, the rate has changed
SURE_S = 0.5  # a transfer that took so long has seen the link, and no hiccup
STEADY = 0.15  # probes that differ by less see the same link
SHARE_GAIN = 0.5
SMALLEST_LOG_SHARE = math.log(0.02)
INITIAL_WINDOW_BYTES = 14_480  # of TCP, RFC 6928
TRANSFER_ERROR = 0.07  # of the rate that a tensor saw, on a connection that never waited
MAX_ERROR = 1.0


class RateFilter:
    """What is known of a rate, from samples with their errors; not thread-safe."""

    def __init__(self, first: Rate) -> None:
        self._log_rate = math.log(first.bytes_per_s)
        self._variance = first.error**2
        self._aside: list[tuple[float, float]] = []  # samples that surprise: logarithm, variance
        self._log_share = 0.0  # of a probe's rate that tensors get
        self._last_probe: float | None = None
        self._transfers: list[float] = []  # since the last probe

    @property
    def rate(self) -> Rate:
        """The rate of now; its error grows with time, and with every surprise."""
        return Rate(math.exp(self._log_rate), min(math.sqrt(self._variance), MAX_ERROR))

    @property
    def doubts(self) -> bool:
        """Whether the last sample surprised: another one would tell whether the rate has changed."""
        return bool(self._aside)

    def saw_probe(self, rate: Rate, elapsed_s: float) -> None:
        """Take in what a probe measured, ``elapsed_s`` after the last sample."""
        log_rate = math.log(rate.bytes_per_s)
        is_steady = self._last_probe is not None and abs(log_rate - self._last_probe) < STEADY
        if is_steady and len(self._transfers) > 1:
            log_share = max(SMALLEST_LOG_SHARE, min(statistics.median(self._transfers) - log_rate, 0.0))
            self._log_share += SHARE_GAIN * (log_share - self._log_share)
        self._last_probe = log_rate
        self._transfers.clear()
        self._take(log_rate + self._log_share, rate.error**2, elapsed_s)

    def saw_transfer(self, rate: Rate, elapsed_s: float, took_s: float = 0.0) -> None:
        """Take in the rate at which a tensor crossed, and for how long."""
        log_rate = math.log(rate.bytes_per_s)
        self._transfers = [*self._transfers[-8:], log_rate]
        self._take(log_rate, rate.error**2, elapsed_s, is_sure=took_s >= SURE_S)

    def _take(self, log_rate: float, variance: float, elapsed_s: float, *, is_sure: bool = False) -> None:
        self._variance += DRIFT**2 * max(elapsed_s, 0.0)
        surprise = (log_rate - self._log_rate) / math.sqrt(self._variance + variance)
        if abs(surprise) <= SURPRISE:
            self._aside.clear()
            self._move(log_rate, variance)
            return
        if self._aside and (self._aside[-1][0] > self._log_rate) != (surprise > 0):
            self._aside.clear()  # one above, one below: outliers, both
        self._aside.append((log_rate, variance))
        self._jump(is_sure)

    def _move(self, log_rate: float, variance: float) -> None:
        gain = self._variance / (self._variance + variance)
        self._log_rate += gain * (log_rate - self._log_rate)
        self._variance *= 1 - gain

    def _jump(self, is_sure: bool) -> None:
        """Begin anew at the samples that were kept aside, once they agree, or are many, or the last one is sure."""
        newest, noise = self._aside[-1]
        agree = [log for log, variance in self._aside if abs(log - newest) <= SURPRISE * math.sqrt(variance + noise)]
        if len(agree) < 2 and len(self._aside) < ROW and not is_sure:
            return
        self._log_rate = statistics.fmean(agree)
        self._variance = noise + (statistics.pvariance(agree) if len(agree) > 1 else noise)
        self._aside.clear()


def transfer_rate(size_bytes: int, receive_ms: float, rtt_ms: float) -> Rate:
    """Return the rate that a tensor saw, which took ``receive_ms`` from its first byte's arrival to its last one's.

    On an idle connection TCP waits for its first windows to be acknowledged, on a warm one it does not, and the time
    does not tell which: the rate lies between, and the error says how far apart they are. More than slow start could
    have brought in that time came on a warm one.
    """
    rounds = receive_ms / max(rtt_ms, 1e-3)
    slow_start_bytes = 2 * INITIAL_WINDOW_BYTES * 2.0 ** min(rounds, 60)
    waited_ms = 0.0
    if size_bytes < slow_start_bytes:
        windows_to_fill = math.log2(max(size_bytes / max(rounds, 1e-9) / INITIAL_WINDOW_BYTES, 1.0))
        waited_ms = min(windows_to_fill, rounds) * rtt_ms
    share = min(waited_ms / receive_ms, 0.9) / 2
    return Rate(size_bytes / receive_ms * 1e3 / (1 - share), TRANSFER_ERROR + share)
