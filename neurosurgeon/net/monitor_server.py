"""The bandwidth service: answers pings, and tells when the bytes of a probe arrived. A process of its own.

It blocks in accept and read, never spins; every probe is bounded in bytes and time, and connections in number. UDP
trains come to the port of the same number; see `net.trains` for who may send and get them.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from neurosurgeon.net.connection import Connection
from neurosurgeon.net.datagrams import MAX_DATAGRAM_BYTES, VERSION, Datagrams
from neurosurgeon.net.limits import ConnectionLimiter, ConnectionLimits
from neurosurgeon.net.messages import AskTicket, AskTrain, Hello, Message, Ping, Pong, Probe, Samples, Ticket, Train
from neurosurgeon.net.trains import MAX_TRAIN_PACKETS, Guest, TrainDesk
from neurosurgeon.utils.errors import DeadlineError, NetworkError, PeerGoneError, ProtocolError
from neurosurgeon.utils.load import CloudLoad
from neurosurgeon.utils.logs import internal_error

log = logging.getLogger(__name__)

MAX_PROBE_BYTES = 4_194_304
MAX_SAMPLES = 4_096  # as many as fit into one header
MAX_CONNECTIONS = 32
IDLE_TIMEOUT_S = 60.0  # a monitor that asks every second is never idle that long
READ_BYTES = 262_144


class MonitorServer:
    """Serves probes on a listening socket, a thread for each connection."""

    def __init__(self, listener: socket.socket, limiter: ConnectionLimiter | None = None) -> None:
        self.load = CloudLoad()
        self._listener = listener
        self._limiter = limiter or ConnectionLimiter(limits=ConnectionLimits(MAX_CONNECTIONS))
        self._desk: TrainDesk | None = None

    def take_line(self, line: str) -> None:
        """Keep the load that the cloud tells; any other line is ignored."""
        self.load = CloudLoad.of_line(line) or self.load

    def serve(self) -> None:
        """Accept connections until `stop_accepting`."""
        address = self._listener.getsockname()
        datagrams = Datagrams.bound(address, self._listener.family)
        if datagrams:
            self._desk = TrainDesk(datagrams, address[1])
            threading.Thread(target=self._desk.serve, name="datagrams", daemon=True).start()
        for connection in self._limiter.accept(self._listener):
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()
        if datagrams:
            datagrams.close()

    def _serve_one(self, connection: Connection) -> None:
        try:
            with connection:
                self._limiter.authenticate(connection)
                ProbeService(connection, lambda: self.load, self._desk).serve()
        except (PeerGoneError, DeadlineError) as exc:
            log.debug("probe ended: %s", exc)
        except NetworkError as exc:
            log.warning("bandwidth service closed the connection of %s: %s", connection.peer, exc)
        except Exception as exc:
            internal_error(log, exc, f"bandwidth service closed the connection of {connection.peer}")
        finally:
            self._limiter.leave(connection)


class ProbeService:
    """Answers one client that was let in."""

    def __init__(self, connection: Connection, load: Callable[[], CloudLoad], desk: TrainDesk | None = None) -> None:
        self._connection = connection
        self._load = load
        self._desk = desk
        self._guest = desk.admit() if desk else None
        self._scratch = memoryview(bytearray(READ_BYTES))

    def serve(self) -> None:
        """Serve the client until it leaves; with each ping it hears the load of the moment.

        Raises: NetworkError: the client left, idled, or broke the protocol.
        """
        connection = self._connection
        try:
            connection.send(Hello.of(service="bandwidth", trains=self._desk is not None))
            while True:
                self._answer(connection.receive(IDLE_TIMEOUT_S).message)
        finally:
            if self._desk and self._guest:
                self._desk.dismiss(self._guest)

    def _answer(self, message: Message) -> None:
        match message:
            case Ping(sequence):
                self._connection.send(Pong(sequence, *self._load()))
            case Probe(size_bytes) if 0 < size_bytes <= MAX_PROBE_BYTES:
                self._connection.send(receive_probe(self._connection, size_bytes, self._scratch))
            case AskTicket() | Train() | AskTrain() if self._desk and self._guest:
                self._answer_datagrams(message, self._desk, self._guest)
            case other:
                name = type(other).__name__
                raise ProtocolError(f"{self._connection.peer} sent {name}, which this service does not serve")

    def _answer_datagrams(self, message: AskTicket | Train | AskTrain, desk: TrainDesk, guest: Guest) -> None:
        match message:
            case AskTicket(version) if version == VERSION:
                self._connection.send(Ticket(desk.port, guest.cookie))
            case Train(number, packets) if 0 < number < 2**32 and 0 < packets <= MAX_TRAIN_PACKETS:
                self._connection.send(guest.expect(number, packets).wait())
            case AskTrain(nonce, number, packets, size_bytes) if (
                0 < number < 2**32 and 0 < packets <= MAX_TRAIN_PACKETS and 0 < size_bytes <= MAX_DATAGRAM_BYTES
            ):
                if not desk.send_train(guest, nonce, number, packets, size_bytes):
                    log.warning("%s asked for a train with a wrong nonce, and gets none", self._connection.peer)
            case _:
                raise ProtocolError(f"{self._connection.peer} asked for a train outside the limits: {message}")


def receive_probe(connection: Connection, size_bytes: int, scratch: memoryview) -> Samples:
    """Return when each part of a probe arrived, from the first on; late parts merge into the last sample."""
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
