"""The bandwidth service: answers pings, and tells when the bytes of a probe arrived. A process of its own.

    python -m net.monitor_server -i 127.0.0.1 --monitor-port 9922

It blocks in accept and read, never spins; every probe is bounded in bytes and time, and connections in number.
"""

from __future__ import annotations

import argparse
import logging
import math
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from net.access import access_of_cloud
from net.door import Door, DoorLimits
from net.messages import Hello, Ping, Pong, Probe, Samples
from net.net_utils import format_address
from net.transport import Connection, listen, stop_accepting
from utils.cli import add_insecure, address_parser, end_with_parent, listening_line, run_main, stop_event
from utils.errors import DeadlineError, NetworkError, PeerGoneError, ProtocolError

log = logging.getLogger(__name__)

MAX_PROBE_BYTES = 4_194_304
MAX_SAMPLES = 4_096  # as many as fit into one header
MAX_CONNECTIONS = 32
IDLE_TIMEOUT_S = 60.0  # a monitor that asks every second is never idle that long
READ_BYTES = 262_144


class CloudLoad(NamedTuple):
    """What tasks wait and take in the cloud that this service belongs to, ms."""

    queue_ms: float = 0.0
    service_ms: float = 0.0

    def line(self) -> str:
        """Return the line with which the cloud tells it to its bandwidth service."""
        return f"load {self.queue_ms:.3f} {self.service_ms:.3f}"

    @classmethod
    def of_line(cls, line: str) -> CloudLoad | None:
        """Return what a line tells; None where it tells no load."""
        word, *numbers = line.split()[:4] or [""]
        try:
            load = cls(*map(float, numbers))
        except (TypeError, ValueError):
            return None
        sensible = len(numbers) == 2 and all(0 <= value < math.inf for value in load)
        return load if word == "load" and sensible else None


class MonitorServer:
    """Serves probes on a listening socket, a thread for each connection."""

    def __init__(self, listener: socket.socket, door: Door | None = None) -> None:
        self.load = CloudLoad()
        self._listener = listener
        self._door = door or Door(limits=DoorLimits(MAX_CONNECTIONS))

    def take_line(self, line: str) -> None:
        """Keep the load that the cloud tells; any other line is ignored."""
        self.load = CloudLoad.of_line(line) or self.load

    def serve(self) -> None:
        """Accept connections until `stop_accepting`."""
        for connection in self._door.visitors(self._listener):
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def _serve_one(self, connection: Connection) -> None:
        try:
            with connection:
                self._door.let_in(connection)
                serve_probes(connection, lambda: self.load)
        except (PeerGoneError, DeadlineError) as exc:
            log.debug("probe ended: %s", exc)
        except (NetworkError, OSError) as exc:
            log.warning("bandwidth service closed the connection of %s: %s", connection.peer, exc)
        finally:
            self._door.leave(connection)


def serve_probes(connection: Connection, load: Callable[[], CloudLoad]) -> None:
    """Answer a client that was let in until it leaves; with each ping it hears the load of the moment.

    Raises: NetworkError: the client left, idled, or broke the protocol.
    """
    scratch = memoryview(bytearray(READ_BYTES))
    connection.send(Hello.of(service="bandwidth"))
    while True:
        match connection.receive(IDLE_TIMEOUT_S).message:
            case Ping(sequence):
                connection.send(Pong(sequence, *load()))
            case Probe(size_bytes) if 0 < size_bytes <= MAX_PROBE_BYTES:
                connection.send(receive_probe(connection, size_bytes, scratch))
            case other:
                raise ProtocolError(f"{connection.peer} sent {type(other).__name__}, which this service does not serve")


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = address_parser("monitor_server.py", __doc__, port=False, monitor_port=True)
    add_insecure(parser)
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    access = access_of_cloud(args)
    listener = listen(args.ip, args.monitor_port, access)
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    server = MonitorServer(listener, Door(access, DoorLimits(MAX_CONNECTIONS)))
    if args.until_stdin_closes:
        end_with_parent(stop, server.take_line)
    threading.Thread(target=server.serve, daemon=True).start()
    log.info(listening_line("bandwidth service", format_address(listener.getsockname())))
    stop.wait()
    stop_accepting(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
