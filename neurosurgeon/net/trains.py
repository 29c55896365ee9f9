"""The service's side of UDP trains: each TCP connection has a cookie, and what arrives with it is its own.

1. Over TCP the client asks for a ticket, and gets the UDP port and a cookie of 16 random bytes. Whatever let it speak
   there (a key, a certificate) is behind the cookie, too. Datagrams without a known cookie are dropped unanswered.
2. Uplink: it announces a train over TCP, sends it, and hears over TCP when each datagram arrived.
3. It knocks with a datagram. The answer, no longer than the knock, tells how long the service had it: what is left is
   the network's round trip. It also brings a nonce.
4. Downlink: only who repeats the nonce over TCP has shown that the datagrams' sender is who talks there, and gets a
   train. A false address gets nothing.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

from neurosurgeon.net.datagrams import (
    COOKIE_BYTES,
    KEPT,
    KNOCK,
    NONCE_BYTES,
    Arrival,
    Datagram,
    Datagrams,
    pack_datagram,
    unpack_datagram,
)
from neurosurgeon.net.messages import Samples

MAX_TRAIN_PACKETS = 128
FIRST_WAIT_S = 0.3  # a train follows its announcement on the same way: what has not come by now is blocked
QUIET_S = 0.15  # a pause this long inside a train: the rest is lost
TRAIN_TIMEOUT_S = 2.0
IDLE_S = 3600.0


class Collector:
    """The datagrams of one train, as they come."""

    def __init__(self, number: int, packets: int = MAX_TRAIN_PACKETS) -> None:
        self.number = number
        self._packets = packets
        self._changed = threading.Condition()
        self._arrivals: dict[int, tuple[int, int]] = {}  # by sequence: ns, bytes

    def take(self, datagram: Datagram, arrival: Arrival) -> None:
        """Take in a datagram; copies, and those of other trains, do not count."""
        with self._changed:
            if datagram.train == self.number and datagram.sequence < self._packets:
                self._arrivals.setdefault(datagram.sequence, (arrival.time_ns, len(arrival.data)))
                self._changed.notify_all()

    def expect(self, packets: int) -> None:
        """Say how many there will be."""
        with self._changed:
            self._packets = packets

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        return len(self._arrivals) >= self._packets

    def wait(self) -> Samples:
        """Return when each datagram arrived; waits until all have, or no more come."""
        deadline_s = time.monotonic() + TRAIN_TIMEOUT_S
        with self._changed:
            while not self.is_complete and time.monotonic() < deadline_s:
                if not self._changed.wait(QUIET_S if self._arrivals else FIRST_WAIT_S):
                    break
            return self.samples()

    def samples(self) -> Samples:
        """Return when each datagram arrived that has arrived, in order, from the first on."""
        arrivals = sorted(self._arrivals.values())
        first_ns = arrivals[0][0] if arrivals else 0
        return Samples([(time_ns - first_ns) // 1_000 for time_ns, _ in arrivals], [size for _, size in arrivals])


class Guest:
    """A TCP connection at the UDP port."""

    def __init__(self) -> None:
        self.cookie = secrets.token_bytes(COOKIE_BYTES)
        self._lock = threading.Lock()
        self._collector = Collector(0)
        self._nonce: bytes | None = None
        self._address: Any = None

    def expect(self, number: int, packets: int) -> Collector:
        """Return what collects an announced train; its first packets may have come already."""
        with self._lock:
            if self._collector.number != number:
                self._collector = Collector(number)
            self._collector.expect(packets)
            return self._collector

    def take(self, datagram: Datagram, arrival: Arrival) -> None:
        """Take in a datagram of a train; one of a new train may overtake its announcement."""
        with self._lock:
            if datagram.train > self._collector.number:
                self._collector = Collector(datagram.train)
            collector = self._collector
        collector.take(datagram, arrival)

    def knocked(self, address: Any) -> bytes:
        """Return the nonce with which the client proves that it gets what is sent to ``address``."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        with self._lock:
            self._address, self._nonce = address, nonce
        return nonce

    def proven_address(self, nonce: bytes) -> Any:
        """Return where the client gets datagrams; None where the nonce is not the last one. A nonce serves once."""
        with self._lock:  # another knock would come with another address
            proven = self._nonce is not None and secrets.compare_digest(nonce, self._nonce)
            self._nonce = None
            return self._address if proven else None


class TrainDesk:
    """Hands the datagrams of one UDP port to the connections that they belong to."""

    def __init__(self, datagrams: Datagrams, port: int) -> None:
        self.port = port
        self._datagrams = datagrams
        self._guests: dict[bytes, Guest] = {}

    def admit(self) -> Guest:
        """Return a guest with a cookie of its own; to be dismissed when its connection ends."""
        guest = Guest()
        self._guests[guest.cookie] = guest
        return guest

    def dismiss(self, guest: Guest) -> None:
        """Forget a guest: its cookie opens nothing any more."""
        self._guests.pop(guest.cookie, None)

    def serve(self) -> None:
        """Take datagrams until the socket is closed."""
        try:
            while True:
                arrival = self._datagrams.receive(IDLE_S)
                if arrival:
                    self._handle(arrival)
        except EOFError:
            return

    def send_train(self, guest: Guest, nonce: bytes, number: int, packets: int, size_bytes: int) -> bool:
        """Send a train to where the guest has proved to be; False where it has not."""
        address = guest.proven_address(nonce)
        if address:
            self._datagrams.send_train(guest.cookie, number, packets, size_bytes, address)
        return bool(address)

    def _handle(self, arrival: Arrival) -> None:
        datagram = unpack_datagram(arrival.data)
        guest = self._guests.get(datagram.cookie) if datagram else None
        if datagram is None or guest is None:
            return
        if datagram.train != KNOCK:
            guest.take(datagram, arrival)
            return
        answer = pack_datagram(guest.cookie, KNOCK, datagram.sequence, rest=guest.knocked(arrival.sender))
        if len(answer) + KEPT.size <= len(arrival.data):  # never more than came
            kept_ns = max(time.time_ns() - arrival.time_ns, 0)  # right before it leaves
            self._datagrams.send(answer + KEPT.pack(kept_ns), arrival.sender)
