"""One measurement of a link over one connection to the bandwidth service: the round trip, then the rate.

Theory of operation. One thread does these steps, in this order, and each has a timeout:

    hello ─▶ TCP pings ─▶ UDP pings ──┬─ replied ─▶ short train ─▶ long train ─┬─▶ the rate of the trains
                                      │                                        └─ sender-limited ──┐
                                      └─ no reply: UDP is blocked ─────────────────────────────────┴─▶ TCP bursts

Trains measure the rate: packets that wait in the link's queue leave it at the link's rate, and the kernel stamps each
arrival (`net.trains`, `net.bandwidth`). A train that left this process hardly faster than it arrived is sender-limited:
the link may be faster. Then, and where UDP is blocked, the first windows of TCP measure the rate.

UDP pings bring the round trip: they wait for no process of the service, as the service sends how long it held each.
TCP pings bring the duration of an exchange, which a task waits for, and the load of the cloud.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from neurosurgeon.net.bandwidth import (
    MAX_RATE_BYTES_PER_S,
    Arrivals,
    Echo,
    Rate,
    gap_free_burst,
    less_bytes_ms,
    probe_rate_bytes_per_s,
    train_rate,
)
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.datagrams import (
    HEADER,
    IP_UDP_BYTES,
    KEPT_NS,
    MAX_DATAGRAM_BYTES,
    NONCE_BYTES,
    UDP_PING,
    VERSION,
    Datagrams,
    pack_datagram,
    unpack_datagram,
)
from neurosurgeon.net.messages import (
    AskTicket,
    AskTrain,
    ErrorReply,
    Hello,
    Message,
    Ping,
    Pong,
    Probe,
    Samples,
    Ticket,
    Train,
    error_of,
)
from neurosurgeon.net.trains import QUIET_S, TRAIN_TIMEOUT_S, Collector
from neurosurgeon.utils.errors import ConnectError, DeadlineError, PeerGoneError, ProtocolError
from neurosurgeon.utils.link import LinkEstimate, ProbeMethod
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", Hello, Pong, Samples, Ticket)

PINGS = 5
REPLY_TIMEOUT_S = 1.0  # after the connect before it, a missing or silent service is reported within 2 s
PROBE_TIMEOUT_S = TRAIN_TIMEOUT_S + REPLY_TIMEOUT_S
TCP_IP_BYTES = 52  # headers of a packet, with time stamps
# UDP, 190 KB at most: a short train, then one that is a little longer than the burst of a token bucket.
FULL_PACKETS, QUICK_PACKETS = (20, 100), (12,)
SENDER_LIMITED_PACKETS = 50  # with the TCP burst, 200 KB
MIN_TRAIN_PACKETS = 10  # a link that carries fewer in `TRAIN_S` gets no second train
TRAIN_S = 0.5
SENDER_SHARE = 0.7  # of the rate at which a train left: a higher measured rate is the sender's, not the link's
# TCP, 144 KB: a burst that fits into the first window, and a larger one if that was fast. After a sender-limited train:
# one that is larger than a packet of loopback.
PROBE_BYTES, SENDER_LIMITED_BYTES = (13_032, 131_072), (72_400,)
SLOW_BURST_MS = 250.0
MAX_TIME_US = 60_000_000  # more than any probe takes
UDP_PINGS, BLOCKED_PINGS, UDP_PING_TIMEOUT_S = 5, 2, 0.4
SHORT_RTT_MS, SHORT_RTT_PINGS = 5.0, 12  # below, the 0.1 ms that machines add matters: more pings
PONG_REST_BYTES = NONCE_BYTES + KEPT_NS.size
UDP_PING_BYTES = HEADER.size + PONG_REST_BYTES + IP_UDP_BYTES  # a pong is as long


class _UdpPong(NamedTuple):
    """The reply to a UDP ping."""

    nonce: bytes
    rtt_ms: float


class _UdpResult(NamedTuple):
    """The measurement by UDP, as far as UDP is not blocked."""

    up: Rate | None = None
    down: Rate | None = None
    rtt_ms: float | None = None
    is_sender_limited: bool = False


class LinkProbe:
    """Measures over one new connection. Its methods may block.

    Raises: NetworkError: the service closed the connection, did not reply in time, or is another one.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._datagram_bytes = 0
        self._train_numbers = itertools.count(1)
        connection.send_windows_at_once()
        self._serves_trains = self._exchange(Hello.of(), Hello).capabilities.get("trains") is True

    def echo(self) -> Echo:
        """Return the duration of an exchange, and the cloud's load, for a few bytes."""
        pings = [self._ping(sequence) for sequence in range(PINGS)]
        return Echo(statistics.median(echo.exchange_ms for echo in pings), pings[-1].queue_ms)

    def measure(self, *, use_udp: bool = True, duplex: bool = False, quick: bool = False) -> LinkEstimate:
        """Return the link; its ``host_ms`` is below 0 if pings pass faster than the rate, as through a token bucket.

        Args: duplex: measure the downlink, too. quick: by one short train, for a fifth of the bytes.
        """
        echo, udp = self.echo(), _UdpResult()
        if use_udp and self._serves_trains:
            udp = self._measure_by_udp(duplex, QUICK_PACKETS if quick else FULL_PACKETS)
        (up, method), down = self._choose_rate(udp, echo.exchange_ms, quick), udp.down
        exchange_ms = echo.rtt_ms(up.bytes_per_s, (down or up).bytes_per_s)
        rtt_ms = exchange_ms if udp.rtt_ms is None else udp.rtt_ms
        return LinkEstimate(
            up.bytes_per_s,
            rtt_ms,
            queue_ms=echo.queue_ms,
            host_ms=exchange_ms - rtt_ms,
            error=up.error,
            method=method,
            udp_is_blocked=use_udp and udp.up is None,
            down_bytes_per_s=down.bytes_per_s if down else None,
            probe_bytes=self._datagram_bytes + self._connection.sent_bytes + self._connection.received_bytes,
        )

    def _choose_rate(self, udp: _UdpResult, exchange_ms: float, quick: bool) -> tuple[Rate, ProbeMethod]:
        """Return the uplink's rate: by TCP if UDP is blocked, or the trains were sender-limited."""
        trains = udp.up
        if trains and not udp.is_sender_limited:
            return trains, ProbeMethod.UDP_TRAIN
        try:
            sizes_bytes = SENDER_LIMITED_BYTES if udp.is_sender_limited else PROBE_BYTES
            burst = self._burst_rate(exchange_ms, PROBE_BYTES[:1] if quick else sizes_bytes)
        except (DeadlineError, PeerGoneError):
            if trains is None:
                raise
            return trains, ProbeMethod.UDP_TRAIN
        # At the limit the clock was too coarse to measure the burst.
        if trains and not trains.bytes_per_s < burst.bytes_per_s < MAX_RATE_BYTES_PER_S:
            return trains, ProbeMethod.UDP_TRAIN
        return burst, ProbeMethod.TCP_BURST

    # ------------------------------------------------------------ by UDP

    def _measure_by_udp(self, duplex: bool, train_packets: Sequence[int]) -> _UdpResult:
        ticket = self._exchange(AskTicket(VERSION), Ticket)
        host = self._connection.sock.getpeername()[0]
        found = _UdpResult()
        try:
            with Datagrams.connected(host, ticket.udp_port) as datagrams:
                ping_ms = self._shortest_udp_ping_ms(datagrams, ticket.cookie)
                found = found if ping_ms is None else self._rate_up(datagrams, ticket, train_packets)
                if found.up and ping_ms is not None:
                    down = self._rate_down(datagrams, ticket) if duplex else None
                    bytes_ms = 2 * s_to_ms(UDP_PING_BYTES / found.up.bytes_per_s)
                    found = found._replace(down=down, rtt_ms=less_bytes_ms(ping_ms, bytes_ms))
        except (ConnectError, OverflowError) as exc:  # no route, or not a port
            log.debug("%s", exc)
        if not found.up:
            log.info("no rate by UDP to %s: measuring by TCP", self._connection.peer)
        return found

    def _rate_up(self, datagrams: Datagrams, ticket: Ticket, train_packets: Sequence[int]) -> _UdpResult:
        """Return the uplink's rate, if enough packets arrive, and whether the trains were sender-limited."""
        trains: list[Arrivals] = []
        rate, is_sender_limited = None, False
        for most in train_packets:
            packets = self._packets(min(most, SENDER_LIMITED_PACKETS) if is_sender_limited else most, rate)
            if packets < MIN_TRAIN_PACKETS:
                break
            number = next(self._train_numbers)
            self._connection.send(Train(number, packets))
            sending_s = datagrams.send_train(ticket.cookie, number, packets, self._packet_bytes())
            size_bytes = packets * self._wire_bytes()
            self._datagram_bytes += size_bytes
            samples = self._receive(Samples, PROBE_TIMEOUT_S)
            check_samples(samples, packets * self._packet_bytes(), is_whole=False)
            trains.append(_with_headers(samples))
            rate = train_rate(trains)
            if rate is None:
                return _UdpResult()
            # A long train that became sender-limited measures well enough, and leaves no bytes for TCP.
            may_be_limited = is_sender_limited or len(trains) == 1
            is_sender_limited = may_be_limited and sending_s * rate.bytes_per_s > SENDER_SHARE * size_bytes
        return _UdpResult(self._as_payload(rate) if rate else None, is_sender_limited=is_sender_limited)

    def _rate_down(self, datagrams: Datagrams, ticket: Ticket) -> Rate | None:
        trains: list[Arrivals] = []
        rate = None
        for most in FULL_PACKETS:
            packets = self._packets(most, rate)
            pong = self._ping_by_udp(datagrams, ticket.cookie, 0)
            if pong is None or packets < MIN_TRAIN_PACKETS:
                break
            collector = Collector(next(self._train_numbers), packets)
            self._connection.send(AskTrain(pong.nonce, collector.number, packets, self._packet_bytes()))
            trains.append(_with_headers(self._collect(datagrams, ticket.cookie, collector)))
            self._datagram_bytes += len(trains[-1][0]) * self._wire_bytes()
            rate = train_rate(trains)
            if rate is None:
                break
        if rate is None:
            log.info("UDP from %s is blocked: only the uplink is measured", self._connection.peer)
        return self._as_payload(rate) if rate else None

    def _shortest_udp_ping_ms(self, datagrams: Datagrams, cookie: bytes) -> float | None:
        """Return the shortest round trip of some UDP pings, or None if UDP is blocked: the first had no reply."""
        round_trips_ms: list[float] = []
        for sequence in range(1, SHORT_RTT_PINGS + 1):
            pong = self._ping_by_udp(datagrams, cookie, sequence)
            round_trips_ms += [pong.rtt_ms] if pong else []
            if sequence >= BLOCKED_PINGS and not round_trips_ms:
                return None
            if sequence >= UDP_PINGS and (min(round_trips_ms) > SHORT_RTT_MS or len(round_trips_ms) < sequence):
                break
        return min(round_trips_ms)

    def _ping_by_udp(self, datagrams: Datagrams, cookie: bytes, sequence: int) -> _UdpPong | None:
        """Return the reply to a UDP ping, or None at the timeout."""
        deadline_s = time.monotonic() + UDP_PING_TIMEOUT_S
        ping = pack_datagram(cookie, UDP_PING, sequence, UDP_PING_BYTES - IP_UDP_BYTES)
        start_ns = time.time_ns()  # read right before it is sent
        datagrams.send(ping)
        self._datagram_bytes += UDP_PING_BYTES
        while (left_s := deadline_s - time.monotonic()) > 0:
            arrival = datagrams.receive(left_s)
            pong = unpack_datagram(arrival.data) if arrival else None
            if not (arrival and pong and pong[:3] == (cookie, UDP_PING, sequence)):
                continue
            if len(pong.rest) == PONG_REST_BYTES:
                self._datagram_bytes += len(arrival.data) + IP_UDP_BYTES
                (kept_ns,) = KEPT_NS.unpack(pong.rest[NONCE_BYTES:])
                return _UdpPong(pong.rest[:NONCE_BYTES], max(arrival.time_ns - start_ns - kept_ns, 0) / 1e6)
        return None

    def _collect(self, datagrams: Datagrams, cookie: bytes, collector: Collector) -> Samples:
        deadline_s, wait_s = time.monotonic() + TRAIN_TIMEOUT_S, REPLY_TIMEOUT_S
        while not collector.is_complete and time.monotonic() < deadline_s:
            arrival = datagrams.receive(wait_s)
            if arrival is None:
                break
            wait_s = QUIET_S
            datagram = unpack_datagram(arrival.data)
            if datagram and datagram.cookie == cookie:
                collector.record(datagram, arrival)
        return collector.samples()

    def _packet_bytes(self) -> int:
        """Return the payload of a datagram as long as TCP's packets on this path."""
        return min(self._connection.segment_bytes() + TCP_IP_BYTES - IP_UDP_BYTES, MAX_DATAGRAM_BYTES)

    def _wire_bytes(self) -> int:
        """Return the size of such a datagram on the link, with its headers."""
        return self._packet_bytes() + IP_UDP_BYTES

    def _packets(self, most: int, rate: Rate | None) -> int:
        """Return the number of packets of a train: at most those of `TRAIN_S`, once a rate is known."""
        if rate is None:
            return most
        return min(most, round(TRAIN_S * rate.bytes_per_s / self._wire_bytes()))

    def _as_payload(self, rate: Rate) -> Rate:
        """Return the rate of TCP's payload on a link that carries packets at ``rate``."""
        segment_bytes = self._connection.segment_bytes()
        return Rate(rate.bytes_per_s * segment_bytes / (segment_bytes + TCP_IP_BYTES), rate.error)

    # ------------------------------------------------------------ by TCP

    def _burst_rate(self, rtt_ms: float, sizes_bytes: Sequence[int]) -> Rate:
        rates: list[float] = []
        for size_bytes in sizes_bytes:
            start_ms = now_ms()
            try:
                rates.append(self._burst(size_bytes, rtt_ms))
            except (DeadlineError, PeerGoneError):  # the timeout of the service is shorter
                if not rates:
                    raise
                break  # the small burst passed at once, and the link holds the larger one back
            if now_ms() - start_ms > SLOW_BURST_MS:
                break
        return Rate(rates[-1])

    def _burst(self, size_bytes: int, rtt_ms: float) -> float:
        self._connection.send(Probe(size_bytes))
        start_ms = now_ms()
        self._connection.send_raw(bytes(size_bytes))
        samples = self._receive(Samples, PROBE_TIMEOUT_S)
        elapsed_ms = now_ms() - start_ms
        check_samples(samples, size_bytes)
        burst = gap_free_burst(samples.times_us, samples.sizes_bytes)
        return probe_rate_bytes_per_s(burst, size_bytes, elapsed_ms, rtt_ms)

    # ------------------------------------------------------------ exchanges

    def _ping(self, sequence: int) -> Echo:
        start_ms = now_ms()
        pong = self._exchange(Ping(sequence), Pong)
        return Echo(now_ms() - start_ms, pong.load_queue_ms)

    def _exchange(self, message: Message, answer: type[Answer]) -> Answer:
        self._connection.send(message)
        return self._receive(answer)

    def _receive(self, expected: type[Answer], wait_s: float = REPLY_TIMEOUT_S) -> Answer:
        connection = self._connection
        message = connection.receive(wait_s).message
        if isinstance(message, ErrorReply):
            raise error_of(message)
        if not isinstance(message, expected):
            raise ProtocolError(f"{connection.peer} sent {type(message).__name__} in place of {expected.__name__}")
        return message


def _with_headers(samples: Samples) -> Arrivals:
    return samples.times_us, [size + IP_UDP_BYTES for size in samples.sizes_bytes]


def check_samples(samples: Samples, size_bytes: int, *, is_whole: bool = True) -> None:
    """Check the samples of a probe of ``size_bytes``.

    Args:   is_whole: False: packets may be missing.
    Raises: ProtocolError: they are impossible.
    """
    times_us, sizes_bytes = samples
    numbers = all(type(time) is int and 0 <= time <= MAX_TIME_US for time in times_us)
    numbers &= all(type(size) is int and size > 0 for size in sizes_bytes)
    arrived_bytes = sum(sizes_bytes) if numbers else -1
    adds_up = arrived_bytes == size_bytes if is_whole else 0 <= arrived_bytes <= size_bytes
    if not (adds_up and len(times_us) == len(sizes_bytes)):
        raise ProtocolError("the bandwidth service sent samples that do not add up to the probe")
    if any(after < before for before, after in itertools.pairwise(times_us)):
        raise ProtocolError("the bandwidth service sent samples whose times run backwards")
