"""The limits of connections: of unauthenticated ones in number and time, and of authenticated ones in number."""

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
    """Starts limiters whose connections are authenticated, and then get a hello for each of theirs."""
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


def connect_silently(listener: socket.socket, host: str = "127.0.0.1") -> socket.socket:
    """Return a connection that sends nothing."""
    return socket.create_connection(listener.getsockname(), JOIN_S, source_address=(host, 0))


def connect_authenticated(listener: socket.socket) -> Connection:
    """Return an authenticated connection."""
    connection = connect(*listener.getsockname())
    connection.send(Hello.of())
    assert isinstance(connection.receive(JOIN_S).message, Hello)
    return connection


def test_the_oldest_unauthenticated_connection_is_closed(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_unauthenticated=2))
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(connect_silently(listener)) for _ in range(3))
        assert first.recv(1) == b""
        second.settimeout(0.02)
        with pytest.raises(TimeoutError):
            second.recv(1)
        third.settimeout(0.02)
        with pytest.raises(TimeoutError):
            third.recv(1)


def test_many_of_one_address_displace_each_other(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_unauthenticated=3))
    with ExitStack() as stack:
        single = stack.enter_context(connect_silently(listener, "127.0.0.2"))
        others = [stack.enter_context(connect_silently(listener)) for _ in range(6)]
        assert [silent.recv(1) for silent in others[:4]] == [b""] * 4
        single.settimeout(0.02)
        with pytest.raises(TimeoutError):
            single.recv(1)


def test_authenticated_connections_are_never_displaced(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_unauthenticated=2))
    with connect_authenticated(listener) as authenticated, ExitStack() as stack:
        others = [stack.enter_context(connect_silently(listener)) for _ in range(8)]
        assert [silent.recv(1) for silent in others[:6]] == [b""] * 6
        authenticated.send(Hello.of())
        assert isinstance(authenticated.receive(JOIN_S).message, Hello)


@pytest.mark.parametrize("first_bytes", [b"", b"NSGN\1\1"], ids=["silent", "dripping"])
def test_authentication_has_a_timeout(
    first_bytes: bytes, listener: socket.socket, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "AUTHENTICATION_TIMEOUT_S", 0.02)
    opened(ConnectionLimits())
    with connect_silently(listener) as silent:
        silent.sendall(first_bytes)
        assert silent.recv(1) == b""


def test_at_the_limit_the_reply_is_busy(listener: socket.socket, opened: Opened) -> None:
    opened(ConnectionLimits(max_connections=1))
    with connect_authenticated(listener):
        with connect(*listener.getsockname()) as late:
            late.send(Hello.of())
            message = late.receive(JOIN_S).message
            assert isinstance(message, ErrorReply) and message.code == "busy" and message.retry_ms > 0
            with pytest.raises(PeerGoneError):
                late.receive(JOIN_S)


def test_close_unauthenticated(listener: socket.socket, opened: Opened) -> None:
    limiter = opened(ConnectionLimits())
    with connect_authenticated(listener) as authenticated, connect_silently(listener) as silent:
        authenticated.send(Hello.of())  # by now the silent one, accepted before it, is counted
        authenticated.receive(JOIN_S)
        while not limiter._unauthenticated:
            pass
        limiter.close_unauthenticated()
        assert silent.recv(1) == b""
