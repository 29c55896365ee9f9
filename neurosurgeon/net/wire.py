"""What carries bytes between two machines: a socket as it is, one under TLS, or one whose bytes are sealed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from neurosurgeon.net.frames import HEAD_UNIT, Buffer, check_magic
from neurosurgeon.utils.errors import PeerGoneError

HEAD_TIMEOUT_S = 5.0  # first byte to last byte of a head, at most 64 KiB


class Wire(Protocol):
    """Bytes in order, with absolute deadlines (s, monotonic). One thread may send while another reads."""

    @property
    def peer(self) -> str:
        """The peer's address."""

    def read_some(self, view: memoryview, deadline_s: float, fill: bool = False) -> int:
        """Read at least a byte into ``view``; 0: the peer has closed. ``fill``: the caller wants all of it.

        Raises: DeadlineError, PeerGoneError, ProtocolError.
        """

    def has_bytes(self, wait_s: float) -> bool:
        """Return whether there is something to read, be it the end, waiting at most ``wait_s`` for it.

        It may be less than what is to be read. For the thread that reads.
        """

    def send(self, pieces: Sequence[Buffer], deadline_s: float) -> None:
        """Send all pieces, one behind the other.

        Raises: DeadlineError, PeerGoneError.
        """


def read_all(wire: Wire, view: memoryview, deadline_s: float) -> None:
    """Fill ``view``.

    Raises: as `Wire.read_some`; PeerGoneError: the peer closed before.
    """
    while view:
        count = wire.read_some(view, deadline_s, True)
        if not count:
            raise PeerGoneError(f"{wire.peer} closed the connection inside a message")
        view = view[count:]


def read_head_unit(wire: Wire, view: memoryview, deadline_s: float) -> float:
    """Fill ``view`` with the first bytes of a frame; return when the first of them came (s, monotonic).

    Args:   deadline_s: for the first byte.
    Raises: as `read_all`; ProtocolError: a stranger, told by its first bytes, however few.
    """
    count = wire.read_some(view, deadline_s)
    if not count:
        raise PeerGoneError(f"{wire.peer} closed the connection")
    start_s = time.monotonic()
    if count < HEAD_UNIT:
        check_magic(view[:count])
        read_all(wire, view[count:], start_s + HEAD_TIMEOUT_S)
    return start_s
