"""Limits of connections: of those that said hello, and of unauthenticated ones, which must do so quickly."""

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

INTRODUCTION_S = 4.0  # from accept to hello, whatever the peer sends: five round trips of the slowest link take 1.5
RETRY_MS = 1000.0  # when to knock again where everything is taken


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections a service holds at once."""

    max_connections: int = 256  # that have said hello
    max_strangers: int = 64  # that have not: each costs a thread and a descriptor


DEFAULT_CONNECTIONS = ConnectionLimits()


class ConnectionLimiter:
    """Accepts and authenticates connections, and bounds their number.

    At the limit of unauthenticated ones, the oldest of them from the busiest address is closed: a crowd from one
    address pushes out itself, and never a connection that was authenticated.
    """

    def __init__(
        self, access: Access = OPEN, limits: ConnectionLimits = DEFAULT_CONNECTIONS, memory: MemoryLimit = UNLIMITED
    ) -> None:
        self._access = access
        self._limits = limits
        self._memory = memory
        self._lock = threading.Lock()
        self._strangers: dict[Connection, str] = {}  # with their hosts; the first came first
        self._known: set[Connection] = set()

    def accept(self, listener: socket.socket) -> Iterator[Connection]:
        """Yield those who come until `stop_accepting`; each must be let in, and must `leave` in the end."""
        for sock, _ in accepted(listener):
            try:
                connection = Connection(sock, SMALL_LIMITS, self._memory)
            except PeerGoneError as exc:
                log.debug("%s", exc)
                continue
            except Exception as exc:  # costs this one alone
                internal_error(log, exc, "a connection could not be taken")
                sock.close()
                continue
            with self._lock:
                crowded_out = self._longest_of_the_crowd() if self._is_crowded() else None
                self._strangers[connection] = connection.peer.rpartition(":")[0]
            if crowded_out:
                log.warning("%s turned away: %d others said nothing either", crowded_out.peer, len(self._strangers))
                crowded_out.break_off()
            yield connection

    def authenticate(self, connection: Connection) -> Hello:
        """Wait until a stranger has proved what it must, and return its hello.

        Raises: AccessError, BusyError: it was turned away, and told so. NetworkError: a stranger it is.
        """
        try:
            hello = connection.let_in(self._access, time.monotonic() + INTRODUCTION_S)
        except VersionError:
            with contextlib.suppress(NetworkError):
                connection.send(Hello.of())  # in whose first bytes the other side finds our version
            raise
        with self._lock:
            self._strangers.pop(connection, None)
            is_full = len(self._known) >= self._limits.max_connections
            if not is_full:
                self._known.add(connection)
        if is_full:
            busy = BusyError(f"{self._limits.max_connections} edges are connected", RETRY_MS)
            connection.send(reply_of(busy))
            raise busy
        return hello

    def send_strangers_away(self) -> None:
        """End the connection of everybody who has not been let in."""
        with self._lock:
            strangers = list(self._strangers)
        for connection in strangers:
            connection.break_off()

    def leave(self, connection: Connection) -> None:
        """Forget a visitor."""
        with self._lock:
            self._strangers.pop(connection, None)
            self._known.discard(connection)

    def _is_crowded(self) -> bool:
        return len(self._strangers) >= self._limits.max_strangers

    def _longest_of_the_crowd(self) -> Connection:
        """Forget and return the stranger that goes."""
        ((host, _),) = Counter(self._strangers.values()).most_common(1)
        connection = next(stranger for stranger, its_host in self._strangers.items() if its_host == host)
        del self._strangers[connection]
        return connection
