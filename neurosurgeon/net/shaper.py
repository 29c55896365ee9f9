"""A slow network without root: TCP and UDP to a cloud go through a relay on loopback that paces and delays them.

    edge  ──▶  127.0.0.2:9999  ── rate, RTT / 2 ──▶  cloud:9999
          ◀──                  ◀─ rate, RTT / 2 ──

    python -m neurosurgeon relay -i 192.0.2.7 -p 9999 --shape 20,10
    python edge_api.py -i 127.0.0.2 -p 9999 ...

The edge's scripts start it themselves (--shape, --trace). It serves the cloud's ports at an address of its own.

Theory of operation. An `EmulatedLink` is one direction, which all connections share: bytes wait in one queue, leave at
the current rate of the trace, and arrive RTT / 2 later. Its thread delivers them in order. Each TCP connection has two
threads that read, one a direction; each sender of datagrams has one for the replies. A thread that reads TCP sleeps
until its bytes have left the queue, so the sender meets backpressure. Datagrams are dropped while the queue is full.
Slow start and random losses are not emulated.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from neurosurgeon.net.net_utils import format_address
from neurosurgeon.net.sockets import accepted
from neurosurgeon.net.traces import Condition, Trace
from neurosurgeon.utils.units import mbit_per_s_to_bytes_per_s, ms_to_s

log = logging.getLogger(__name__)

RELAY_IP = "127.0.0.2"  # loopback, too; the cloud's own ports are free there
SEGMENT_BYTES, IP_UDP_BYTES = 1448, 28
CHUNK_S, MAX_CHUNK_BYTES = 0.002, 65_536  # duration of a piece of TCP's bytes; it has at least a packet
QUEUE_S, QUEUE_BYTES = 0.02, 64_000  # the queue holds the larger of both
CONNECT_S, UDP_IDLE_S = 5.0, 10.0
BEGIN = "begin"  # the line by which a parent begins the trace


class TraceClock:
    """The current condition of a trace."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._start_s: float | None = None

    def begin(self) -> None:
        """Begin the trace now; until then its first condition holds."""
        self._start_s = time.monotonic()

    def now(self) -> Condition:
        """Return the current condition."""
        return self._trace.at(0.0 if self._start_s is None else time.monotonic() - self._start_s)

    def transfer_s(self, start_s: float, size_bytes: float) -> float:
        """Return the duration (s) of a transfer that starts at ``start_s`` (monotonic)."""
        if self._start_s is None:
            return size_bytes / mbit_per_s_to_bytes_per_s(self.now().rate_mbit)
        return self._trace.transfer_s(start_s - self._start_s, size_bytes)


class EmulatedLink:
    """One direction of the network: a queue that leaves at the current rate, and is delivered later, in order.

    Any thread may send.
    """

    def __init__(self, clock: TraceClock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._free_s = 0.0  # when the last byte leaves the queue
        self._waiting: deque[tuple[float, float]] = deque()  # when each item leaves it (s), and its bytes
        self._due: SimpleQueue[tuple[float, Callable[[], object]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._deliver_all, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver all that was sent, and end the thread. Blocks."""
        self._due.put(None)
        self._thread.join()

    def chunk_bytes(self) -> int:
        """Return the size of a piece of TCP's bytes."""
        rate_bytes_per_s = mbit_per_s_to_bytes_per_s(self._clock.now().rate_mbit)
        return max(SEGMENT_BYTES, min(round(rate_bytes_per_s * CHUNK_S), MAX_CHUNK_BYTES))

    def send(self, wire_bytes: float, deliver: Callable[[], object], *, may_drop: bool = False) -> float:
        """Send an item; return when it leaves the queue (s, monotonic).

        Args: deliver: called by the thread of this link. may_drop: drop the item if the queue is full.
        """
        condition = self._clock.now()
        most_bytes = max(QUEUE_BYTES, mbit_per_s_to_bytes_per_s(condition.rate_mbit) * QUEUE_S)
        with self._lock:
            start_s = max(self._free_s, time.monotonic())
            if may_drop and self._waiting_bytes() > most_bytes:
                return start_s
            self._free_s = start_s + self._clock.transfer_s(start_s, wire_bytes)
            self._waiting.append((self._free_s, wire_bytes))
            self._due.put((self._free_s + ms_to_s(condition.rtt_ms) / 2, deliver))
            return self._free_s

    def _waiting_bytes(self) -> float:
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            self._waiting.popleft()
        return sum(size_bytes for _, size_bytes in self._waiting)

    def _deliver_all(self) -> None:
        while due := self._due.get():
            due_s, deliver = due
            sleep_until(due_s)
            with contextlib.suppress(OSError):  # its receiver has closed
                deliver()


def sleep_until(time_s: float) -> None:
    """Block until a monotonic time."""
    pause_s = time_s - time.monotonic()
    if pause_s > 0:
        time.sleep(pause_s)


@dataclass(frozen=True, slots=True)
class Relay:
    """Both directions to one port of the cloud, by TCP and UDP."""

    cloud: tuple[str, int]
    up: EmulatedLink
    down: EmulatedLink

    def serve_tcp(self, listener: socket.socket) -> None:
        """Relay connections until `stop_accepting`. Blocks."""
        for near, address in accepted(listener):
            threading.Thread(target=self._relay, args=(near, address), daemon=True).start()

    def _relay(self, near: socket.socket, address: Any) -> None:
        try:
            far = socket.create_connection(self.cloud, CONNECT_S)
        except OSError as exc:
            log.warning("%s: cannot connect to %s: %s", format_address(address), format_address(self.cloud), exc)
            near.close()
            return
        far.settimeout(None)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=self._pump, args=(far, near, self.down), daemon=True)
        back.start()
        self._pump(near, far, self.up)
        back.join()
        near.close()
        far.close()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, link: EmulatedLink) -> None:
        """Relay one direction to its end. Blocks; the end is delivered after all bytes."""
        ended = threading.Event()

        def end() -> None:
            ended.set()
            sink.shutdown(socket.SHUT_WR)

        with contextlib.suppress(OSError):  # reset: the other side receives an end
            while data := source.recv(link.chunk_bytes()):
                sleep_until(link.send(len(data), partial(sink.sendall, data)))
        link.send(0, end)
        ended.wait()

    def serve_udp(self, near: socket.socket) -> None:
        """Relay datagrams, those of each sender by a socket of its own, until ``near`` is closed. Blocks."""
        far_of: dict[Any, socket.socket] = {}
        while near.fileno() >= 0:
            with contextlib.suppress(OSError):  # closed, or no route for this one
                data, sender = near.recvfrom(MAX_CHUNK_BYTES)
                far = far_of.get(sender) or self._open_far(near, sender, far_of)
                self.up.send(len(data) + IP_UDP_BYTES, partial(far.send, data), may_drop=True)

    def _open_far(self, near: socket.socket, sender: Any, far_of: dict[Any, socket.socket]) -> socket.socket:
        far_of[sender] = far = socket.socket(near.family, socket.SOCK_DGRAM)
        far.settimeout(UDP_IDLE_S)
        far.connect(self.cloud)

        def relay_replies() -> None:
            with far, contextlib.suppress(OSError):  # idle, or no service there
                while data := far.recv(MAX_CHUNK_BYTES):
                    self.down.send(len(data) + IP_UDP_BYTES, partial(near.sendto, data, sender), may_drop=True)
            del far_of[sender]

        threading.Thread(target=relay_replies, daemon=True).start()
        return far
