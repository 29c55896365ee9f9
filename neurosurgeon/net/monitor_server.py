"""The bandwidth service: replies to pings, and returns when the bytes of a probe arrived. A process of its own.

Its threads block in accept and read, and none spins. Every probe is bounded in bytes and time, and connections in
number. A thread serves each connection; one more receives UDP trains at the port of the same number (`net.trains`).
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext

from neurosurgeon.net.connection import Connection
from neurosurgeon.net.datagrams import MAX_DATAGRAM_BYTES, VERSION, Datagrams
from neurosurgeon.net.limits import ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.messages import AskTicket, AskTrain, Hello, Message, Ping, Pong, Probe, Samples, Ticket, Train
from neurosurgeon.net.trains import MAX_TRAIN_PACKETS, UdpSession, UdpSessions
from neurosurgeon.utils.errors import DeadlineError, NetworkError, PeerGoneError, ProtocolError
from neurosurgeon.utils.load import Load
from neurosurgeon.utils.logs import internal_error

log = logging.getLogger(__name__)

MAX_PROBE_BYTES = 4_194_304
MAX_SAMPLES = 4_096  # that fit into one header
MAX_CONNECTIONS = 32
IDLE_TIMEOUT_S = 60.0  # a monitor sends a ping every second
READ_BYTES = 262_144


class MonitorServer:
    """Serves probes on a listening socket, with a thread for each connection."""

    def __init__(self, listener: socket.socket, limiter: ConnectionLimiter | None = None) -> None:
        self.load = Load()
        self._listener = listener
        self._limiter = limiter or ConnectionLimiter(limits=ConnectionLimits(MAX_CONNECTIONS))
        self._udp: UdpSessions | None = None

    def record_load(self, line: str) -> None:
        """Record the load from a line of the cloud; any other line is ignored."""
        self.load = Load.of_line(line) or self.load

    def serve(self) -> None:
        """Accept connections until `stop_accepting`. Blocks."""
        address = self._listener.getsockname()
        datagrams = Datagrams.bound(address, self._listener.family)
        if datagrams:
            self._udp = UdpSessions(datagrams, address[1])
            threading.Thread(target=self._udp.serve, name="datagrams", daemon=True).start()
        for connection in self._limiter.accept(self._listener):
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()
        if datagrams:
            datagrams.close()

    def _serve_one(self, connection: Connection) -> None:
        try:
            with connection:
                self._limiter.authenticate(connection)
                with self._udp.open() if self._udp else nullcontext() as session:
                    ProbeService(connection, lambda: self.load, session).serve()
        except (PeerGoneError, DeadlineError) as exc:
            log.debug("probe ended: %s", exc)
        except NetworkError as exc:
            log.warning("bandwidth service closed the connection of %s: %s", connection.peer, exc)
        except Exception as exc:
            internal_error(log, exc, f"bandwidth service closed the connection of {connection.peer}")
        finally:
            self._limiter.leave(connection)


class ProbeService:
    """Serves one authenticated client."""

    def __init__(self, connection: Connection, load: Callable[[], Load], session: UdpSession | None) -> None:
        self._connection = connection
        self._load = load
        self._session = session
        self._scratch = memoryview(bytearray(READ_BYTES))

    def serve(self) -> None:
        """Serve the client until it closes the connection; each pong carries the current load. Blocks.

        Raises: NetworkError: the client closed the connection, was idle, or broke the protocol.
        """
        self._connection.send(Hello.of(service="bandwidth", trains=self._session is not None))
        while True:
            self._reply(self._connection.receive(IDLE_TIMEOUT_S).message)

    def _reply(self, message: Message) -> None:
        connection, session = self._connection, self._session
        match message:
            case Ping(sequence):
                connection.send(Pong(sequence, *self._load()))
            case Probe(size_bytes) if 0 < size_bytes <= MAX_PROBE_BYTES:
                connection.send(receive_probe(connection, size_bytes, self._scratch))
            case AskTicket(version) if session and version == VERSION:
                connection.send(Ticket(session.port, session.cookie))
            case Train(number, packets) if session and is_train(number, packets):
                connection.send(session.expect(number, packets).wait())
            case AskTrain(nonce, number, packets, size_bytes) if session and is_train(number, packets, size_bytes):
                if not session.send_train(nonce, number, packets, size_bytes):
                    log.warning("%s requested a train with a wrong nonce: none is sent", connection.peer)
            case _:
                name = type(message).__name__
                raise ProtocolError(
                    f"{connection.peer} sent {name}, which this service does not serve, or not so large"
                )


def is_train(number: int, packets: int, size_bytes: int = MAX_DATAGRAM_BYTES) -> bool:
    """Return whether a train is within the limits."""
    return 0 < number < 2**32 and 0 < packets <= MAX_TRAIN_PACKETS and 0 < size_bytes <= MAX_DATAGRAM_BYTES


def receive_probe(connection: Connection, size_bytes: int, scratch: memoryview) -> Samples:
    """Return when each part of a probe arrived (us, from the first), and its bytes. Blocks.

    Parts beyond `MAX_SAMPLES` are added to the last one.
    """
    times_us: list[int] = []
    sizes_bytes: list[int] = []
    start_s = None
    for time_s, count in connection.receive_raw(size_bytes, scratch):
        start_s = time_s if start_s is None else start_s
        if len(times_us) < MAX_SAMPLES:
            times_us.append(0)
            sizes_bytes.append(0)
        times_us[-1] = round((time_s - start_s) * 1e6)
        sizes_bytes[-1] += count
    return Samples(times_us, sizes_bytes)
