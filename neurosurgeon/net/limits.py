"""Limits of connections: of authenticated ones, and of unauthenticated ones, which must authenticate quickly.

Theory of operation. Each connection has a thread of its service, and is in one of three states:

    unauthenticated ─── hello within AUTHENTICATION_TIMEOUT_S ──▶ authenticated ── closed ──▶ left
          │ └────────── the same, but the limit is reached: a busy reply ───────────────────▶ left
          └──────────── timeout, refused, or displaced by a newer connection ───────────────▶ left

At the limit of unauthenticated connections, the oldest one of the address with the most of them is closed. So many
connections from one address displace each other, and never an authenticated one.

The thread that accepts and those of the connections share both sets. A lock guards them; no thread holds it while it
waits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neurosurgeon.net.access import OPEN, Access
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import SMALL_LIMITS
from neurosurgeon.net.memory import UNLIMITED, MemoryLimit
from neurosurgeon.net.messages import Hello, reply_of
from neurosurgeon.net.sockets import accepted
from neurosurgeon.utils.errors import BusyError, NetworkError, PeerGoneError, VersionError
from neurosurgeon.utils.logs import internal_error

if TYPE_CHECKING:
    import socket

log = logging.getLogger(__name__)

AUTHENTICATION_TIMEOUT_S = 4.0  # from accept to hello: five round trips of the slowest link take 1.5
RETRY_MS = 1000.0  # to the retry of an edge beyond the limit


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections a service holds at once."""

    max_connections: int = 256  # authenticated
    max_unauthenticated: int = 64  # each costs a thread and a descriptor


DEFAULT_CONNECTIONS = ConnectionLimits()


class ConnectionLimiter:
    """Accepts and authenticates connections, and bounds their number. See the top of this module."""

    def __init__(
        self, access: Access = OPEN, limits: ConnectionLimits = DEFAULT_CONNECTIONS, memory: MemoryLimit = UNLIMITED
    ) -> None:
        self._access = access
        self._limits = limits
        self._memory = memory
        self._lock = threading.Lock()
        self._unauthenticated: dict[Connection, str] = {}  # with their hosts; the oldest first
        self._authenticated: set[Connection] = set()

    def accept(self, listener: socket.socket) -> Iterator[Connection]:
        """Yield connections until `stop_accepting`. Blocks.

        The caller must `authenticate` each, and call `leave` at its end.
        """
        for sock, _ in accepted(listener):
            try:
                connection = Connection(sock, SMALL_LIMITS, self._memory)
            except PeerGoneError as exc:
                log.debug("%s", exc)
                continue
            except Exception as exc:  # ends only this connection
                internal_error(log, exc, "accept failed")
                sock.close()
                continue
            with self._lock:
                is_full = len(self._unauthenticated) >= self._limits.max_unauthenticated
                displaced = self._remove_oldest_of_busiest_host() if is_full else None
                self._unauthenticated[connection] = connection.peer.rpartition(":")[0]
            if displaced:
                log.warning("closed %s: %d connections are unauthenticated", displaced.peer, len(self._unauthenticated))
                displaced.break_off()
            yield connection

    def authenticate(self, connection: Connection) -> Hello:
        """Return the hello of a connection once it is authenticated. Blocks for `AUTHENTICATION_TIMEOUT_S` at most.

        Raises: AccessError, BusyError: it was refused, and the peer received the reason. NetworkError.
        """
        try:
            hello = connection.let_in(self._access, time.monotonic() + AUTHENTICATION_TIMEOUT_S)
        except VersionError:
            with contextlib.suppress(NetworkError):
                connection.send(Hello.of())  # its first bytes carry our version
            raise
        with self._lock:
            self._unauthenticated.pop(connection, None)
            is_full = len(self._authenticated) >= self._limits.max_connections
            if not is_full:
                self._authenticated.add(connection)
        if is_full:
            busy = BusyError(f"{self._limits.max_connections} edges are connected, the limit of this service", RETRY_MS)
            connection.send(reply_of(busy))
            raise busy
        return hello

    def close_unauthenticated(self) -> None:
        """End all unauthenticated connections."""
        with self._lock:
            unauthenticated = list(self._unauthenticated)
        for connection in unauthenticated:
            connection.break_off()

    def leave(self, connection: Connection) -> None:
        """Remove a connection from the counts."""
        with self._lock:
            self._unauthenticated.pop(connection, None)
            self._authenticated.discard(connection)

    def _remove_oldest_of_busiest_host(self) -> Connection:
        ((busiest, _),) = Counter(self._unauthenticated.values()).most_common(1)
        connection = next(each for each, host in self._unauthenticated.items() if host == busiest)
        del self._unauthenticated[connection]
        return connection
