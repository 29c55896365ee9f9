"""UDP trains: they are measured, and a sender without proof of its address receives no more bytes than it sent."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from neurosurgeon.net import probe, trains
from neurosurgeon.net.bandwidth import MAX_RATE_BYTES_PER_S, Echo, Rate
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.datagrams import (
    COOKIE_BYTES,
    MAX_DATAGRAM_BYTES,
    NONCE_BYTES,
    UDP_PING,
    VERSION,
    Arrival,
    Datagram,
    Datagrams,
    pack_datagram,
    unpack_datagram,
)
from neurosurgeon.net.messages import AskTicket, AskTrain, ErrorReply, Hello, Ping, Pong, Samples, Ticket, Train
from neurosurgeon.net.monitor_client import measure_link
from neurosurgeon.net.monitor_server import MonitorServer
from neurosurgeon.net.probe import UDP_PING_BYTES, LinkProbe
from neurosurgeon.net.sockets import connect
from neurosurgeon.net.trains import MAX_TRAIN_PACKETS, Collector, UdpSession
from neurosurgeon.utils.errors import BusyError, DeadlineError, PeerGoneError
from neurosurgeon.utils.link import ProbeMethod
from tests.net.conftest import JOIN_S, LOOPBACK, wait_until

Address = tuple[str, int]
COOKIE = bytes(range(COOKIE_BYTES))


@pytest.fixture
def ticket(service: Address) -> Iterator[tuple[Connection, Ticket]]:
    """A connection after both hellos, and its ticket."""
    with connect(*service) as connection:
        connection.send(Hello.of())
        hello = connection.receive(JOIN_S).message
        assert isinstance(hello, Hello) and hello.capabilities["trains"] is True
        connection.send(AskTicket(VERSION))
        ticket = connection.receive(JOIN_S).message
        assert isinstance(ticket, Ticket)
        yield connection, ticket


def ping(datagrams: Datagrams, cookie: bytes, size_bytes: int = UDP_PING_BYTES) -> Arrival | None:
    datagrams.send(pack_datagram(cookie, UDP_PING, 0, size_bytes))
    return datagrams.receive(0.2)


# ---------------------------------------------------------------- datagrams


@pytest.mark.parametrize("size", [0, 24, 64, MAX_DATAGRAM_BYTES])
def test_a_datagram_is_packed_and_unpacked(size: int) -> None:
    data = pack_datagram(COOKIE, 7, 41, size)
    assert len(data) == max(size, 24)
    assert unpack_datagram(data) == Datagram(COOKIE, 7, 41, bytes(max(size, 24) - 24))


def test_a_short_datagram_is_none() -> None:
    assert unpack_datagram(b"") is None and unpack_datagram(bytes(23)) is None


def test_a_packet_of_a_train_counts_once() -> None:
    collector = Collector(3, 2)
    for train, sequence, time_ns in ((3, 1, 5_000), (3, 1, 9_000), (2, 0, 1_000), (3, 2, 1_000), (3, 0, 2_000)):
        collector.record(Datagram(COOKIE, train, sequence, b""), Arrival(bytes(100), time_ns, None))
    assert collector.is_complete
    assert collector.wait() == Samples([0, 3], [100, 100])


def test_a_train_that_is_lost_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trains, "FIRST_WAIT_S", 0.01)
    assert Collector(1, 10).wait() == Samples([], [])


def test_a_nonce_is_valid_once_and_only_the_last() -> None:
    datagrams = Mock()
    session = UdpSession(datagrams, 1)
    first, second = session.issue_nonce("here"), session.issue_nonce("there")
    assert not session.send_train(first, 1, 2, 100)
    assert not session.send_train(second, 1, 2, 100)  # a wrong one spends it
    assert not datagrams.send_train.called
    third = session.issue_nonce("there")
    assert session.send_train(third, 1, 2, 100)
    datagrams.send_train.assert_called_once_with(session.cookie, 1, 2, 100, "there")
    assert not session.send_train(third, 1, 2, 100)


# ---------------------------------------------------------------- the service


def test_samples_of_a_train(ticket: tuple[Connection, Ticket]) -> None:
    connection, (port, cookie) = ticket
    with Datagrams.connected(LOOPBACK, port) as datagrams:
        for number in (1, 2):
            connection.send(Train(number, 10))
            datagrams.send_train(cookie, number, 10, 1000)
            samples = connection.receive(JOIN_S).message
            assert isinstance(samples, Samples)
            assert samples.sizes_bytes == [1000] * 10
            assert samples.times_us == sorted(samples.times_us) and samples.times_us[0] == 0


def test_a_train_needs_a_nonce_received_by_udp(ticket: tuple[Connection, Ticket]) -> None:
    connection, (port, cookie) = ticket
    with Datagrams.connected(LOOPBACK, port) as datagrams:
        connection.send(AskTrain(secrets.token_bytes(NONCE_BYTES), 1, 10, 1000))
        connection.send(Ping(1))
        assert isinstance(connection.receive(JOIN_S).message, Pong)  # the service goes on
        assert datagrams.receive(0.05) is None
        arrival = ping(datagrams, cookie)
        answer = unpack_datagram(arrival.data) if arrival else None
        assert answer is not None
        connection.send(AskTrain(answer.rest[:NONCE_BYTES], 5, 3, 1000))
        arrivals = [datagrams.receive(JOIN_S) for _ in range(3)]
    assert [unpack_datagram(one.data).sequence for one in arrivals if one] == [0, 1, 2]  # type: ignore[union-attr]


def test_a_forged_address_gets_no_train(ticket: tuple[Connection, Ticket]) -> None:
    """A client with a ticket sends a ping with a forged address: the nonce goes there, and without it no train does."""
    connection, (port, cookie) = ticket
    with Datagrams.connected(LOOPBACK, port) as victim:
        arrival = ping(victim, cookie)
        assert arrival is not None and len(arrival.data) <= UDP_PING_BYTES
        connection.send(AskTrain(bytes(NONCE_BYTES), 1, MAX_TRAIN_PACKETS, MAX_DATAGRAM_BYTES))
        connection.send(Ping(1))
        connection.receive(JOIN_S)
        assert victim.receive(0.05) is None


def test_without_udp_segment_datagrams_go_one_by_one(
    ticket: tuple[Connection, Ticket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, (port, cookie) = ticket
    monkeypatch.setattr("neurosurgeon.net.datagrams.UDP_SEGMENT", 60_000)  # no such option
    with Datagrams.connected(LOOPBACK, port) as datagrams:
        connection.send(Train(1, 50))
        datagrams.send_train(cookie, 1, 50, MAX_DATAGRAM_BYTES)
        samples = connection.receive(JOIN_S).message
    assert isinstance(samples, Samples) and samples.sizes_bytes == [MAX_DATAGRAM_BYTES] * 50


@pytest.mark.parametrize("size", [1, 23, 24, 47])
def test_a_pong_is_no_longer_than_its_ping(ticket: tuple[Connection, Ticket], size: int) -> None:
    _, (port, cookie) = ticket
    with Datagrams.connected(LOOPBACK, port) as datagrams:
        datagrams.send(pack_datagram(cookie, UDP_PING, 0)[:size].ljust(size, b"\0"))
        assert datagrams.receive(0.05) is None


def test_datagrams_without_a_known_cookie_get_no_reply(service: Address) -> None:
    with Datagrams.connected(*service) as datagrams:
        for cookie in (bytes(COOKIE_BYTES), secrets.token_bytes(COOKIE_BYTES)):
            assert ping(datagrams, cookie) is None


def test_a_cookie_ends_with_its_connection(service: Address) -> None:
    with connect(*service) as connection:
        connection.send(Hello.of())
        connection.receive(JOIN_S)
        connection.send(AskTicket(VERSION))
        ticket = connection.receive(JOIN_S).message
        assert isinstance(ticket, Ticket)
    with Datagrams.connected(*service) as datagrams:
        wait_until(lambda: ping(datagrams, ticket.cookie) is None)  # the service has closed the session


@pytest.mark.parametrize(
    "message",
    [
        Train(0, 10),
        Train(1, MAX_TRAIN_PACKETS + 1),
        Train(-1, 10),
        Train(2**40, 1),
        AskTrain(bytes(NONCE_BYTES), 1, 10**9, 1000),
        AskTrain(bytes(NONCE_BYTES), 1, 1, MAX_DATAGRAM_BYTES + 1),
        AskTrain(bytes(NONCE_BYTES), 0, 1, 1),
    ],
)
def test_trains_outside_the_limits_are_refused(ticket: tuple[Connection, Ticket], message: Train | AskTrain) -> None:
    connection, _ = ticket
    connection.send(message)
    with pytest.raises(PeerGoneError):
        connection.receive(JOIN_S)


# ---------------------------------------------------------------- the client


def test_both_directions_are_measured(service: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SENDER_SHARE", float("inf"))  # loopback is as fast as the sender
    link = measure_link(*service, duplex=True)
    assert link.method is ProbeMethod.UDP_TRAIN
    assert link.rate_bytes_per_s > 0 and link.down_bytes_per_s
    assert link.probe_bytes < 2 * 200_000


@pytest.mark.parametrize("use_udp", [True, False])
def test_a_measurement_costs_at_most_200_kb(service: Address, monkeypatch: pytest.MonkeyPatch, use_udp: bool) -> None:
    monkeypatch.setattr(probe, "SENDER_SHARE", 0.0)  # the train counts as sender-limited: TCP measures, too
    assert measure_link(*service, use_udp=use_udp).probe_bytes <= 200_000


@pytest.mark.parametrize(
    ("burst_share", "method"),
    [
        (0.9, ProbeMethod.UDP_TRAIN),
        (1.1, ProbeMethod.TCP_BURST),
        (1e6, ProbeMethod.UDP_TRAIN),  # read at once
        (None, ProbeMethod.UDP_TRAIN),  # TCP's burst stalled
    ],
)
def test_a_sender_limited_train_is_followed_by_tcp(
    service: Address, monkeypatch: pytest.MonkeyPatch, burst_share: float | None, method: ProbeMethod
) -> None:
    rate = Rate(1e8)

    def burst(_: LinkProbe, size_bytes: int, rtt_ms: float) -> float:
        if burst_share is None:
            raise DeadlineError("stuck")
        return min(burst_share * rate.bytes_per_s, MAX_RATE_BYTES_PER_S)

    monkeypatch.setattr(LinkProbe, "_rate_up", lambda *_: probe._UdpResult(rate, is_sender_limited=True))
    monkeypatch.setattr(LinkProbe, "_burst", burst)
    link = measure_link(*service)
    assert link.method is method
    is_tcp = method is ProbeMethod.TCP_BURST and burst_share
    assert link.rate_bytes_per_s == pytest.approx(rate.bytes_per_s * (burst_share if is_tcp else 1.0))


def test_udp_pings_measure_the_rtt_of_a_token_bucket(service: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SENDER_SHARE", float("inf"))
    monkeypatch.setattr(LinkProbe, "echo", lambda self: Echo(0.0, 0.0))  # as through a token bucket
    link = measure_link(*service)
    assert link.exchange_ms == link.rtt_ms > 0
    assert link.ping_ms == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("round_trips_ms", "pings"),
    [
        ([1.0] * 20, probe.SHORT_RTT_PINGS),
        ([20.0] * 20, probe.UDP_PINGS),
        ([None, 1.0] * 10, probe.UDP_PINGS),  # each timeout takes its time
        ([None, None], probe.BLOCKED_PINGS),
    ],
)
def test_a_short_round_trip_gets_more_udp_pings(
    service: Address, monkeypatch: pytest.MonkeyPatch, round_trips_ms: list[float | None], pings: int
) -> None:
    answers = iter([rtt_ms and probe._UdpPong(b"", rtt_ms) for rtt_ms in round_trips_ms])
    asked: list[int] = []

    def ping(_: LinkProbe, __: Datagrams, ___: bytes, sequence: int) -> Any:
        asked.append(sequence)
        return next(answers)

    monkeypatch.setattr(LinkProbe, "_ping_by_udp", ping)
    measure_link(*service)
    assert asked == list(range(1, pings + 1))


def test_a_quick_measurement_costs_a_fifth(service: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SENDER_SHARE", float("inf"))
    assert measure_link(*service, quick=True).probe_bytes < 30_000
    assert measure_link(*service, quick=True, use_udp=False).probe_bytes < 30_000


def test_blocked_udp_is_replaced_by_tcp(
    service: Address, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(probe, "UDP_PING_TIMEOUT_S", 0.01)
    monkeypatch.setattr(Datagrams, "send", lambda *arguments: True)  # dropped in transit
    link = measure_link(*service, duplex=True)
    assert (link.method, link.down_bytes_per_s) == (ProbeMethod.TCP_BURST, None)
    assert "no rate by UDP" in caplog.text


def test_lost_trains_are_replaced_by_tcp(service: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small datagrams arrive, large ones do not."""
    monkeypatch.setattr(trains, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(Datagrams, "send_train", lambda *arguments: 1e-5)
    assert measure_link(*service).method is ProbeMethod.TCP_BURST


def test_a_refusal_of_the_service_has_its_reason(listener: socket.socket) -> None:
    def refuse() -> None:
        with Connection(listener.accept()[0]) as connection:
            connection.receive(JOIN_S)
            connection.send(ErrorReply("busy", "come back later", 5.0))

    serving = threading.Thread(target=refuse, daemon=True)
    serving.start()
    with pytest.raises(BusyError, match="come back later"):
        measure_link(*listener.getsockname())
    serving.join(JOIN_S)


def test_a_connection_lost_in_a_probe_is_a_network_error(listener: socket.socket) -> None:
    def vanish() -> None:
        with Connection(listener.accept()[0]) as connection:
            connection.receive(JOIN_S)
            connection.send(Hello.of(trains=True))
            for sequence in range(probe.PINGS):
                connection.receive(JOIN_S)
                connection.send(Pong(sequence))
            connection.receive(JOIN_S)  # the request for a ticket

    serving = threading.Thread(target=vanish, daemon=True)
    serving.start()
    with pytest.raises(PeerGoneError):
        measure_link(*listener.getsockname())
    serving.join(JOIN_S)


def test_a_service_without_udp_is_measured_by_tcp(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Datagrams, "bound", lambda *arguments: None)
    serving = threading.Thread(target=MonitorServer(listener).serve, daemon=True)
    serving.start()
    assert measure_link(*listener.getsockname()).method is ProbeMethod.TCP_BURST
    listener.shutdown(socket.SHUT_RDWR)
    serving.join(JOIN_S)


def test_an_older_service_is_measured_by_tcp(service: Address) -> None:
    with connect(*service) as connection:
        measuring = LinkProbe(connection)
        measuring._serves_trains = False
        assert measuring.measure().method is ProbeMethod.TCP_BURST


def test_a_small_burst_counts_if_the_larger_one_is_lost(service: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(*service) as connection:
        measuring = LinkProbe(connection)
        bursts = iter([1e6, PeerGoneError("the service waits no longer")])

        def burst(size_bytes: int, rtt_ms: float) -> float:
            found = next(bursts)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(measuring, "_burst", burst)
        found = measuring.measure(use_udp=False)
    assert (found.rate_bytes_per_s, found.udp_is_blocked) == (1e6, False)
