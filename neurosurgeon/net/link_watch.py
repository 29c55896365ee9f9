"""The uplink as of now: measured in the background, and by every tensor that crosses.

A probe costs bytes, and shares the link with tensors. So none is sent while tensors tell the rate themselves: the
cloud says how long each took to arrive. Pings go out every time; they bring the round trip, and the cloud's load.
`net.rate_filter` joins what probes and tensors say; a probe that surprises it is followed by another one at once.
While a tensor crosses much more slowly than expected, the link is taken to be as slow as that.
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

from apscheduler.job import Job
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler

from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.bandwidth import PING_BYTES, Echo, Rate
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.monitor_client import measure_link, ping_link
from neurosurgeon.net.rate_filter import SURE_S, TRANSFER_ERROR, RateFilter, transfer_rate
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S, ms_to_s, s_to_ms

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
STALE_INTERVALS = 3
KEPT_PINGS = 5  # the shortest is the round trip: the others waited behind tensors
MIN_TRANSFER_BYTES, MIN_TRANSFER_MS = 65_536, 2.0  # shorter ones tell of clocks and wake-ups
SLOW = 0.5  # of the estimate: bytes that move at less are on another link than the one that was measured
UDP_AGAIN = 30  # probes by TCP alone, after which UDP may pass again
UNSURE = 0.5  # the relative error of a rate from another day
LOAD_GAIN = (0.2, 0.5)  # of each new load; drawn for each edge, so that edges do not swing together


class LinkNow(NamedTuple):
    """The newest estimate, how old it is, and what the cloud's queue is like."""

    link: LinkEstimate
    is_stale: bool
    queue_ms: float  # what a task waits in the cloud, smoothed


class Slow(NamedTuple):
    """How the newest bytes moved of a tensor that is slow on its way."""

    rate_bytes_per_s: float
    size_bytes: int
    since_ms: float  # when it began to be slow
    left_bytes: int  # that had not moved
    seen_ms: float
    is_newest: bool = True  # no probe has told of the link since

    def end_rate_bytes_per_s(self, time_ms: float) -> float:
        """Return how fast its last bytes were, now that all have arrived: looks may be far apart."""
        return max(self.rate_bytes_per_s, self.left_bytes / max(ms_to_s(time_ms - self.seen_ms), 1e-3))


class LinkWatch:
    """Keeps the estimate of the link to one cloud fresh; use it in a ``with`` block.

    Args: first: what is known at the start. access: what the service asks for.
          sending_bytes: how large the largest tensor is that crosses right now.
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
        self._service = (host, monitor_port, access)
        self._interval_s = interval_s
        self._sending_bytes = sending_bytes
        self._lock = threading.Lock()
        self._link = first
        self._since_ms = now_ms() - s_to_ms(first.age_s)
        self._filter = RateFilter(Rate(first.rate_bytes_per_s, max(first.error, UNSURE if first.age_s else 0.0)))
        self._probes_by_tcp = UDP_AGAIN if first.udp_is_blocked else 0  # so many are to come
        self._pings_ms: deque[float] = deque([first.ping_ms], maxlen=KEPT_PINGS)
        self._slow: Slow | None = None  # while a tensor is, and until one has arrived
        self.wants_probe = False  # once no tensor crosses
        self._queue_ms = 0.0
        self._gain = random.uniform(*LOAD_GAIN)  # noqa: S311  # no secret
        self._is_away = False
        self._asking: Connection | None = None  # the service
        self._is_over = False
        self._scheduler = BackgroundScheduler()
        self._job: Job | None = None

    def __enter__(self) -> LinkWatch:
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a run that is skipped is as it should be
        self._job = self._scheduler.add_job(
            self.refresh, "interval", seconds=self._interval_s, max_instances=1, coalesce=True
        )
        self._scheduler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._job = None  # an answer may still come
        with self._lock:
            self._is_over = True
            if self._asking:
                self._asking.break_off()  # nobody waits for it any more
        self._scheduler.shutdown()

    def now(self) -> LinkNow:
        """Return what is known now; never waits for a measurement."""
        with self._lock:
            age_s = 0.0 if self._link.source is LinkSource.GIVEN else (now_ms() - self._since_ms) / MS_PER_S
            is_stale = age_s > STALE_INTERVALS * self._interval_s
            known = self._link.rate_bytes_per_s
            slow = self._slow if self._slow and self._slow.is_newest else None
            rate_bytes_per_s = min(known, slow.rate_bytes_per_s) if slow else known
            link = self._link._replace(rate_bytes_per_s=rate_bytes_per_s, age_s=age_s)
            return LinkNow(link, is_stale, self._queue_ms)

    def saw_progress(self, size_bytes: int, took_ms: float, left_bytes: int = 0) -> None:
        """Take in how much, at most, of a tensor that is still on its way moved of late.

        Where that is slow, it holds until more moves, or until the next measurement.
        """
        rate_bytes_per_s = size_bytes / ms_to_s(took_ms)
        with self._lock:
            is_slow = rate_bytes_per_s < SLOW * self._link.rate_bytes_per_s
            if self._link.source is not LinkSource.GIVEN and (is_slow or self._slow):
                since_ms = self._slow.since_ms if self._slow else now_ms()
                is_newest = is_slow or self._slow is None or self._slow.is_newest
                self._slow = Slow(rate_bytes_per_s, size_bytes, since_ms, left_bytes, now_ms(), is_newest)

    def saw_transfer(self, size_bytes: int, receive_ms: float) -> None:
        """Take in that a tensor took ``receive_ms`` from its first byte to its last to arrive in the cloud.

        One that was slow on its way tells how fast its last bytes were; the whole of it saw more than one link.
        """
        if self._saw_slow_one():
            return
        if size_bytes < MIN_TRANSFER_BYTES or not MIN_TRANSFER_MS <= receive_ms < math.inf:
            if self.wants_probe and not self._sending_bytes():
                self._refresh_now()
            return
        with self._lock:
            seen = transfer_rate(size_bytes, receive_ms, self._link.rtt_ms)
            self._filter.saw_transfer(seen, self._since_last_s(), ms_to_s(receive_ms))
            self._set_rate(LinkSource.TRANSFERS)

    def _saw_slow_one(self) -> bool:
        with self._lock:
            slow, self._slow = self._slow, None
            if slow is None:
                return False
            is_sure = slow.size_bytes >= MIN_TRANSFER_BYTES or now_ms() - slow.since_ms >= s_to_ms(SURE_S)
            rate_bytes_per_s = slow.end_rate_bytes_per_s(now_ms())
            if slow.is_newest and is_sure and rate_bytes_per_s < self._link.rate_bytes_per_s:
                self._filter.saw_transfer(Rate(rate_bytes_per_s, TRANSFER_ERROR), self._since_last_s(), SURE_S)
                self._set_rate(LinkSource.TRANSFERS)
            self.wants_probe = True
        self._refresh_now()
        return True

    def _refresh_now(self) -> None:
        if job := self._job:
            with contextlib.suppress(JobLookupError):  # the watch has just ended
                job.modify(next_run_time=datetime.now(UTC))

    def saw_exchange(self, exchange_ms: float, reply_bytes: int) -> None:
        """Take in what a task's round trip took beyond its tensors' way up and its time in the cloud."""
        with self._lock:
            reply_ms = s_to_ms((reply_bytes + PING_BYTES) / self._link.rate_bytes_per_s)
            if 0 <= exchange_ms < math.inf:  # false for NaN, too
                self._saw_exchange(max(exchange_ms - reply_ms, 0.0))

    def saw_load(self, queue_ms: float) -> None:
        """Take in what tasks wait in the cloud of late."""
        if 0 <= queue_ms < math.inf:  # false for NaN, too
            with self._lock:
                self._queue_ms += self._gain * (queue_ms - self._queue_ms)

    def refresh(self) -> None:
        """Ask the bandwidth service once; where it is away, what is known grows old."""
        try:
            if self._is_told_by_tensors():
                if 0 < self._sending_bytes() < MIN_TRANSFER_BYTES and self.now().link.age_s >= self._interval_s / 2:
                    self.wants_probe = True  # the last one ended a while after its interval had begun
                self._saw_echo(ping_link(*self._service, began=self._began))
            if not self._is_told_by_tensors():  # any more
                self._probe_until_sure()
        except NeurosurgeonError as exc:
            if not (self._is_away or self._is_over):
                log.warning("the bandwidth is no longer measured: %s", exc)
            self._is_away = True
        else:
            self._is_away = False

    def _began(self, connection: Connection) -> None:
        with self._lock:
            self._asking = connection
            if self._is_over:
                connection.break_off()

    def _is_told_by_tensors(self) -> bool:
        """Whether a probe would only stand in the way: tensors cross, or crossed just now, or nobody asks."""
        now, sending_bytes = self.now(), self._sending_bytes()
        known = now.link
        is_fresh = known.source is LinkSource.TRANSFERS and known.age_s < self._interval_s and not self._filter.doubts
        is_fresh &= not self.wants_probe
        # Small tensors tell no rate: where all are small, a probe goes beside them once the estimate is stale.
        tells = sending_bytes >= MIN_TRANSFER_BYTES or (sending_bytes > 0 and not now.is_stale)
        return is_fresh or known.source is LinkSource.GIVEN or tells

    def _probe_until_sure(self) -> None:
        self.wants_probe = False
        before_bytes_per_s = self.now().link.rate_bytes_per_s
        measured = self._probe(quick=True)
        if self._filter.doubts:  # a token bucket lets a short train pass whole
            self._probe(quick=measured.rate_bytes_per_s < before_bytes_per_s)

    def _probe(self, *, quick: bool) -> LinkEstimate:
        tries_udp = not self._probes_by_tcp
        measured = measure_link(*self._service, use_udp=tries_udp, quick=quick, began=self._began)
        self._probes_by_tcp = UDP_AGAIN * measured.udp_is_blocked if tries_udp else self._probes_by_tcp - 1
        with self._lock:
            self._slow = self._slow and self._slow._replace(is_newest=False)
            self._filter.saw_probe(Rate(measured.rate_bytes_per_s, measured.error), self._since_last_s())
            self._set_rate(LinkSource.PROBE)
            host_ms = 0.0 if self._link.rtt_is_given else measured.host_ms
            self._link = self._link._replace(host_ms=host_ms, method=measured.method)
            self._saw_exchange(measured.ping_ms)
        self.saw_load(measured.queue_ms)
        return measured

    def _saw_echo(self, echo: Echo) -> None:
        with self._lock:
            rate_bytes_per_s = self._link.rate_bytes_per_s
            self._saw_exchange(echo.rtt_ms(rate_bytes_per_s, rate_bytes_per_s))
        self.saw_load(echo.queue_ms)

    def _saw_exchange(self, exchange_ms: float) -> None:
        self._pings_ms.append(exchange_ms)
        if self._link.source is not LinkSource.GIVEN and not self._link.rtt_is_given:
            self._link = self._link._replace(rtt_ms=max(min(self._pings_ms) - self._link.host_ms, 0.0))

    def _since_last_s(self) -> float:
        return (now_ms() - self._since_ms) / MS_PER_S

    def _set_rate(self, source: LinkSource) -> None:
        if self._link.source is not LinkSource.GIVEN:
            rate = self._filter.rate
            self._link = self._link._replace(rate_bytes_per_s=rate.bytes_per_s, error=rate.error, source=source)
            self._since_ms = now_ms()
