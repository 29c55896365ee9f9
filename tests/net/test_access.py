"""Authentication with real certificates: each mode works, and each side refuses a peer without key or certificate."""

from __future__ import annotations

import shutil
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neurosurgeon.cli.certs import make_ca, make_certificate
from neurosurgeon.cli.parser import access_of_cloud, access_of_edge
from neurosurgeon.net.access import OPEN, Access, is_loopback
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import TLS_ALERT, TLS_HANDSHAKE, describe_first_bytes
from neurosurgeon.net.messages import Hello, Ping, Request
from neurosurgeon.net.sockets import bind, connect
from neurosurgeon.net.tls import cloud_tls, edge_tls
from neurosurgeon.utils.errors import AccessError, NetworkError, UsageError
from tests.attacks.impostors import expire
from tests.net.conftest import JOIN_S, LOOPBACK

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
REQUEST = Request("le_net", b"\1", "0" * 32, "1" * 32)
MODES = ["plain", "key", "TLS", "mutual TLS", "TLS and key"]
Sides = tuple[Access, Access]

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="the openssl command makes the certificates")


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a cloud and an edge; a cloud of another name, and an expired one; and the same of another CA."""
    directory = tmp_path_factory.mktemp("certs")
    (directory / "other").mkdir()
    for place in (directory, directory / "other"):
        make_ca(place)
        make_certificate(place, "cloud", [LOOPBACK, "localhost"])
        make_certificate(place, "edge", ["edge"])
    make_certificate(directory, "elsewhere", ["cloud.example"])
    expire(directory, "cloud")
    return directory


def cloud_with(certs: Path, who: str = "cloud", key: bytes | None = None, ca: str | None = None) -> Access:
    return Access(key, cloud_tls(certs / f"{who}.pem", certs / f"{who}.key", certs / ca if ca else None))


def edge_with(certs: Path, who: str | None = None, key: bytes | None = None) -> Access:
    files = (certs / f"{who}.pem", certs / f"{who}.key") if who else (None, None)
    return Access(key, edge_tls(certs / "ca.pem", *files))


@pytest.fixture
def sides(certs: Path) -> dict[str, Sides]:
    """The access of cloud and edge in each valid mode."""
    return {
        "plain": (OPEN, OPEN),
        "key": (Access(KEY), Access(KEY)),
        "TLS": (cloud_with(certs), edge_with(certs)),
        "mutual TLS": (cloud_with(certs, ca="ca.pem"), edge_with(certs, "edge")),
        "TLS and key": (cloud_with(certs, key=KEY), edge_with(certs, key=KEY)),
    }


def serve(listener: socket.socket, access: Access) -> None:
    """Authenticate one edge, and echo its messages."""
    with Connection(listener.accept()[0]) as connection:
        connection.let_in(access, time.monotonic() + JOIN_S)
        connection.send(Hello.of())
        while True:
            received = connection.receive(JOIN_S)
            connection.send(received.message, received.arrays, received.task)


def meet(listener: socket.socket, cloud: Access, edge: Access, host: str = LOOPBACK) -> tuple[str, str]:
    """Connect an edge to a cloud of which one refuses the other; return the error messages of both."""
    with ThreadPoolExecutor(1) as pool:
        serving: Future[None] = pool.submit(serve, listener, cloud)
        with pytest.raises(AccessError) as refused:
            with connect(host, listener.getsockname()[1], access=edge) as connection:
                connection.send(Hello.of())
                connection.receive(JOIN_S)
        assert refused.value.exit_code == 4
        error = serving.exception(JOIN_S)
        assert isinstance(error, NetworkError)
        return str(refused.value), str(error)


# ---------------------------------------------------------------- who gets in


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [0, 1, 100, 1_000_003])
def test_messages_arrive_in_every_mode(mode: str, count: int, sides: dict[str, Sides], listener: socket.socket) -> None:
    cloud, edge = sides[mode]
    arrays = [np.random.default_rng(0).random(count), np.arange(7)]
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve, listener, cloud)
        with connect(*listener.getsockname(), access=edge) as connection:
            connection.send(Hello.of())
            connection.receive(JOIN_S)
            for task in (1, 2):
                connection.send(REQUEST, arrays, task)
                received = connection.receive(JOIN_S)
                assert (received.message, received.task) == (REQUEST, task)
                assert len(received.arrays) == 2 and all(map(np.array_equal, received.arrays, arrays))
        assert isinstance(serving.exception(JOIN_S), NetworkError)


@pytest.mark.parametrize("mode", MODES)
def test_one_thread_may_send_while_another_receives(
    mode: str, sides: dict[str, Sides], listener: socket.socket
) -> None:
    cloud, edge = sides[mode]
    count = 50
    with ThreadPoolExecutor(2) as pool:
        pool.submit(serve, listener, cloud)
        with connect(*listener.getsockname(), access=edge) as connection:
            connection.send(Hello.of())
            connection.receive(JOIN_S)
            sending = pool.submit(lambda: [connection.send(Ping(number)) for number in range(count)])
            assert [connection.receive(JOIN_S).message for _ in range(count)] == [Ping(n) for n in range(count)]
            sending.result(JOIN_S)


@pytest.mark.parametrize("mode", MODES[1:])
def test_first_bytes_show_tls_and_never_the_key(
    mode: str, sides: dict[str, Sides], listener: socket.socket, wires: tuple[socket.socket, socket.socket]
) -> None:
    _, edge = sides[mode]
    wires[1].settimeout(JOIN_S)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(Connection(wires[0]).ask_in, edge, LOOPBACK)
        first = wires[1].recv(4096)
        wires[1].close()
        assert isinstance(asking.exception(JOIN_S), NetworkError)
    assert (first[:1] == TLS_HANDSHAKE) == ("TLS" in mode)
    assert KEY not in first


def test_certificate_name_of_a_cloud_behind_a_relay(certs: Path, listener: socket.socket) -> None:
    edge = replace(edge_with(certs), cloud_name="cloud.example")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(serve, listener, cloud_with(certs, "elsewhere"))
        with connect(*listener.getsockname(), access=edge) as connection:
            connection.send(Hello.of())
            assert isinstance(connection.receive(JOIN_S).message, Hello)


# ---------------------------------------------------------------- who does not


def test_both_sides_need_the_same_key(listener: socket.socket) -> None:
    assert "--key-file" in meet(listener, Access(KEY), OPEN)[0]
    assert "it has no key" in meet(listener, OPEN, Access(KEY))[0]
    assert "another key" in meet(listener, Access(KEY), Access(OTHER_KEY))[0]


def test_both_sides_need_tls(certs: Path, listener: socket.socket) -> None:
    assert "--tls-ca" in meet(listener, cloud_with(certs), OPEN)[0]
    assert "--tls-ca" in meet(listener, cloud_with(certs), Access(KEY))[0]
    said, logged = meet(listener, OPEN, edge_with(certs))
    assert "may not speak TLS" in said and "TLS on a port without it" in logged


def test_cloud_certificate_needs_the_ca_and_its_name(certs: Path, listener: socket.socket) -> None:
    edge = edge_with(certs)
    assert "self-signed" in meet(listener, cloud_with(certs / "other", "ca"), edge)[0]
    assert "unable to get local issuer" in meet(listener, cloud_with(certs / "other"), edge)[0]
    assert "has expired" in meet(listener, cloud_with(certs, "expired"), edge)[0]
    assert "not valid for" in meet(listener, cloud_with(certs, "elsewhere"), edge)[0]


def test_edge_certificate_needs_the_ca_of_the_cloud(certs: Path, listener: socket.socket) -> None:
    cloud = cloud_with(certs, ca="ca.pem")
    assert "does not accept us" in meet(listener, cloud, edge_with(certs))[0]
    other = Access(None, edge_tls(certs / "ca.pem", certs / "other/edge.pem", certs / "other/edge.key"))
    assert "does not accept us" in meet(listener, cloud, other)[0]


def test_tls_does_not_replace_the_key(certs: Path, listener: socket.socket) -> None:
    cloud = cloud_with(certs, key=KEY)
    assert "asks for a key" in meet(listener, cloud, edge_with(certs))[0]
    assert "another key" in meet(listener, cloud, edge_with(certs, key=OTHER_KEY))[0]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("make", [cloud_tls, edge_tls])
def test_missing_or_wrong_pem_files_are_named(make: Callable[..., object], certs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        make(tmp_path / "nowhere.pem", certs / "cloud.key", certs / "ca.pem")
    (tmp_path / "text.pem").write_text("no certificate")
    with pytest.raises(UsageError, match="text.pem"):
        make(tmp_path / "text.pem", certs / "cloud.key", certs / "ca.pem")


def test_a_key_of_another_certificate_is_refused(certs: Path) -> None:
    with pytest.raises(UsageError, match="fit together"):
        cloud_tls(certs / "cloud.pem", certs / "edge.key", None)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_no_authentication(address: str) -> None:
    assert is_loopback(address)
    OPEN.check_exposure(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "fe80::1%eth0", "::ffff:10.0.0.1"])  # noqa: S104
def test_other_addresses_need_a_key_or_tls_or_insecure(address: str) -> None:
    assert not is_loopback(address)
    with pytest.raises(UsageError, match="--key-file.*--tls-cert.*--insecure"):
        OPEN.check_exposure(address)
    Access(KEY).check_exposure(address)
    Access(insecure=True).check_exposure(address)


def test_bind_refuses_an_exposed_open_address() -> None:
    with pytest.raises(UsageError, match="reached from other machines"):
        bind("0.0.0.0", 0)  # noqa: S104
    with bind("0.0.0.0", 0, Access(KEY)) as sock:  # noqa: S104
        assert sock.fileno() >= 0


def test_a_key_is_never_shown() -> None:
    assert "k" * 8 not in repr(Access(KEY))


# ---------------------------------------------------------------- other protocols, by their first bytes


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GET / HT", "an HTTP request"),
        (TLS_HANDSHAKE + b"\3\1", "TLS on a port without it"),
        (TLS_ALERT + b"\3\3", "--tls-ca"),
        (b"\x80\x05}.", "a bare pickle"),
        (b"\0", "first bytes"),
    ],
)
def test_other_protocols_are_named(data: bytes, name: str) -> None:
    assert name in describe_first_bytes(data)


# ---------------------------------------------------------------- flags

FLAGS = ("key_file", "tls_cert", "tls_key", "tls_ca")


def arguments(**given: Path) -> Namespace:
    return Namespace(**{flag: given.get(flag) for flag in FLAGS}, insecure=False)


@pytest.mark.parametrize("given", [{"tls_cert"}, {"tls_key"}, {"tls_ca"}, {"tls_cert", "tls_ca"}])
def test_cloud_needs_certificate_and_private_key(given: set[str]) -> None:
    with pytest.raises(UsageError, match="both --tls-cert and --tls-key"):
        access_of_cloud(arguments(**dict.fromkeys(given, Path("file"))))


@pytest.mark.parametrize("given", [{"tls_cert"}, {"tls_key", "tls_ca"}, {"tls_cert", "tls_key"}])
def test_edge_needs_the_ca_of_the_cloud(given: set[str]) -> None:
    with pytest.raises(UsageError, match="needs --tls-ca"):
        access_of_edge(arguments(**dict.fromkeys(given, Path("file"))))


def test_flags_become_access(certs: Path, tmp_path: Path) -> None:
    assert access_of_edge(arguments()) == access_of_cloud(arguments()) == OPEN
    (tmp_path / "key").write_bytes(KEY)
    assert access_of_edge(arguments(key_file=tmp_path / "key")).key == KEY
    assert access_of_edge(arguments(tls_ca=certs / "ca.pem")).tls
    assert access_of_cloud(arguments(tls_cert=certs / "cloud.pem", tls_key=certs / "cloud.key")).tls
