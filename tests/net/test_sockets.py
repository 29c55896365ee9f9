"""Connecting, listening and names of hosts: each failure is named."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from neurosurgeon.net.access import Access
from neurosurgeon.net.sockets import connect, is_this_machine, listen
from neurosurgeon.utils.errors import ConnectError, PortBusyError, UsageError
from tests.net.conftest import LOOPBACK


def test_a_busy_port_is_named(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(PortBusyError, match=f"port {port} on {LOOPBACK} is busy"):
        listen(LOOPBACK, port)


def test_two_servers_cannot_share_a_port(listener: socket.socket) -> None:
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


def test_a_server_can_restart_at_once(listener: socket.socket) -> None:
    address = listener.getsockname()
    with socket.create_connection(address) as edge, listener.accept()[0] as cloud:
        listener.close()
        cloud.close()  # this side closes first and keeps the address in TIME_WAIT
        assert edge.recv(1) == b""
    listen(*address).close()


def test_a_refused_connection_is_named() -> None:
    with socket.socket() as taken:  # bound, so that no other socket listens there; it does not listen either
        taken.bind((LOOPBACK, 0))
        port = taken.getsockname()[1]
        with pytest.raises(ConnectError, match=f"no service at {LOOPBACK}:{port}"):
            connect(LOOPBACK, port)


def test_an_address_that_never_responds_is_named(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    def never(sock: socket.socket, address: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", never)
    with pytest.raises(ConnectError, match="no reply"):
        connect(*listener.getsockname())


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "host\0name"])
def test_an_impossible_address_is_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError, match="cannot be resolved"):
        connect(host, 9999)


def test_an_unknown_host_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for use in (connect, listen):
        with pytest.raises(UsageError, match="'nowhere' cannot be resolved"):
            use("nowhere", 9999)


def test_listening_on_another_machines_address_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot listen on 192.0.2.1"):
        listen("192.0.2.1", 0, Access(insecure=True))


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [("127.0.0.1", True), ("localhost", True), ("127.3.4.5", True), ("192.0.2.1", False), ("no such name", False)],
)
def test_is_this_machine(host: str, is_ours: bool) -> None:
    assert is_this_machine(host) is is_ours
