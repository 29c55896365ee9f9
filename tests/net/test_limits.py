"""The limits of connections: unauthenticated peers are few and brief, a crowd pushes out itself, and edges stay."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from neurosurgeon.net import limits
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.limits import ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.messages import ErrorReply, Hello
from neurosurgeon.net.sockets import connect, stop_accepting
from neurosurgeon.utils.errors import NetworkError, PeerGoneError
from tests.net.conftest import JOIN_S

Opened = Callable[[ConnectionLimits], ConnectionLimiter]


@pytest.fixture
def opened(listener: socket.socket) -> Iterator[Opened]:
    """Open doors whose visitors are let in, and then answered with a hello for each of theirs."""
    threads: list[threading.Thread] = []

    def serve(limiter: ConnectionLimiter, connection: Connection) -> None:
        with connection:
            try:
                limiter.authenticate(connection)
                while True:
                    connection.send(Hello.of())
                    connection.receive(JOIN_S)
            except NetworkError:
                pass
            finally:
                limiter.leave(connection)

    def open_one(limits: ConnectionLimits) -> ConnectionLimiter:
        limiter = ConnectionLimiter(limits=limits)

        def accept() -> None:
            for connection in limiter.accept(listener):
                threads.append(threading.Thread(target=serve, args=(limiter, connection), daemon=True))
                threads[-1].start()

        threads.append(threading.Thread(target=accept, daemon=True))
        threads[0].start()
        return limiter

    yield open_one
    stop_accepting(listener)
    for thread in threads:
        thread.join(JOIN_S)


def knock(listener: socket.socket, host: str = "127.0.0.1") -> socket.socket:
    """Return a connection that says nothing."""
    return socket.create_connection(listener.getsockname(), JOIN_S, source_address=(host, 0))


def enter(listener: socket.socket) -> Connection:
    """Return a connection that has been let in."""
    connection = connect(*listener.getsockname())
    connection.send(Hello.of())
    assert isinstance(connection.receive(JOIN_S).message, Hello)
    return connection


def test_the_stranger_that_stood_longest_goes(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_strangers=2))
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(knock(listener)) for _ in range(3))
        assert first.recv(1) == b""
        second.settimeout(0.02)
        with pytest.raises(TimeoutError):
            second.recv(1)
        third.settimeout(0.02)
        with pytest.raises(TimeoutError):
            third.recv(1)


def test_a_crowd_pushes_out_itself_and_no_lonely_stranger(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_strangers=3))
    with ExitStack() as stack:
        lonely = stack.enter_context(knock(listener, "127.0.0.2"))
        crowd = [stack.enter_context(knock(listener)) for _ in range(6)]
        assert [peer.recv(1) for peer in crowd[:4]] == [b""] * 4
        lonely.settimeout(0.02)
        with pytest.raises(TimeoutError):
            lonely.recv(1)


def test_who_is_inside_stays_whatever_crowd_comes(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_strangers=2))
    with enter(listener) as inside, ExitStack() as stack:
        crowd = [stack.enter_context(knock(listener)) for _ in range(8)]
        assert [peer.recv(1) for peer in crowd[:6]] == [b""] * 6
        inside.send(Hello.of())
        assert isinstance(inside.receive(JOIN_S).message, Hello)


@pytest.mark.parametrize("says", [b"", b"NSGN\1\1"], ids=["silent", "dripping"])
def test_a_stranger_has_little_time_whatever_it_says(
    says: bytes, listener: socket.socket, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INTRODUCTION_S", 0.02)
    opened(ConnectionLimits())
    with knock(listener) as peer:
        peer.sendall(says)
        assert peer.recv(1) == b""


def test_who_finds_the_house_full_is_told_and_may_come_later(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_connections=1))
    with enter(listener):
        with connect(*listener.getsockname()) as late:
            late.send(Hello.of())
            message = late.receive(JOIN_S).message
            assert isinstance(message, ErrorReply) and message.code == "busy" and message.retry_ms > 0
            with pytest.raises(PeerGoneError):
                late.receive(JOIN_S)


def test_strangers_can_be_sent_away_at_once(listener: socket.socket, opened: Opened) -> None:
    limiter = opened(ConnectionLimits())
    with enter(listener) as inside, knock(listener) as peer:
        inside.send(Hello.of())  # by now the peer, which came before it, is known to the limiter
        inside.receive(JOIN_S)
        while not limiter._strangers:
            pass
        limiter.send_strangers_away()
        assert peer.recv(1) == b""
