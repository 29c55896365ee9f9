"""UDP sockets: small datagrams, trains of large ones, and the kernel's time of each arrival.

A datagram, integers big-endian:

    offset  size  field
    0       16    cookie: the TCP connection that it belongs to; the service sends it there
    16      4     number of the train; 0: a ping or a pong
    20      4     number of the datagram in its train, from 0
    24      ...   zeros; in a pong: a nonce of 16, and how long (ns, 8) the service held the ping

Theory of operation. The kernel stamps each datagram when it arrives, so a receiver that wakes up late measures the
same. A train leaves in a few large pieces, which the kernel cuts into datagrams (UDP_SEGMENT): this process cannot
pause between two of them. Each system call has a timeout, and no thread spins. One thread receives, any thread may send
or close; `Datagrams.close` wakes the receiver.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import time
from typing import Any, NamedTuple

from neurosurgeon.net.wire import TIMEVAL
from neurosurgeon.utils.errors import ConnectError

log = logging.getLogger(__name__)

VERSION = 1
HEADER = struct.Struct("!16sII")
KEPT_NS = struct.Struct("!Q")  # how long the service held a ping
COOKIE_BYTES = NONCE_BYTES = 16
UDP_PING = 0  # as the number of a train; a pong has it, too
MAX_DATAGRAM_BYTES = 1472  # with the headers of IP and UDP, an Ethernet packet
IP_UDP_BYTES = 28
SO_TIMESTAMPNS = 35  # asm-generic/socket.h; the socket module does not name it
SOL_UDP, UDP_SEGMENT = 17, 103  # linux/udp.h, Linux 4.18
MAX_PIECE_BYTES = 16_000  # in one call; a token bucket on this machine passes a piece whole, and a train has many
TIMESPEC = struct.Struct("@ll")
BUFFER_BYTES = 1 << 20  # the kernel holds a few trains while this process sleeps


class Datagram(NamedTuple):
    """The fields of a datagram."""

    cookie: bytes
    train: int
    sequence: int
    rest: bytes


class Arrival(NamedTuple):
    """A datagram that has arrived."""

    data: bytes
    time_ns: int  # the kernel's wall clock: only differences within a train count
    sender: Any  # its address


def pack_datagram(cookie: bytes, train: int, sequence: int, size_bytes: int = 0, rest: bytes = b"") -> bytes:
    """Return a datagram, padded with zeros to ``size_bytes``."""
    return (HEADER.pack(cookie, train, sequence) + rest).ljust(size_bytes, b"\0")


def unpack_datagram(data: bytes) -> Datagram | None:
    """Return the fields of a datagram, or None if it is too short."""
    if len(data) < HEADER.size:
        return None
    cookie, train, sequence = HEADER.unpack_from(data)
    return Datagram(cookie, train, sequence, data[HEADER.size :])


class Datagrams:
    """A UDP socket with the kernel's time of each arrival. One thread receives, any thread may send or close."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except OSError:  # not Linux: the time of reading is used
            log.debug("the kernel has no arrival times of datagrams")

    @classmethod
    def bound(cls, address: Any, family: socket.AddressFamily) -> Datagrams | None:
        """Return a socket at an address of this machine, or None if another process has it."""
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.bind(address)
        except OSError as exc:
            sock.close()
            log.warning("no UDP at %s (%s): links are measured by TCP alone", address[:2], exc.strerror or exc)
            return None
        return cls(sock)

    @classmethod
    def connected(cls, host: str, port: int) -> Datagrams:
        """Return a socket that sends to one address, and receives from it alone.

        Raises: ConnectError: there is no route to it.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.connect(address)
        except OSError as exc:
            raise ConnectError(f"no UDP to {host}: {exc.strerror or exc}") from exc
        return cls(sock)

    def __enter__(self) -> Datagrams:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket, and wake the thread that waits in `receive`; a second call does nothing."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # close alone does not wake a waiting thread on Linux
        except OSError:
            log.debug("UDP socket was not connected")
        self._sock.close()

    def receive(self, wait_s: float) -> Arrival | None:
        """Return the next datagram, or None: at the timeout, or when the peer's machine refused one of ours. Blocks.

        Raises: EOFError: the socket was closed.
        """
        seconds, microseconds = divmod(max(1, round(wait_s * 1e6)), 1_000_000)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(seconds, microseconds))
            data, ancillary, _, sender = self._sock.recvmsg(2048, socket.CMSG_SPACE(TIMESPEC.size))
        except OSError as exc:
            if self._sock.fileno() < 0 or exc.errno == errno.EBADF:
                raise EOFError from exc
            return None
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
                seconds, nanoseconds = TIMESPEC.unpack(value[: TIMESPEC.size])
                return Arrival(data, seconds * 1_000_000_000 + nanoseconds, sender)
        return Arrival(data, time.time_ns(), sender)

    def send(self, data: bytes, receiver: Any = None) -> bool:
        """Send a datagram; return False if the system did not accept it. It may be lost all the same."""
        try:
            self._sock.sendto(data, receiver) if receiver else self._sock.send(data)
        except OSError as exc:  # no route, refused, too large, or no room
            log.debug("a datagram was not sent: %s", exc)
            return False
        return True

    def send_train(self, cookie: bytes, train: int, packets: int, size_bytes: int, receiver: Any = None) -> float:
        """Send a train as fast as the system accepts it; return the time that took (s)."""
        datagrams = [pack_datagram(cookie, train, sequence, size_bytes) for sequence in range(packets)]
        at_once = MAX_PIECE_BYTES // len(datagrams[0])
        pieces = [b"".join(datagrams[start : start + at_once]) for start in range(0, packets, at_once)]
        start_s = time.perf_counter()
        if not all(self._send_piece(piece, len(datagrams[0]), receiver) for piece in pieces):
            for datagram in datagrams:  # the receiver ignores duplicates
                self.send(datagram, receiver)
        return time.perf_counter() - start_s

    def _send_piece(self, piece: bytes, size_bytes: int, receiver: Any) -> bool:
        cut = [(SOL_UDP, UDP_SEGMENT, struct.pack("@H", size_bytes))]
        try:
            self._sock.sendmsg([piece], cut, 0, *([receiver] if receiver else []))
        except OSError as exc:  # an older kernel, or a device that cannot
            log.debug("the kernel does not cut datagrams (UDP_SEGMENT): %s", exc)
            return False
        return True
