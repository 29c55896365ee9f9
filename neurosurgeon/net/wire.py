"""The transport of bytes between two machines: a plain socket, one under TLS, or one whose bytes are sealed."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from neurosurgeon.net.frames import HEAD_UNIT, Buffer, check_magic
from neurosurgeon.net.net_utils import format_address
from neurosurgeon.utils.errors import DeadlineError, PeerGoneError

HEAD_TIMEOUT_S = 5.0  # first byte to last byte of a head, at most 64 KiB
TIMEVAL = struct.Struct("@ll")  # seconds, microseconds: for SO_RCVTIMEO
CHECK_S = 0.2  # interval at which a blocked call checks its deadline
MAX_PIECES = 64  # pieces for one sendmsg, far below the system's limit (IOV_MAX, 1024)


class Wire(Protocol):
    """Bytes in order, with absolute deadlines (s, monotonic). One thread may send while another reads."""

    @property
    def peer(self) -> str:
        """The peer's address."""

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read at least a byte into ``view``, and return their number; 0: the peer has closed. Blocks.

        Args:   fill: wait until ``view`` is full, or the read is interrupted.
        Raises: DeadlineError, PeerGoneError, ProtocolError.
        """

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Send all pieces in order. Blocks.

        Raises: DeadlineError, PeerGoneError.
        """


def read_all(wire: Wire, view: memoryview, deadline_s: float) -> None:
    """Fill ``view``. Blocks.

    Raises: as `Wire.read_some`; PeerGoneError: the peer closed the connection before.
    """
    while view:
        count = wire.read_some(view, deadline_s, True)
        if not count:
            raise PeerGoneError(f"{wire.peer} closed the connection inside a message")
        view = view[count:]


def read_head_unit(wire: Wire, view: memoryview, deadline_s: float) -> float:
    """Fill ``view`` with the first bytes of a frame; return the arrival of the first of them (s, monotonic). Blocks.

    Args:   deadline_s: for the first byte.
    Raises: as `read_all`; ProtocolError: another protocol, detected by its first bytes, however few.
    """
    count = wire.read_some(view, deadline_s)
    if not count:
        raise PeerGoneError(f"{wire.peer} closed the connection")
    start_s = time.monotonic()
    if count < HEAD_UNIT:
        check_magic(view[:count])
        read_all(wire, view[count:], start_s + HEAD_TIMEOUT_S)
    return start_s


class SocketWire:
    """A plain socket; see `Wire`.

    The system interrupts a call that waits every `CHECK_S`, and its deadline is checked: deadlines are that much late.
    A timeout that is set for each call would cost one system call more, and `settimeout`, which holds for the threads
    of both directions, two: 5 % and more of an exchange of 16 KB (``python -m tests.benchmark.transport``).
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent_bytes = self.received_bytes = 0
        self.latest_s = math.inf  # no deadline is later (s, monotonic): the timeout of the authentication
        self.silence_s = math.inf  # the longest pause between two reads, s
        try:
            self.peer = format_address(sock.getpeername())
            sock.setblocking(True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, TIMEVAL.pack(0, round(1e6 * CHECK_S)))
        except OSError as exc:
            sock.close()
            raise PeerGoneError(f"connection lost before its first byte: {exc.strerror or exc}") from exc

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read at least a byte; see `Wire`."""
        deadline_s = min(deadline_s, self.latest_s, time.monotonic() + self.silence_s)
        while time.monotonic() < deadline_s:
            try:
                count = self.sock.recv_into(view, 0, socket.MSG_WAITALL if fill else 0)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._lost(exc) from exc
            self.received_bytes += count
            return count
        raise DeadlineError(f"receive from {self.peer} timed out: no byte, or not all of a message")

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Send the pieces from their own memory; see `Wire`."""
        left_bytes = sum(map(len, pieces))
        while left_bytes:
            if time.monotonic() >= min(deadline_s, self.latest_s):
                raise DeadlineError(f"send to {self.peer} timed out: {left_bytes} bytes of a message were not read")
            try:
                count = self.sock.sendmsg(pieces[:MAX_PIECES])
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._lost(exc) from exc
            self.sent_bytes += count
            left_bytes -= count
            if left_bytes:
                pieces = _after(pieces, count)

    def _lost(self, exc: OSError) -> PeerGoneError:
        return PeerGoneError(f"connection to {self.peer} lost: {exc.strerror or exc}")


def _after(pieces: Sequence[Buffer], count: int) -> list[memoryview]:
    """Return the rest of the pieces after their first ``count`` bytes, fewer than all."""
    left = deque(memoryview(piece) for piece in pieces)
    while count >= len(left[0]):
        count -= len(left.popleft())
    left[0] = left[0][count:]
    return list(left)
