"""UDP beside `net.sockets`: small datagrams, trains of large ones, and when the kernel saw each arrive.

A datagram, integers big-endian:

    offset  size  field
    0       16    cookie: which TCP connection it belongs to; the service told it there
    16      4     number of the train; 0: a knock, or the answer to one
    20      4     number of the datagram in its train, from 0
    24      ...   zeros; in the answer to a knock: a nonce of 16, and for how long (ns, 8) the service kept the knock
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
KEPT = struct.Struct("!Q")
COOKIE_BYTES = NONCE_BYTES = 16
KNOCK = 0
MAX_DATAGRAM_BYTES = 1472  # with the headers of IP and UDP, an Ethernet packet
IP_UDP_BYTES = 28
SO_TIMESTAMPNS = 35  # asm-generic/socket.h; the socket module does not name it
SOL_UDP, UDP_SEGMENT = 17, 103  # linux/udp.h, Linux 4.18
MAX_PIECE_BYTES = 16_000  # in one call; a token bucket on this machine lets a piece pass whole, and a train has many
TIMESPEC = struct.Struct("@ll")
BUFFER_BYTES = 1 << 20  # a few trains wait in the kernel while this process sleeps


class Datagram(NamedTuple):
    """What a datagram says."""

    cookie: bytes
    train: int
    sequence: int
    rest: bytes


class Arrival(NamedTuple):
    """A datagram's bytes, and when (ns, the kernel's wall clock: only differences within a train count) from whom."""

    data: bytes
    time_ns: int
    sender: Any


def pack_datagram(cookie: bytes, train: int, sequence: int, size_bytes: int = 0, rest: bytes = b"") -> bytes:
    """Return a datagram of ``size_bytes``, or as long as it must be."""
    return (HEADER.pack(cookie, train, sequence) + rest).ljust(size_bytes, b"\0")


def unpack_datagram(data: bytes) -> Datagram | None:
    """Return what a datagram says; None where it is not one of ours."""
    if len(data) < HEADER.size:
        return None
    cookie, train, sequence = HEADER.unpack_from(data)
    return Datagram(cookie, train, sequence, data[HEADER.size :])


class Datagrams:
    """A UDP socket that tells when its datagrams arrived; one thread receives, any may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        except OSError:  # not Linux: the time is then that of reading
            log.debug("the kernel does not tell when datagrams arrive")

    @classmethod
    def bound(cls, address: Any, family: socket.AddressFamily) -> Datagrams | None:
        """Return a socket at an address of this machine; None where another process has it."""
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
        """Return a socket that talks to one address only.

        Raises: ConnectError: there is no way to it.
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
        """Close the socket, and wake the thread that waits in it; twice is fine."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # close alone does not wake a waiting thread on Linux
        except OSError:
            log.debug("UDP socket was not connected")
        self._sock.close()

    def receive(self, wait_s: float) -> Arrival | None:
        """Return the next datagram; None when none came in time, or the peer's machine refused one of ours.

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
        """Send a datagram; False where the system did not take it. Whether it arrives, nobody tells."""
        try:
            self._sock.sendto(data, receiver) if receiver else self._sock.send(data)
        except OSError as exc:  # no way there, refused, too large, or no room
            log.debug("a datagram was not sent: %s", exc)
            return False
        return True

    def send_train(self, cookie: bytes, train: int, packets: int, size_bytes: int, receiver: Any = None) -> float:
        """Send a train as fast as the system takes it; return how long that took, s.

        The kernel cuts a few large pieces into datagrams: this process has no time to pause between them.
        """
        datagrams = [pack_datagram(cookie, train, sequence, size_bytes) for sequence in range(packets)]
        at_once = MAX_PIECE_BYTES // len(datagrams[0])
        pieces = [b"".join(datagrams[start : start + at_once]) for start in range(0, packets, at_once)]
        start_s = time.perf_counter()
        if not all(self._send_piece(piece, len(datagrams[0]), receiver) for piece in pieces):
            for datagram in datagrams:  # copies do not count
                self.send(datagram, receiver)
        return time.perf_counter() - start_s

    def _send_piece(self, piece: bytes, size_bytes: int, receiver: Any) -> bool:
        cut = [(SOL_UDP, UDP_SEGMENT, struct.pack("@H", size_bytes))]
        try:
            self._sock.sendmsg([piece], cut, 0, *([receiver] if receiver else []))
        except OSError as exc:  # an older kernel, or a device that cannot
            log.debug("the kernel cuts no datagrams: %s", exc)
            return False
        return True
