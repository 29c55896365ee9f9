"""The current link estimate: measured passively while tensors are in flight, by probes while the link is idle.

Theory of operation. Two threads call a `LinkWatch`:

- the main loop reads the estimate (`now`), and records partial transfers and the figures of replies (`record_*`);
- a thread of the scheduler's pool calls `refresh` once an interval, and at once when a probe is wanted and the link is
  idle, unless a round of measurements still runs. There is one round at a time.

A lock guards the estimate, and no thread holds it while it waits. All samples of the rate go to one estimator
(`net.rate_filter`). A round of `refresh` consists of the measurements that `choose_measurement` returns:

    no probe is needed ── ping ──┬── still so ─────────────▶ end
                                 └── no more ──┐
    a probe is needed ─────────────────────────┴─ probe ──┬── as expected ──────────────▶ end
                                                          └── outlier ── second probe ──▶ end

No probe is needed while transfers measure the rate, or if the user gave it. A probe shares the link with tensors, so
none is sent beside large ones. A ping costs a few bytes; it brings the round trip and the load of the cloud.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.bandwidth import PING_BYTES, Echo, Rate
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.monitor_client import measure_link, ping_link
from neurosurgeon.net.rate_filter import (
    MIN_TRANSFER_BYTES,
    PartialSample,
    ProbeSample,
    RateFilter,
    TransferSample,
    transfer_rate,
)
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import ms_to_s, s_to_ms

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
STALE_INTERVALS = 3
KEPT_PINGS = 5  # the shortest is the round trip: the others waited for tensors
UDP_RETRY_PROBES = 30  # probes by TCP alone, before UDP is tried again
OLD_ERROR = 0.5  # the relative error of a stored rate, at least
LOAD_GAIN = (0.2, 0.5)  # of each new load; drawn for each edge, so that edges do not oscillate together


class LinkNow(NamedTuple):
    """The newest estimate, and the queue of the cloud."""

    link: LinkEstimate
    is_stale: bool
    queue_ms: float  # wait of a task in the cloud, smoothed
    outlier_bytes_per_s: float | None = None  # the newest sample, if it is held back as an outlier candidate
    wants_probe: bool = False  # a probe of the rate was requested


class Ping(NamedTuple):
    """Measure the round trip and the load of the cloud; ``wants_probe``: request a probe for when the link is idle."""

    wants_probe: bool = False


class Probe(NamedTuple):
    """Measure the rate, too; ``quick``: by a short train, which a token bucket may pass at more than the rate."""

    quick: bool
    is_second: bool = False


def choose_measurement(
    now: LinkNow, in_flight_bytes: int, interval_s: float = INTERVAL_S, last: Ping | Probe | None = None
) -> Ping | Probe | None:
    """Return the next measurement of a round, or None at its end.

    Args: in_flight_bytes: of the largest task without a reply. last: the measurement before it in this round.
    """
    link, outlier_bytes_per_s = now.link, now.outlier_bytes_per_s
    if isinstance(last, Probe):
        if last.is_second or outlier_bytes_per_s is None:
            return None
        # A fall is confirmed by another short train; a rise is not, because a token bucket passes a short train whole.
        return Probe(quick=outlier_bytes_per_s < link.rate_bytes_per_s, is_second=True)
    is_fresh = link.source is LinkSource.TRANSFERS and link.age_s < interval_s
    is_fresh &= outlier_bytes_per_s is None and not now.wants_probe
    # Small tensors measure no rate: a probe is sent beside them once the estimate is stale.
    is_small = 0 < in_flight_bytes < MIN_TRANSFER_BYTES
    is_busy = in_flight_bytes >= MIN_TRANSFER_BYTES or (is_small and not now.is_stale)
    if not (is_fresh or is_busy or link.source is LinkSource.GIVEN):
        return Probe(quick=True)
    if last:
        return None
    # Half an interval: a probe of the last round ended after that began, so its age is less than an interval.
    return Ping(wants_probe=is_small and link.age_s >= interval_s / 2)


class BandwidthService:
    """The service of a cloud, for one round of measurements at a time; another thread may `close` it."""

    def __init__(self, host: str, port: int, access: Access, *, udp_is_blocked: bool) -> None:
        self._address = (host, port, access)
        self._tcp_probes_left = UDP_RETRY_PROBES if udp_is_blocked else 0  # before UDP is tried again
        self._connection: Connection | None = None  # of the last measurement
        self._is_closed = False
        self.is_unreachable = False

    def ping(self) -> Echo:
        """Return the round trip and the load of the cloud. May block; raises NetworkError."""
        return ping_link(*self._address, on_connect=self._on_connect)

    def probe(self, *, quick: bool) -> LinkEstimate:
        """Return a measured link. May block; raises NetworkError."""
        use_udp = not self._tcp_probes_left
        measured = measure_link(*self._address, use_udp=use_udp, quick=quick, on_connect=self._on_connect)
        self._tcp_probes_left = UDP_RETRY_PROBES * measured.udp_is_blocked if use_udp else self._tcp_probes_left - 1
        return measured

    def record_outcome(self, error: NeurosurgeonError | None) -> None:
        """Log the first of several failures in a row."""
        if error and not (self.is_unreachable or self._is_closed):
            log.warning("the bandwidth is no longer measured: %s", error)
        self.is_unreachable = error is not None

    def close(self) -> None:
        """End the measurement that runs, and each one to come."""
        self._is_closed = True
        if self._connection:
            self._connection.break_off()

    def _on_connect(self, connection: Connection) -> None:
        self._connection = connection
        if self._is_closed:  # either this thread sees the flag, or `close` sees the connection
            connection.break_off()


class LinkWatch:
    """Keeps the estimate of the link to one cloud fresh; use it in a ``with`` block. Any thread may call it.

    Args: first: the estimate at the start. access: proves this side to the service.
          sending_bytes: returns the size of the largest task without a reply; 0: the link is idle.
    """

    def __init__(
        self,
        host: str,
        monitor_port: int,
        first: LinkEstimate,
        *,
        access: Access = OPEN,
        interval_s: float = INTERVAL_S,
        sending_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self._service = BandwidthService(host, monitor_port, access, udp_is_blocked=first.udp_is_blocked)
        self._interval_s = interval_s
        self._sending_bytes = sending_bytes
        self._scheduler = BackgroundScheduler()
        self._lock = threading.Lock()  # guards all below
        rate = Rate(first.rate_bytes_per_s, max(first.error, OLD_ERROR if first.age_s else 0.0))
        self._filter = RateFilter(rate, first.source, ms_to_s(now_ms()) - first.age_s)
        self._link = first  # but for its rate, error, source and age: `now` takes these from the filter
        self._pings_ms: deque[float] = deque([first.ping_ms], maxlen=KEPT_PINGS)
        self._queue_ms = 0.0
        self._load_gain = random.uniform(*LOAD_GAIN)  # noqa: S311  # no secret

    def __enter__(self) -> LinkWatch:
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # skipped runs are expected (max_instances)
        self._scheduler.add_job(
            self.refresh, "interval", seconds=self._interval_s, max_instances=1, coalesce=True, id="refresh"
        )
        self._scheduler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._service.close()
        self._scheduler.shutdown()

    @property
    def wants_probe(self) -> bool:
        """Whether the rate is to be probed as soon as the link is idle. A flag, read without the lock."""
        return self._filter.wants_probe

    def now(self) -> LinkNow:
        """Return the current estimate; does not wait for a measurement."""
        with self._lock:
            known = self._filter
            age_s = 0.0 if known.source is LinkSource.GIVEN else ms_to_s(now_ms()) - known.updated_s
            link = self._link._replace(
                rate_bytes_per_s=known.current_bytes_per_s, error=known.rate.error, source=known.source, age_s=age_s
            )
            is_stale = age_s > STALE_INTERVALS * self._interval_s
            return LinkNow(link, is_stale, self._queue_ms, known.outlier_bytes_per_s, known.wants_probe)

    # ---------------------------------------------------------------- passive measurements

    def record_progress(self, size_bytes: int, took_ms: float, left_bytes: int = 0) -> None:
        """Record the progress of the connection's transfers in flight.

        Args: size_bytes: moved in the last ``took_ms``, an upper bound. left_bytes: until the last byte that waits.
        """
        with self._lock:
            sample = PartialSample(size_bytes / ms_to_s(took_ms), size_bytes, left_bytes)
            self._filter.update(sample, ms_to_s(now_ms()))

    def record_transfer(self, size_bytes: int, receive_ms: float) -> None:
        """Record a transfer that took ``receive_ms`` from its first byte to its last to arrive in the cloud."""
        with self._lock:
            rate = transfer_rate(size_bytes, receive_ms, self._link.rtt_ms)
            self._filter.update(TransferSample(rate, ms_to_s(receive_ms)), ms_to_s(now_ms()))
        if self.wants_probe and not self._sending_bytes() and not self._service.is_unreachable:
            self._refresh_now()

    def record_exchange(self, exchange_ms: float, reply_bytes: int) -> None:
        """Record the round trip of a task, less the upload of its tensors and its time in the cloud.

        The time of the reply's own bytes is subtracted here.
        """
        with self._lock:
            reply_ms = s_to_ms((reply_bytes + PING_BYTES) / self._filter.rate.bytes_per_s)
            if 0 <= exchange_ms < math.inf:  # false for NaN, too
                self._record_ping(max(exchange_ms - reply_ms, 0.0))

    def record_load(self, queue_ms: float) -> None:
        """Record the recent wait of tasks in the cloud."""
        if 0 <= queue_ms < math.inf:  # false for NaN, too
            with self._lock:
                self._queue_ms += self._load_gain * (queue_ms - self._queue_ms)

    def _record_ping(self, ping_ms: float) -> None:
        self._pings_ms.append(ping_ms)
        if self._link.source is not LinkSource.GIVEN and not self._link.rtt_is_given:
            self._link = self._link._replace(rtt_ms=max(min(self._pings_ms) - self._link.host_ms, 0.0))

    # ---------------------------------------------------------------- active measurements

    def refresh(self) -> None:
        """Run one round of measurements; if the service is unreachable, the estimate ages. May block."""
        error: NeurosurgeonError | None = None
        last: Ping | Probe | None = None
        try:
            while last := choose_measurement(self.now(), self._sending_bytes(), self._interval_s, last):
                self._measure(last)
        except NeurosurgeonError as exc:
            error = exc
        self._service.record_outcome(error)

    def _measure(self, measurement: Ping | Probe) -> None:
        if isinstance(measurement, Ping):
            with self._lock:
                self._filter.wants_probe |= measurement.wants_probe
            echo = self._service.ping()
            with self._lock:
                rate_bytes_per_s = self._filter.rate.bytes_per_s
                self._record_ping(echo.rtt_ms(rate_bytes_per_s, rate_bytes_per_s))
            self.record_load(echo.queue_ms)
            return
        measured = self._service.probe(quick=measurement.quick)
        with self._lock:
            self._filter.update(ProbeSample(Rate(measured.rate_bytes_per_s, measured.error)), ms_to_s(now_ms()))
            host_ms = 0.0 if self._link.rtt_is_given else measured.host_ms
            self._link = self._link._replace(host_ms=host_ms, method=measured.method)
            self._record_ping(measured.ping_ms)
        self.record_load(measured.queue_ms)

    def _refresh_now(self) -> None:
        with contextlib.suppress(JobLookupError):  # the watch has not begun, or has just ended
            self._scheduler.modify_job("refresh", next_run_time=datetime.now(UTC))
