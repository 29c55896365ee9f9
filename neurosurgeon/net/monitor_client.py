"""Measure uplink rate and round trip against the bandwidth service; bounded in bytes and in time.

A measurement costs at most 200 KB, and as much again with --duplex. Each of its steps (`net.probe`) takes at most 3 s.
The last estimate of each service is kept in a file of the cache.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import TracebackType

from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.bandwidth import MAX_RATE_BYTES_PER_S, Echo
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import HEADER_LIMITS
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.probe import LinkProbe
from neurosurgeon.net.sockets import connect
from neurosurgeon.utils.errors import AccessError, NetworkError, NeurosurgeonError
from neurosurgeon.utils.files import DAMAGED, cache_directory, replace_file
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.units import mb_per_s_to_bytes_per_s

log = logging.getLogger(__name__)

RECENT_S = 60.0  # enough for a user who runs one task after another; later, a mobile link may have changed
MAX_KEPT_MS = 600_000.0  # a longer round trip in the file is damage

OnConnect = Callable[[Connection], None]


def measure_link(
    host: str,
    port: int,
    access: Access = OPEN,
    *,
    use_udp: bool = True,
    duplex: bool = False,
    quick: bool = False,
    on_connect: OnConnect = lambda connection: None,
) -> LinkEstimate:
    """Return rate and round trip of the link to the bandwidth service at ``host``. Blocks.

    Args:   use_udp: False: by TCP alone. duplex: measure the downlink, too.
            quick: for a fifth of the bytes, with a larger error.
            on_connect: receives the connection, which another thread may break off.
    Raises: NetworkError: no service there, or it no longer replies.
    """
    with connect(host, port, HEADER_LIMITS, access) as connection:
        on_connect(connection)
        return LinkProbe(connection).measure(use_udp=use_udp, duplex=duplex, quick=quick)


def ping_link(host: str, port: int, access: Access = OPEN, on_connect: OnConnect = lambda connection: None) -> Echo:
    """Return round trip and load alone, for a few bytes. Blocks.

    Args:   on_connect: see `measure_link`.
    Raises: NetworkError: no service there, or it no longer replies.
    """
    with connect(host, port, HEADER_LIMITS, access) as connection:
        on_connect(connection)
        return LinkProbe(connection).echo()


# ---------------------------------------------------------------- beside other work


class LinkMeasurement:
    """Measures the link in a child process while this one does other work; use it in a ``with`` block.

    A thread would share the interpreter's lock with that work: during an import of torch it measures exchanges up to
    60 ms too long, and takes up to seven times as long.
    """

    def __init__(self, measure: Callable[[], LinkEstimate]) -> None:
        context = multiprocessing.get_context("fork")
        self._reader, self._writer = context.Pipe(duplex=False)
        self._child = context.Process(target=_measure_into, args=(measure, self._writer), daemon=True)

    def __enter__(self) -> LinkMeasurement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End the child, whether or not it has finished."""
        if self._child.pid is not None:
            self._child.terminate()
            self._child.join()
        self._reader.close()
        self._writer.close()

    def start(self) -> None:
        """Start the measurement; does not block."""
        self._child.start()
        self._writer.close()  # the child has its own: when it ends, the pipe does

    def result(self) -> LinkEstimate:
        """Return the estimate, once; starts if `start` was not called. Blocks until the measurement ends.

        Raises: NeurosurgeonError: the child was killed. Any error of ``measure``.
        """
        if self._child.pid is None:
            self.start()
        try:
            found = self._reader.recv()
        except EOFError as exc:
            self._child.join()
            raise NeurosurgeonError(
                f"the process that measures the link ended with code {self._child.exitcode} and no result; "
                "pass --bandwidth MB/s"
            ) from exc
        if isinstance(found, Exception):
            raise found
        estimate: LinkEstimate = found
        return estimate


def _measure_into(measure: Callable[[], LinkEstimate], writer: Pipe) -> None:
    """Send the result or the error of ``measure`` through a pipe. Runs in the child."""
    os.setsid()  # Ctrl-C interrupts only the parent; and Linux divides the cores by session first, then by process
    try:
        writer.send(measure())
    except Exception as exc:
        exc.add_note(traceback.format_exc())  # pickling drops the traceback itself
        writer.send(exc)


# ---------------------------------------------------------------- the last estimates


def links_file() -> Path:
    """Return the file with the last estimate of the link to each service."""
    return cache_directory() / "links.json"


def remember_link(host: str, port: int, estimate: LinkEstimate) -> None:
    """Store an estimate for `last_link`; a failed write is logged."""
    links = _read_links()
    links[format_address((host, port))] = [estimate.rate_bytes_per_s, estimate.rtt_ms, time.time(), estimate.host_ms]
    try:
        replace_file(links_file(), json.dumps(links))
    except OSError as exc:
        log.debug("the link estimate was not stored: %s", exc)


def last_link(host: str, port: int) -> LinkEstimate | None:
    """Return the last estimate of the link to a service, with its age, or None."""
    try:
        rate_bytes_per_s, rtt_ms, when_s, *more = map(float, _read_links()[format_address((host, port))])
    except DAMAGED:
        return None
    host_ms = more[0] if more else 0.0  # releases before 0.2 did not store it
    times_fit = 0 <= rtt_ms <= MAX_KEPT_MS and 0 <= host_ms <= MAX_KEPT_MS
    if not (times_fit and 1.0 <= rate_bytes_per_s <= MAX_RATE_BYTES_PER_S):
        return None
    return LinkEstimate(rate_bytes_per_s, rtt_ms, LinkSource.LAST, time.time() - when_s, host_ms=host_ms)


def recent_link(host: str, port: int) -> LinkEstimate | None:
    """Return the last estimate of the link to a service if it is at most `RECENT_S` old, else None."""
    last = last_link(host, port)
    return last if last and 0 <= last.age_s <= RECENT_S else None


def _read_links() -> dict[str, list[float]]:
    try:
        links = json.loads(links_file().read_text())
    except (OSError, *DAMAGED):
        return {}
    return links if isinstance(links, dict) else {}


def given_or_measured(
    bandwidth_mb_per_s: float | None, rtt_ms: float | None, hello_ms: float, measure: Callable[[], LinkEstimate]
) -> LinkEstimate:
    """Return the link with the bandwidth and round trip that the user gave, and ``measure`` the others.

    Args:   hello_ms: the round trip to use if none is given or measured.
    Raises: NetworkError: the link could not be measured.
    """
    if bandwidth_mb_per_s is None:
        measured = measure()
        return measured if rtt_ms is None else measured._replace(rtt_ms=rtt_ms, host_ms=0.0, rtt_is_given=True)
    rate_bytes_per_s = mb_per_s_to_bytes_per_s(bandwidth_mb_per_s)
    return LinkEstimate(rate_bytes_per_s, hello_ms if rtt_ms is None else rtt_ms, LinkSource.GIVEN)


def estimate_link(host: str, port: int, access: Access = OPEN) -> LinkEstimate:
    """Measure the link and store the estimate; if the service is unreachable, return the last one with a warning.

    May block.

    Raises: AccessError: authentication failed. NetworkError: it is unreachable, and there is no last estimate.
    """
    try:
        estimate = measure_link(host, port, access)
    except AccessError:
        raise
    except NetworkError as exc:
        last = last_link(host, port)
        if last is None:
            raise type(exc)(f"bandwidth not measured: {exc} Or pass --bandwidth MB/s") from exc
        log.warning("bandwidth not measured (%s); using the value of %.0f s ago", exc, max(0.0, last.age_s))
        return last
    remember_link(host, port, estimate)
    return estimate
