"""Measure uplink rate and RTT against the bandwidth service; bounded in bytes and in time.

A measurement costs at most 200 KB, and as much again with --duplex. Where datagrams do not leave this process as fast
as the link carries them, TCP's probe takes the place of some. No part takes more than 3 s.
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

YOUNG_S = 60.0  # long enough for a user who runs one task after another; later, a mobile link may be a different one
MAX_KEPT_MS = 600_000.0  # of a round trip that is kept; a longer one is damage

Began = Callable[[Connection], None]


def measure_link(
    host: str,
    port: int,
    access: Access = OPEN,
    *,
    use_udp: bool = True,
    duplex: bool = False,
    quick: bool = False,
    began: Began = lambda connection: None,
) -> LinkEstimate:
    """Return rate and RTT of the link to the bandwidth service at ``host``.

    Args:   use_udp: False: by TCP alone. duplex: measure the way from the service, too.
            quick: for a fifth of the bytes, and less surely.
            began: is given the connection, which another thread may break off.
    Raises: NetworkError: no service there, or it stopped answering.
    """
    with connect(host, port, HEADER_LIMITS, access) as connection:
        began(connection)
        found = LinkProbe(connection).measure(use_udp=use_udp, duplex=duplex, quick=quick)
    return LinkEstimate(
        found.up.bytes_per_s,
        found.rtt_ms,
        queue_ms=found.queue_ms,
        host_ms=found.host_ms,
        error=found.up.error,
        method=found.method,
        udp_is_blocked=found.udp_is_blocked,
        down_bytes_per_s=found.down.bytes_per_s if found.down else None,
        probe_bytes=found.size_bytes,
    )


def ping_link(host: str, port: int, access: Access = OPEN, began: Began = lambda connection: None) -> Echo:
    """Return RTT and load alone, for a few bytes.

    Args:   began: as of `measure_link`.
    Raises: NetworkError: no service there, or it stopped answering.
    """
    with connect(host, port, HEADER_LIMITS, access) as connection:
        began(connection)
        return LinkProbe(connection).echo()


# ---------------------------------------------------------------- beside other work


class LinkMeasurement:
    """Measures the link in a child process, while this one does other work; use it in a ``with`` block.

    A thread would share the interpreter's lock with that work: beside an import of torch, it reads exchanges up to
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
        """Begin to measure; returns at once."""
        self._child.start()
        self._writer.close()  # the child has its own: when it ends, the pipe does

    def result(self) -> LinkEstimate:
        """Return the estimate, once; starts if `start` was not called. Blocks until the measurement ends.

        Raises: what ``measure`` raised. NeurosurgeonError: the child was killed.
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
    """Send what ``measure`` returns or raises through a pipe (runs in the child)."""
    os.setsid()  # Ctrl-C is for the parent alone; and Linux shares the cores out by session before it does by process
    try:
        writer.send(measure())
    except Exception as exc:
        exc.add_note(traceback.format_exc())  # does not pass through the pipe otherwise
        writer.send(exc)


# ---------------------------------------------------------------- the last value, for when the service is away


def links_file() -> Path:
    """Return where the last estimate of every cloud is kept between runs."""
    return cache_directory() / "links.json"


def remember_link(host: str, port: int, estimate: LinkEstimate) -> None:
    """Keep an estimate for `last_link`; a cache that cannot be written is only a pity."""
    known = _known_links()
    known[format_address((host, port))] = [estimate.rate_bytes_per_s, estimate.rtt_ms, time.time(), estimate.host_ms]
    try:
        replace_file(links_file(), json.dumps(known))
    except OSError as exc:
        log.debug("the link estimate was not kept: %s", exc)


def last_link(host: str, port: int) -> LinkEstimate | None:
    """Return the last estimate of the link to a service, with its age; None where there is none."""
    try:
        rate_bytes_per_s, rtt_ms, when_s, *more = map(float, _known_links()[format_address((host, port))])
    except DAMAGED:
        return None
    host_ms = more[0] if more else 0.0  # releases before 0.2 did not keep it
    if not (
        1.0 <= rate_bytes_per_s <= MAX_RATE_BYTES_PER_S and all(0 <= ms <= MAX_KEPT_MS for ms in (rtt_ms, host_ms))
    ):
        return None
    return LinkEstimate(rate_bytes_per_s, rtt_ms, LinkSource.LAST, time.time() - when_s, host_ms=host_ms)


def young_link(host: str, port: int) -> LinkEstimate | None:
    """Return the last estimate of the link to a service if it is at most `YOUNG_S` old, else None."""
    last = last_link(host, port)
    return last if last and 0 <= last.age_s <= YOUNG_S else None


def _known_links() -> dict[str, list[float]]:
    try:
        known = json.loads(links_file().read_text())
    except (OSError, *DAMAGED):
        return {}
    return known if isinstance(known, dict) else {}


def given_or_measured(
    bandwidth_mb_per_s: float | None, rtt_ms: float | None, hello_ms: float, measure: Callable[[], LinkEstimate]
) -> LinkEstimate:
    """Return the link: what the user says, else what ``measure`` finds.

    Args:   hello_ms: a round trip that was seen, for when nothing is measured.
    Raises: NetworkError: neither is to be had.
    """
    if bandwidth_mb_per_s is None:
        measured = measure()
        return measured if rtt_ms is None else measured._replace(rtt_ms=rtt_ms, host_ms=0.0, rtt_is_given=True)
    rate_bytes_per_s = mb_per_s_to_bytes_per_s(bandwidth_mb_per_s)
    return LinkEstimate(rate_bytes_per_s, hello_ms if rtt_ms is None else rtt_ms, LinkSource.GIVEN)


def estimate_link(host: str, port: int, access: Access = OPEN) -> LinkEstimate:
    """Return a measured estimate and keep it; where the service is away, the last one with a warning.

    Raises: AccessError: it does not let us in. NetworkError: it is away, and there is no last value.
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
