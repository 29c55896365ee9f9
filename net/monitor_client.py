"""Measure uplink rate and RTT against the bandwidth service; bounded in bytes and in time.

A probe has 16 KB on the slowest links and 4 MB, three times, on the fastest; no probe takes more than 2 s.

python -m net.monitor_client -i 127.0.0.1 --monitor-port 9922 [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from net.access import OPEN, Access, access_of_edge
from net.bandwidth import (
    Burst,
    Echo,
    LinkEstimate,
    LinkSource,
    gap_free_burst,
    probe_rate_bytes_per_s,
    round_trip_ms,
)
from net.framing import HEADER_LIMITS
from net.messages import ErrorReply, Hello, Message, Ping, Pong, Probe, Samples, error_of
from net.net_utils import format_address, format_rate
from net.transport import Connection, connect
from utils.cli import address_parser, run_main
from utils.errors import AccessError, DeadlineError, NetworkError, ProtocolError
from utils.files import cache_directory, replace_file
from utils.timing import now_ms
from utils.units import bytes_per_s_to_mb_per_s, mb_per_s_to_bytes_per_s

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", Hello, Pong, Samples)

PINGS = 5
ANSWER_TIMEOUT_S = 1.0  # with the connect before it, a missing or silent service is reported within 2 s
PROBE_TIMEOUT_S = 2.0
# A first probe that a 1 Mbit/s link carries in an eighth of a second; larger ones only where they pass quickly.
PROBE_BYTES = (16_384, 131_072, 1_048_576, 4_194_304)
ENOUGH_BURST_US = 8_000  # this long a burst is measured to about a percent
SLOW_PROBE_MS, SLOW_BURST_US = 250.0, 80_000  # a probe that took this long is enough: time is bounded
REPEATS = 2  # with the first, three: the median forgives a reader that woke late


def measure_link(host: str, port: int, access: Access = OPEN) -> LinkEstimate:
    """Return rate and RTT of the uplink to the bandwidth service at ``host``.

    Raises: NetworkError: no service there, or it stopped answering.
    """
    with connect(host, port, HEADER_LIMITS, access) as connection:
        _use_loss_based_congestion_control(connection.sock)
        _exchange(connection, Hello.of(), Hello)
        echo = _echo(connection)
        rate_bytes_per_s = statistics.median(_probe_rates(connection, echo.rtt_ms))
    return LinkEstimate(rate_bytes_per_s, echo.rtt_ms, queue_ms=echo.queue_ms)


def ping_link(host: str, port: int, access: Access = OPEN) -> Echo:
    """Return RTT and load alone, for a few bytes.

    Raises: NetworkError: no service there, or it stopped answering.
    """
    with connect(host, port, HEADER_LIMITS, access) as connection:
        _exchange(connection, Hello.of(), Hello)
        return _echo(connection)


def _echo(connection: Connection) -> Echo:
    pings = [_ping(connection, sequence) for sequence in range(PINGS)]
    return Echo(round_trip_ms([echo.rtt_ms for echo in pings]), pings[-1].queue_ms)


def _probe_rates(connection: Connection, rtt_ms: float) -> list[float]:
    """Return the rates that probes tell of, in bytes/s: one on a slow link, three of a good size on a fast one."""
    rates: list[float] = []
    for size_bytes in PROBE_BYTES:
        start_ms = now_ms()
        try:
            burst, rate_bytes_per_s = _probe(connection, size_bytes, rtt_ms)
        except DeadlineError:
            if not rates:
                raise
            return rates[-1:]  # the link let a small probe pass at once, and holds the larger one back
        rates.append(rate_bytes_per_s)
        if now_ms() - start_ms > SLOW_PROBE_MS or burst.duration_us > SLOW_BURST_US:
            return [rate_bytes_per_s]
        if burst.duration_us >= ENOUGH_BURST_US and size_bytes > PROBE_BYTES[0]:
            break
    return [rate_bytes_per_s, *(_probe(connection, size_bytes, rtt_ms)[1] for _ in range(REPEATS))]


def _probe(connection: Connection, size_bytes: int, rtt_ms: float) -> tuple[Burst, float]:
    data = bytes(size_bytes)
    connection.send(Probe(size_bytes))
    start_ms = now_ms()
    connection.send_raw(data)
    samples = _receive(connection, Samples, PROBE_TIMEOUT_S)
    elapsed_ms = now_ms() - start_ms
    check_samples(samples, size_bytes)
    burst = gap_free_burst(samples.times_us, samples.sizes_bytes)
    return burst, probe_rate_bytes_per_s(burst, size_bytes, elapsed_ms, rtt_ms)


def check_samples(samples: Samples, size_bytes: int) -> None:
    """Refuse samples that cannot be those of a probe of ``size_bytes``.

    Raises: ProtocolError.
    """
    times_us, sizes_bytes = samples
    numbers = all(type(value) is int and value >= 0 for value in (*times_us, *sizes_bytes))
    if not (numbers and len(times_us) == len(sizes_bytes) and sum(sizes_bytes) == size_bytes):
        raise ProtocolError("the bandwidth service sent samples that do not add up to the probe")
    if any(after < before for before, after in itertools.pairwise(times_us)):
        raise ProtocolError("the bandwidth service sent samples whose times run backwards")


def _ping(connection: Connection, sequence: int) -> Echo:
    start_ms = now_ms()
    pong = _exchange(connection, Ping(sequence), Pong)
    return Echo(now_ms() - start_ms, pong.load_queue_ms)


def _exchange(connection: Connection, message: Message, answer: type[Answer]) -> Answer:
    connection.send(message)
    return _receive(connection, answer)


def _receive(connection: Connection, expected: type[Answer], wait_s: float = ANSWER_TIMEOUT_S) -> Answer:
    message = connection.receive(wait_s).message
    if isinstance(message, ErrorReply):
        raise error_of(message)
    if not isinstance(message, expected):
        raise ProtocolError(f"{connection.peer} sent {type(message).__name__} in place of {expected.__name__}")
    return message


def _use_loss_based_congestion_control(sock: socket.socket) -> None:
    """Pacing (bbr) would spread a probe over the round trip; reno sends windows at link rate."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    except (OSError, AttributeError):  # not this system, or not allowed: the default is used
        log.debug("congestion control of the probe stays the system's")


# ---------------------------------------------------------------- the last value, for when the service is away


def links_file() -> Path:
    """Return where the last estimate of every cloud is kept between runs."""
    return cache_directory() / "links.json"


def remember_link(host: str, port: int, estimate: LinkEstimate) -> None:
    """Keep an estimate for `last_link`; a cache that cannot be written is only a pity."""
    known = _known_links()
    known[format_address((host, port))] = [estimate.rate_bytes_per_s, estimate.rtt_ms, time.time()]
    try:
        replace_file(links_file(), json.dumps(known))
    except OSError as exc:
        log.debug("the link estimate was not kept: %s", exc)


def last_link(host: str, port: int) -> LinkEstimate | None:
    """Return the last estimate of the link to a service, with its age; None where there is none."""
    try:
        rate_bytes_per_s, rtt_ms, when_s = map(float, _known_links()[format_address((host, port))])
    except (KeyError, TypeError, ValueError):
        return None
    if not (0 < rate_bytes_per_s < math.inf and 0 <= rtt_ms < math.inf):
        return None
    return LinkEstimate(rate_bytes_per_s, rtt_ms, LinkSource.LAST, time.time() - when_s)


def _known_links() -> dict[str, list[float]]:
    try:
        known = json.loads(links_file().read_text())
    except (OSError, ValueError):
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
        return measured if rtt_ms is None else replace(measured, rtt_ms=rtt_ms)
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
        log.warning("bandwidth not measured (%s); using the value of %.0f s ago", exc, last.age_s)
        return last
    remember_link(host, port, estimate)
    return estimate


def main(argv: Sequence[str] | None = None) -> int:
    parser = address_parser("monitor_client.py", __doc__, port=False, monitor_port=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: a line)")
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    estimate = measure_link(args.ip, args.monitor_port, access_of_edge(args))
    if args.json:
        rate = bytes_per_s_to_mb_per_s(estimate.rate_bytes_per_s)
        print(json.dumps({"bandwidth_mb_per_s": rate, "rtt_ms": estimate.rtt_ms}))
    else:
        print(f"uplink {format_rate(estimate.rate_bytes_per_s)}, RTT {estimate.rtt_ms:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
