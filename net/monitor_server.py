"""The bandwidth service: answers pings, and tells when the bytes of a probe arrived. A process of its own.

    python -m net.monitor_server -i 127.0.0.1 --monitor-port 9922

It blocks in accept and read, never spins; every probe is bounded in bytes and time, and connections in number.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
from collections.abc import Sequence

from net.framing import SMALL_LIMITS
from net.messages import Hello, Ping, Pong, Probe, Samples
from net.net_utils import format_address
from net.transport import Connection, accepted, listen, stop_accepting
from utils.cli import address_parser, end_with_parent, listening_line, run_main, stop_event
from utils.errors import DeadlineError, NetworkError, PeerGoneError, ProtocolError

log = logging.getLogger(__name__)

MAX_PROBE_BYTES = 4_194_304
MAX_SAMPLES = 4_096  # as many as fit into one header
MAX_CONNECTIONS = 32
HELLO_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 60.0  # a monitor that asks every second is never idle that long
READ_BYTES = 262_144


class MonitorServer:
    """Serves probes on a listening socket, a thread for each connection."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def serve(self) -> None:
        """Accept connections until `stop_accepting`."""
        for sock, address in accepted(self._listener):
            if not self._slots.acquire(blocking=False):
                log.warning("%s refused: %d connections are open", format_address(address), MAX_CONNECTIONS)
                sock.close()
                continue
            threading.Thread(target=self._serve_one, args=(sock,), daemon=True).start()

    def _serve_one(self, sock: socket.socket) -> None:
        try:
            with Connection(sock, SMALL_LIMITS) as connection:
                serve_probes(connection)
        except (PeerGoneError, DeadlineError) as exc:
            log.debug("probe ended: %s", exc)
        except (NetworkError, OSError) as exc:
            log.warning("bandwidth service closed a connection: %s", exc)
        finally:
            self._slots.release()


def serve_probes(connection: Connection) -> None:
    """Answer one client until it leaves.

    Raises: NetworkError: the client left, idled, or broke the protocol.
    """
    scratch = memoryview(bytearray(READ_BYTES))
    if not isinstance(connection.receive(HELLO_TIMEOUT_S).message, Hello):
        raise ProtocolError(f"{connection.peer} did not say hello")
    connection.send(Hello.of(service="bandwidth"))
    while True:
        match connection.receive(IDLE_TIMEOUT_S).message:
            case Ping(sequence):
                connection.send(Pong(sequence))
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
    parser.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    return run_main(parser, argv, _run)


def _run(args: argparse.Namespace) -> int:
    listener = listen(args.ip, args.monitor_port)
    stop = stop_event(ignore_interrupt=args.until_stdin_closes)
    if args.until_stdin_closes:
        end_with_parent(stop)
    threading.Thread(target=MonitorServer(listener).serve, daemon=True).start()
    log.info(listening_line("bandwidth service", format_address(listener.getsockname())))
    stop.wait()
    stop_accepting(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
