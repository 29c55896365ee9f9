"""Fixtures of the tests of the network: connected pairs on loopback, and a check that no thread is left running."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from neurosurgeon.cloud.executor import Executor
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.monitor_server import MonitorServer
from neurosurgeon.net.sockets import listen
from tests.networks import ENGINE, Network, load_network

if TYPE_CHECKING:
    from tests.net.clouds import Cloud

LOOPBACK = "127.0.0.1"
JOIN_S = 10.0  # a test that needs this long has hung

# Examples have no time limit: the machine may be busy.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    deadline_s = time.monotonic() + JOIN_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Fail a test that leaves a thread running."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name == "tqdm_monitor":  # a library's, one for the whole process
            continue
        thread.join(JOIN_S)
        assert not thread.is_alive(), f"{thread.name} still runs"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket on a free port."""
    with listen(LOOPBACK, 0) as sock:
        yield sock


@pytest.fixture
def service(listener: socket.socket) -> Iterator[tuple[str, int]]:
    """The address of a running bandwidth service."""
    serving = threading.Thread(target=MonitorServer(listener).serve, daemon=True)
    serving.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    serving.join(JOIN_S)


@pytest.fixture
def wires(listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one TCP connection."""
    with socket.create_connection(listener.getsockname()) as near, listener.accept()[0] as far:
        yield near, far


@pytest.fixture
def pair(wires: tuple[socket.socket, socket.socket]) -> tuple[Connection, Connection]:
    """Two connections of ours that talk to each other."""
    return Connection(wires[0]), Connection(wires[1])


@pytest.fixture
def start() -> Iterator[Callable[..., Cloud]]:
    """Start clouds that end with the test. They compute with one thread, as tests do, and so make the same bits."""
    from tests.net.clouds import Cloud

    clouds: list[Cloud] = []

    def start_one(executor: Executor, **options: Any) -> Cloud:
        clouds.append(Cloud(executor, **options))
        return clouds[-1]

    yield start_one
    for cloud in clouds:
        cloud.stop()


@pytest.fixture
def cloud(start: Callable[[Executor], Cloud]) -> Cloud:
    """A running cloud."""
    return start(Executor(ENGINE))


@pytest.fixture(scope="session")
def network() -> Network:
    """The edge's own network."""
    return load_network("le_net")
