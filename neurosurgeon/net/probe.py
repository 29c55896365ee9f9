"""One measurement of a link over one connection to the bandwidth service: round trip, then rate.

The rate by UDP trains: packets that wait in the link's queue leave it at the link's rate, and the kernel tells when
each arrived. Where UDP is blocked, or the link is faster than this process sends, by TCP's first windows.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from neurosurgeon.net.bandwidth import (
    MAX_RATE_BYTES_PER_S,
    Arrivals,
    Burst,
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
    KEPT,
    KNOCK,
    MAX_DATAGRAM_BYTES,
    NONCE_BYTES,
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
from neurosurgeon.utils.link import ProbeMethod
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", Hello, Pong, Samples, Ticket)

PINGS = 5
ANSWER_TIMEOUT_S = 1.0  # with the connect before it, a missing or silent service is reported within 2 s
PROBE_TIMEOUT_S = TRAIN_TIMEOUT_S + ANSWER_TIMEOUT_S
TCP_IP_BYTES = 52  # headers of a packet, with time stamps
# By UDP, 190 KB at most: a short train, then one that outlasts a token bucket's burst, but not long.
MOST_PACKETS, QUICK_PACKETS = (20, 100), (12,)
OUTRUN_PACKETS = 50  # beside TCP's probe: 200 KB together
HOPELESS_PACKETS = 10  # so few in that time: the first train has to be enough
TRAIN_S = 0.5
SENDER_SHARE = 0.7  # a rate this close to the one at which a train left is the sender's, not the link's
# By TCP, 144 KB: a probe that fits into TCP's first window, and a larger one where that was quick. Where the link has
# outrun a train: one of more than a packet of loopback.
PROBE_BYTES, OUTRUN_BYTES = (13_032, 131_072), (72_400,)
SLOW_PROBE_MS = 250.0
MAX_TIME_US = 60_000_000  # no probe takes so long
KNOCKS, HOPELESS_KNOCKS, KNOCK_WAIT_S = 5, 2, 0.4
SHORT_MS, SHORT_KNOCKS = 5.0, 12  # of a round trip to which the tenth of a millisecond matters that machines add
KNOCK_REST = NONCE_BYTES + KEPT.size
KNOCK_BYTES = HEADER.size + KNOCK_REST + IP_UDP_BYTES  # the answer is as long


@dataclass(frozen=True, slots=True)
class Probed:
    """What a measurement found."""

    up: Rate
    down: Rate | None
    method: ProbeMethod
    rtt_ms: float
    udp_is_blocked: bool
    host_ms: float  # what an exchange takes beyond it; below 0 where its bytes pass quicker, as through a token bucket
    queue_ms: float
    size_bytes: int  # that crossed, both ways


class _Knock(NamedTuple):
    """The answer to a knock."""

    nonce: bytes
    rtt_ms: float


class _ByUdp(NamedTuple):
    """What UDP told, if anything."""

    up: Rate | None = None
    down: Rate | None = None
    rtt_ms: float | None = None
    outran: bool = False  # the link may be faster: the train did not leave much faster than it arrived


class LinkProbe:
    """Measures by one connection, on which nothing has been said yet.

    Raises: NetworkError: the service left, fell silent, or is none.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._datagram_bytes = 0
        self._trains = itertools.count(1)
        connection.send_windows_at_once()
        self._serves_trains = self._exchange(Hello.of(), Hello).capabilities.get("trains") is True

    def echo(self) -> Echo:
        """Return how long an exchange takes, and the cloud's load, for a few bytes."""
        pings = [self._ping(sequence) for sequence in range(PINGS)]
        return Echo(statistics.median(echo.exchange_ms for echo in pings), pings[-1].queue_ms)

    def measure(self, *, use_udp: bool = True, duplex: bool = False, quick: bool = False) -> Probed:
        """Return rate and RTT; ``duplex``: of both ways. ``quick``: by one short train, for a fifth of the bytes."""
        echo, by_udp = self.echo(), _ByUdp()
        if use_udp and self._serves_trains:
            by_udp = self._measure_by_udp(duplex, QUICK_PACKETS if quick else MOST_PACKETS)
        (up, method), down = self._rate(by_udp, echo.exchange_ms, quick), by_udp.down
        exchange_ms = echo.rtt_ms(up.bytes_per_s, (down or up).bytes_per_s)
        rtt_ms = exchange_ms if by_udp.rtt_ms is None else by_udp.rtt_ms
        return Probed(
            up,
            down,
            method,
            rtt_ms,
            udp_is_blocked=use_udp and by_udp.up is None,
            host_ms=exchange_ms - rtt_ms,
            queue_ms=echo.queue_ms,
            size_bytes=self._size_bytes(),
        )

    def _rate(self, by_udp: _ByUdp, exchange_ms: float, quick: bool) -> tuple[Rate, ProbeMethod]:
        """Return the uplink's rate; TCP is asked where UDP is blocked, or the link outran the trains."""
        trains = by_udp.up
        if trains and not by_udp.outran:
            return trains, ProbeMethod.UDP_TRAIN
        try:
            sizes_bytes = OUTRUN_BYTES if by_udp.outran else PROBE_BYTES
            burst = self._burst_rate(exchange_ms, PROBE_BYTES[:1] if quick else sizes_bytes)
        except (DeadlineError, PeerGoneError):
            if trains is None:
                raise
            return trains, ProbeMethod.UDP_TRAIN
        if trains and not trains.bytes_per_s < burst.bytes_per_s < MAX_RATE_BYTES_PER_S:  # the limit tells nothing
            return trains, ProbeMethod.UDP_TRAIN
        return burst, ProbeMethod.TCP_BURST

    # ------------------------------------------------------------ by UDP

    def _measure_by_udp(self, duplex: bool, most_packets: Sequence[int]) -> _ByUdp:
        ticket = self._exchange(AskTicket(VERSION), Ticket)
        host = self._connection.sock.getpeername()[0]
        found = _ByUdp()
        try:
            with Datagrams.connected(host, ticket.udp_port) as datagrams:
                knock_ms = self._shortest_knock_ms(datagrams, ticket.cookie)
                found = found if knock_ms is None else self._rate_up(datagrams, ticket, most_packets)
                if found.up and knock_ms is not None:
                    down = self._rate_down(datagrams, ticket) if duplex else None
                    bytes_ms = 2 * s_to_ms(KNOCK_BYTES / found.up.bytes_per_s)
                    found = found._replace(down=down, rtt_ms=less_bytes_ms(knock_ms, bytes_ms))
        except (ConnectError, OverflowError) as exc:  # no way there, or no port
            log.debug("%s", exc)
        if not found.up:
            log.info("no rate by UDP to %s: measuring by TCP", self._connection.peer)
        return found

    def _rate_up(self, datagrams: Datagrams, ticket: Ticket, most_packets: Sequence[int]) -> _ByUdp:
        """Return the uplink's rate, where enough packets arrive, and whether the link may be faster."""
        trains: list[Arrivals] = []
        rate, outran = None, False
        for most in most_packets:
            packets = self._packets(min(most, OUTRUN_PACKETS) if outran else most, rate)
            if packets < HOPELESS_PACKETS:
                break
            number = next(self._trains)
            self._connection.send(Train(number, packets))
            sending_s = datagrams.send_train(ticket.cookie, number, packets, self._packet_bytes())
            self._datagram_bytes += packets * (self._packet_bytes() + IP_UDP_BYTES)
            samples = self._receive(Samples, PROBE_TIMEOUT_S)
            check_samples(samples, packets * self._packet_bytes(), is_whole=False)
            trains.append(self._on_the_wire(samples))
            rate = train_rate(trains)
            if rate is None:
                return _ByUdp()
            is_senders = sending_s * rate.bytes_per_s > SENDER_SHARE * packets * (self._packet_bytes() + IP_UDP_BYTES)
            outran = is_senders and (outran or len(trains) == 1)  # a long train tells enough, and leaves TCP no bytes
        return _ByUdp(self._as_payload(rate) if rate else None, outran=outran)

    def _rate_down(self, datagrams: Datagrams, ticket: Ticket) -> Rate | None:
        trains: list[Arrivals] = []
        rate = None
        for most in MOST_PACKETS:
            packets = self._packets(most, rate)
            knock = self._knock(datagrams, ticket.cookie, 0)
            if knock is None or packets < HOPELESS_PACKETS:
                break
            collector = Collector(next(self._trains), packets)
            self._connection.send(AskTrain(knock.nonce, collector.number, packets, self._packet_bytes()))
            trains.append(self._on_the_wire(self._collect(datagrams, ticket.cookie, collector)))
            self._datagram_bytes += len(trains[-1][0]) * (self._packet_bytes() + IP_UDP_BYTES)
            rate = train_rate(trains)
            if rate is None:
                break
        if rate is None:
            log.info("UDP from %s is blocked: only the uplink is measured", self._connection.peer)
        return self._as_payload(rate) if rate else None

    def _shortest_knock_ms(self, datagrams: Datagrams, cookie: bytes) -> float | None:
        """Return the round trip of a knock; None where UDP is blocked: the first ones had no answer."""
        answered_ms: list[float] = []
        for sequence in range(1, SHORT_KNOCKS + 1):
            knock = self._knock(datagrams, cookie, sequence)
            answered_ms += [knock.rtt_ms] if knock else []
            if sequence >= HOPELESS_KNOCKS and not answered_ms:
                return None
            if sequence >= KNOCKS and (min(answered_ms) > SHORT_MS or len(answered_ms) < sequence):
                break
        return min(answered_ms)

    def _knock(self, datagrams: Datagrams, cookie: bytes, sequence: int) -> _Knock | None:
        """Return what the service answers by UDP; None where nothing came."""
        deadline_s = time.monotonic() + KNOCK_WAIT_S
        question = pack_datagram(cookie, KNOCK, sequence, KNOCK_BYTES - IP_UDP_BYTES)
        start_ns = time.time_ns()  # right before it leaves
        datagrams.send(question)
        self._datagram_bytes += KNOCK_BYTES
        while (left_s := deadline_s - time.monotonic()) > 0:
            arrival = datagrams.receive(left_s)
            answer = unpack_datagram(arrival.data) if arrival else None
            if arrival and answer and answer[:3] == (cookie, KNOCK, sequence) and len(answer.rest) == KNOCK_REST:
                self._datagram_bytes += len(arrival.data) + IP_UDP_BYTES
                (kept_ns,) = KEPT.unpack(answer.rest[NONCE_BYTES:])
                return _Knock(answer.rest[:NONCE_BYTES], max(arrival.time_ns - start_ns - kept_ns, 0) / 1e6)
        return None

    def _collect(self, datagrams: Datagrams, cookie: bytes, collector: Collector) -> Samples:
        deadline_s, wait_s = time.monotonic() + TRAIN_TIMEOUT_S, ANSWER_TIMEOUT_S
        while not collector.is_complete and time.monotonic() < deadline_s:
            arrival = datagrams.receive(wait_s)
            if arrival is None:
                break
            wait_s = QUIET_S
            datagram = unpack_datagram(arrival.data)
            if datagram and datagram.cookie == cookie:
                collector.take(datagram, arrival)
        return collector.samples()

    def _packet_bytes(self) -> int:
        """Return the payload of a datagram as long as TCP's packets on this path."""
        return min(self._connection.segment_bytes() + TCP_IP_BYTES - IP_UDP_BYTES, MAX_DATAGRAM_BYTES)

    def _packets(self, most: int, rate: Rate | None) -> int:
        """Return how many packets a train should have: no more than fit into `TRAIN_S`, once the rate is known."""
        if rate is None:
            return most
        return min(most, round(TRAIN_S * rate.bytes_per_s / (self._packet_bytes() + IP_UDP_BYTES)))

    def _on_the_wire(self, samples: Samples) -> Arrivals:
        return samples.times_us, [size + IP_UDP_BYTES for size in samples.sizes_bytes]

    def _payload_share(self) -> float:
        segment = self._connection.segment_bytes()
        return segment / (segment + TCP_IP_BYTES)

    def _as_payload(self, rate: Rate) -> Rate:
        """Return the rate of TCP's payload on a link that carries packets at ``rate``."""
        return Rate(rate.bytes_per_s * self._payload_share(), rate.error)

    # ------------------------------------------------------------ by TCP

    def _burst_rate(self, rtt_ms: float, sizes_bytes: Sequence[int]) -> Rate:
        rates: list[float] = []
        for size_bytes in sizes_bytes:
            start_ms = now_ms()
            try:
                rates.append(self._burst(size_bytes, rtt_ms))
            except (DeadlineError, PeerGoneError):  # the service waits less long than we do
                if not rates:
                    raise
                break  # the link let a small probe pass at once, and holds the larger one back
            if now_ms() - start_ms > SLOW_PROBE_MS:
                break
        return Rate(rates[-1])

    def _burst(self, size_bytes: int, rtt_ms: float) -> float:
        self._connection.send(Probe(size_bytes))
        start_ms = now_ms()
        self._connection.send_raw(bytes(size_bytes))
        samples = self._receive(Samples, PROBE_TIMEOUT_S)
        elapsed_ms = now_ms() - start_ms
        check_samples(samples, size_bytes)
        burst: Burst = gap_free_burst(samples.times_us, samples.sizes_bytes)
        return probe_rate_bytes_per_s(burst, size_bytes, elapsed_ms, rtt_ms)

    # ------------------------------------------------------------ exchanges

    def _ping(self, sequence: int) -> Echo:
        start_ms = now_ms()
        pong = self._exchange(Ping(sequence), Pong)
        return Echo(now_ms() - start_ms, pong.load_queue_ms)

    def _exchange(self, message: Message, answer: type[Answer]) -> Answer:
        self._connection.send(message)
        return self._receive(answer)

    def _receive(self, expected: type[Answer], wait_s: float | None = None) -> Answer:
        connection = self._connection
        message = connection.receive(wait_s or ANSWER_TIMEOUT_S).message
        if isinstance(message, ErrorReply):
            raise error_of(message)
        if not isinstance(message, expected):
            raise ProtocolError(f"{connection.peer} sent {type(message).__name__} in place of {expected.__name__}")
        return message

    def _size_bytes(self) -> int:
        return self._datagram_bytes + self._connection.sent_bytes + self._connection.received_bytes


def check_samples(samples: Samples, size_bytes: int, *, is_whole: bool = True) -> None:
    """Refuse samples that cannot be those of a probe of ``size_bytes``, or of a part of it.

    Raises: ProtocolError.
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
