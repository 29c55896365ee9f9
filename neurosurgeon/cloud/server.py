"""The cloud's server: many edges at once, many tasks of each in flight, and none blocks another.

Threads. `CloudServer.serve` accepts connections on the caller's thread. Each connection is authenticated, and then
served, on a thread of its own (`cloud.conversation` has a second one).

States. A connection is being authenticated (`ConnectionLimiter.authenticate`), then its conversation is held (`hold`),
then it is over. It ends when the edge leaves, a message breaks the protocol, a send fails, or `CloudServer.stop` stops
the reading and its grace is over. The reader then shuts the socket down, joins the writer, and cancels the waiting
tasks. A worker that finishes later puts its reply into an outbox that no thread reads.
"""

from __future__ import annotations

import logging
import socket
import threading

from neurosurgeon.cloud.conversation import Conversation, Service, log_end
from neurosurgeon.net.connection import EDGE_SILENCE_S, Connection
from neurosurgeon.net.limits import ConnectionLimiter
from neurosurgeon.net.sockets import stop_accepting
from neurosurgeon.utils.errors import PeerGoneError
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

log = logging.getLogger(__name__)

GRACE_S = 10.0  # a stopping cloud finishes the received tasks, at most this long


class CloudServer:
    """Serves edges on a listening socket, two threads for each connection, until it is stopped."""

    def __init__(self, listener: socket.socket, service: Service, limiter: ConnectionLimiter | None = None) -> None:
        self._listener = listener
        self._service = service
        self._limiter = limiter or ConnectionLimiter()
        self._lock = threading.Lock()  # guards the two below
        self._conversations: set[Conversation] = set()
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()

    def serve(self) -> None:
        """Accept edges until `stop` is called. Blocks."""
        for connection in self._limiter.accept(self._listener):
            name = f"read {connection.peer}"
            thread = threading.Thread(target=self._serve_one, args=(connection,), name=name, daemon=True)
            try:
                with self._lock:
                    if not self._stopping.is_set():
                        thread.start()
                        self._threads.add(thread)
                        continue
            except Exception as exc:  # this machine may have no thread left
                log_end(connection.peer, exc)
            self._limiter.leave(connection)
            connection.close()

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Stop accepting and reading, and finish the received tasks, within ``grace_s``. Blocks."""
        stop_accepting(self._listener)
        deadline_ms = now_ms() + s_to_ms(grace_s)
        with self._lock:
            self._stopping.set()
            running = list(self._threads)
            for conversation in self._conversations:
                conversation.connection.stop_reading()
        self._limiter.close_unauthenticated()
        for thread in running:
            thread.join(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))
        with self._lock:
            unfinished = list(self._conversations)
        for conversation in unfinished:  # without the lock, which a conversation that ends by itself needs
            conversation.abort()
        self._service.executor.close(max(0.0, (deadline_ms - now_ms()) / MS_PER_S))

    def _serve_one(self, connection: Connection) -> None:
        peer = connection.peer
        metrics = self._service.executor.metrics
        metrics.connections(1)
        log.debug("%s connected", peer, extra={"peer": peer})
        try:
            with connection:
                connection.give_up_after(EDGE_SILENCE_S)
                hello = self._limiter.authenticate(connection)
                conversation = Conversation(connection, hello, self._service)
                with self._lock:
                    self._conversations.add(conversation)
                    if self._stopping.is_set():
                        connection.stop_reading()
                try:
                    conversation.hold(self._stopping)
                finally:
                    with self._lock:
                        self._conversations.discard(conversation)
        except Exception as exc:
            if not isinstance(exc, PeerGoneError):
                metrics.failed(type(exc).__name__)
            log_end(peer, exc)
        finally:
            self._limiter.leave(connection)
            metrics.connections(-1)
            with self._lock:
                self._threads.discard(threading.current_thread())
