"""The service's side of UDP trains: each TCP connection has a cookie, and receives the datagrams that carry it.

Theory of operation.

    client                                                    service
    1. AskTicket (TCP)                          ────────▶
                                                ◀────────     Ticket: the UDP port, and a cookie of 16 random bytes
    2. Train (TCP), then its datagrams          ────────▶
                                                ◀────────     Samples (TCP): when each datagram arrived
    3. UDP ping                                 ────────▶
                                                ◀────────     UDP pong: how long the service held the ping; a nonce
    4. AskTrain with the nonce (TCP)            ────────▶
                                                ◀────────     the datagrams of a train

- The cookie stands for the authentication of its connection (a key, a certificate). A datagram without a known cookie
  is dropped without a reply.
- The round trip of a ping less the time that the service held it is that of the network. A pong is no longer than its
  ping.
- A train goes only to the address of the last ping, and only if the client repeats its nonce over TCP. So a ping with a
  forged address makes the service send a pong there, and no train.

Two threads meet here. One thread of the service receives all datagrams (`UdpSessions.serve`). The thread of each TCP
connection opens and closes its `UdpSession`, announces trains, and waits for their datagrams. A session guards its
fields with a lock; a `Collector` has a condition of its own, so that a thread that waits blocks no datagrams.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from neurosurgeon.net.datagrams import (
    COOKIE_BYTES,
    KEPT_NS,
    NONCE_BYTES,
    UDP_PING,
    Arrival,
    Datagram,
    Datagrams,
    pack_datagram,
    unpack_datagram,
)
from neurosurgeon.net.messages import Samples

MAX_TRAIN_PACKETS = 128
FIRST_WAIT_S = 0.3  # a train follows its announcement on the same path: without a packet by then, UDP is blocked
QUIET_S = 0.15  # after a pause this long inside a train, the rest is lost
TRAIN_TIMEOUT_S = 2.0
IDLE_S = 3600.0


class Collector:
    """Collects the datagrams of one train. One thread records them; another one may `wait`."""

    def __init__(self, number: int, packets: int = MAX_TRAIN_PACKETS) -> None:
        self.number = number
        self.packets = packets  # expected
        self._changed = threading.Condition()
        self._arrivals: dict[int, tuple[int, int]] = {}  # by sequence: ns, bytes

    def record(self, datagram: Datagram, arrival: Arrival) -> None:
        """Record a datagram; duplicates, and datagrams of other trains, are ignored."""
        with self._changed:
            if datagram.train == self.number and datagram.sequence < self.packets:
                self._arrivals.setdefault(datagram.sequence, (arrival.time_ns, len(arrival.data)))
                self._changed.notify_all()

    @property
    def is_complete(self) -> bool:
        """Whether all packets of the train have arrived."""
        return len(self._arrivals) >= self.packets

    def wait(self) -> Samples:
        """Return when each datagram arrived. Blocks until all have, or no more arrive."""
        deadline_s = time.monotonic() + TRAIN_TIMEOUT_S
        with self._changed:
            while not self.is_complete and time.monotonic() < deadline_s:
                if not self._changed.wait(QUIET_S if self._arrivals else FIRST_WAIT_S):
                    break
            return self.samples()

    def samples(self) -> Samples:
        """Return the arrival times so far (us, from the first), in order, and the sizes (bytes)."""
        arrivals = sorted(self._arrivals.values())
        first_ns = arrivals[0][0] if arrivals else 0
        return Samples([(time_ns - first_ns) // 1_000 for time_ns, _ in arrivals], [size for _, size in arrivals])


class UdpSession:
    """The UDP side of one TCP connection."""

    def __init__(self, datagrams: Datagrams, port: int) -> None:
        self.port = port
        self.cookie = secrets.token_bytes(COOKIE_BYTES)
        self._datagrams = datagrams
        self._lock = threading.Lock()
        self._collector = Collector(0)
        self._nonce: bytes | None = None
        self._address: Any = None  # of the last ping

    def expect(self, number: int, packets: int) -> Collector:
        """Return the collector of an announced train; its first packets may have arrived already."""
        with self._lock:
            if self._collector.number != number:
                self._collector = Collector(number)
            self._collector.packets = packets
            return self._collector

    def record(self, datagram: Datagram, arrival: Arrival) -> None:
        """Record a datagram of a train; one of a new train may overtake its announcement."""
        with self._lock:
            if datagram.train > self._collector.number:
                self._collector = Collector(datagram.train)
            collector = self._collector
        collector.record(datagram, arrival)

    def issue_nonce(self, address: Any) -> bytes:
        """Return a new nonce, with which the client proves that it receives datagrams at ``address``."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        with self._lock:
            self._address, self._nonce = address, nonce
        return nonce

    def send_train(self, nonce: bytes, number: int, packets: int, size_bytes: int) -> bool:
        """Send a train to the address of the last nonce; return False if ``nonce`` is another one. It is valid once."""
        with self._lock:
            is_proven = self._nonce is not None and secrets.compare_digest(nonce, self._nonce)
            self._nonce, address = None, self._address
        if is_proven:
            self._datagrams.send_train(self.cookie, number, packets, size_bytes, address)
        return is_proven


class UdpSessions:
    """Distributes the datagrams of one UDP port to the sessions that their cookies belong to."""

    def __init__(self, datagrams: Datagrams, port: int) -> None:
        self._port = port
        self._datagrams = datagrams
        self._sessions: dict[bytes, UdpSession] = {}  # by cookie

    @contextmanager
    def open(self) -> Iterator[UdpSession]:
        """Yield a session with a new cookie; at the end of the block its cookie is no longer known."""
        session = UdpSession(self._datagrams, self._port)
        self._sessions[session.cookie] = session
        try:
            yield session
        finally:
            del self._sessions[session.cookie]

    def serve(self) -> None:
        """Handle datagrams until the socket is closed. Blocks."""
        try:
            while True:
                arrival = self._datagrams.receive(IDLE_S)
                if arrival:
                    self._handle(arrival)
        except EOFError:
            return

    def _handle(self, arrival: Arrival) -> None:
        datagram = unpack_datagram(arrival.data)
        session = self._sessions.get(datagram.cookie) if datagram else None
        if datagram is None or session is None:
            return
        if datagram.train != UDP_PING:
            session.record(datagram, arrival)
            return
        pong = pack_datagram(session.cookie, UDP_PING, datagram.sequence, rest=session.issue_nonce(arrival.sender))
        if len(pong) + KEPT_NS.size <= len(arrival.data):  # no amplification
            kept_ns = max(time.time_ns() - arrival.time_ns, 0)  # read right before it is sent
            self._datagrams.send(pong + KEPT_NS.pack(kept_ns), arrival.sender)
