"""Sockets: connecting, listening and accepting, with typed errors."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import DEFAULT_LIMITS, Limits
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.utils.errors import AddressError, ConnectError, NeurosurgeonError, PortBusyError, UsageError
from neurosurgeon.utils.units import s_to_ms

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 0.9  # an unused address is reported within a second; a used one responds within one round trip
ACCEPT_PAUSE_S = 0.05  # out of file descriptors: other connections must close first
BACKLOG = 1024  # leaves room for an edge among many unauthenticated peers; the system may allow less


def connect(host: str, port: int, limits: Limits = DEFAULT_LIMITS, access: Access = OPEN) -> Connection:
    """Return an authenticated connection to the first address of ``host`` that responds. May block.

    Raises: UsageError: not an address. ConnectError: no service there. AccessError: authentication failed.
    """
    sock = _connected(host, port)
    connection = Connection(sock, limits)
    try:
        connection.ask_in(access, host)
    except BaseException:
        connection.close()
        raise
    return connection


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), CONNECT_TIMEOUT_S)
    except (socket.gaierror, UnicodeError) as exc:
        raise _address_error(host) from exc
    except OSError as exc:
        reason = "no reply" if isinstance(exc, TimeoutError) else exc.strerror or str(exc)
        raise ConnectError(f"no service at {format_address((host, port))} ({reason}): is it started there?") from exc


def is_this_machine(host: str) -> bool:
    """Return whether the address of ``host`` is one of this machine. May block to resolve a name."""
    with contextlib.suppress(OSError, UnicodeError):  # no such name, or no route
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind(address)  # fails for those of other machines
            return True
    return False


def connect_time_ms(host: str, port: int) -> float:
    """Return the time (ms) to connect without authentication. May block.

    Raises: UsageError: not an address. ConnectError: no service there.
    """
    start_s = time.monotonic()
    with _connected(host, port):
        return s_to_ms(time.monotonic() - start_s)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name.

    Raises: UsageError: it has none.
    """
    return list(dict.fromkeys(str(address[0]) for _, address in _families_and_addresses(host, port)))


def _families_and_addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise _address_error(host) from exc
    return [(family, address) for family, *_, address in found]


def _address_error(host: str) -> AddressError:
    return AddressError(f"address {host!r} cannot be resolved: pass an IP address or a known host name")


def accepted(listener: socket.socket) -> Iterator[tuple[socket.socket, Any]]:
    """Yield connections and their addresses until `stop_accepting`; log a failed accept, and continue. Blocks."""
    while True:
        try:
            yield listener.accept()
        except OSError as exc:
            if listener.fileno() < 0 or exc.errno == errno.EINVAL:  # closed, or shut down
                return
            log.warning("accept failed: %s", exc.strerror or exc)
            time.sleep(ACCEPT_PAUSE_S)


def stop_accepting(listener: socket.socket) -> None:
    """Close a listening socket and wake the thread that waits in it; a second call does nothing."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # close alone does not wake a waiting accept on Linux
    listener.close()


def bind(host: str, port: int, access: Access = OPEN) -> socket.socket:
    """Return a socket that holds an address but does not listen yet; port 0 takes a free one.

    SO_REUSEADDR lets a server restart at once; SO_REUSEPORT, which would let two servers share a port unnoticed,
    is never set.

    Raises: UsageError: not an address of this machine, or other machines reach it and ``access`` is open.
            PortBusyError: the port is taken.
    """
    family, address = _families_and_addresses(host, port)[0]
    access.check_exposure(str(address[0]))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as exc:
        sock.close()
        raise _bind_error(host, port, exc) from exc
    return sock


def free_port(host: str) -> int:
    """Return a port that is free now, for a program that cannot choose one itself."""
    with bind(host, 0) as sock:
        port: int = sock.getsockname()[1]
    return port


def start_listening(sock: socket.socket) -> None:
    """Let a bound socket accept connections; close it on an error.

    Raises: PortBusyError: another process took the port first.
    """
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise _bind_error(host, port, exc) from exc


def listen(host: str, port: int, access: Access = OPEN) -> socket.socket:
    """Return a listening socket; see `bind` and `start_listening`."""
    sock = bind(host, port, access)
    start_listening(sock)
    return sock


def _bind_error(host: str, port: int, exc: OSError) -> NeurosurgeonError:
    if exc.errno == errno.EADDRINUSE:
        return PortBusyError(
            f"port {port} on {host} is busy: stop the program that listens there, or choose another port"
        )
    if isinstance(exc, PermissionError):
        return UsageError(f"port {port} needs more rights than this user has: choose one above 1023")
    return UsageError(f"cannot listen on {host}: {exc.strerror or exc}")
