"""Limits of the memory that the bodies of messages take."""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache
from typing import Any

from neurosurgeon.net.frames import ALIGNMENT
from neurosurgeon.utils.errors import BusyError, ProtocolError
from neurosurgeon.utils.units import readable_bytes

RETRY_MS = 100.0  # to the retry of a request for which there is no memory


@cache
def _body_type() -> Any:
    """Return the class of a body. It imports numpy, without which the bandwidth service starts."""
    import numpy as np

    class Body(np.ndarray[Any, np.dtype[np.uint8]]):
        """Bytes that count against a limit until they are freed."""

        reserved: tuple[MemoryLimit, object, int]

        def __del__(self) -> None:
            limit, connection, length = self.reserved
            limit._release(connection, length)

    return Body


class MemoryLimit:
    """Bounds the memory of message bodies, of each connection and of all together. Any thread may call it.

    A body counts until its memory is freed, with the last of its tensors.
    """

    def __init__(self, total_bytes: float, connection_bytes: float) -> None:
        self._total_bytes, self._connection_bytes = total_bytes, connection_bytes
        self._used_bytes = 0
        self._used_by: dict[object, int] = {}  # bytes of each connection
        self._lock = threading.RLock()  # reentrant: the garbage collector may free a body while another is reserved

    def allocate(self, connection: object, length: int) -> memoryview:
        """Return ``length`` writable bytes that start on a cache line.

        Raises: BusyError: other bodies, of the connection or of all, hold the memory. ProtocolError: it never fits.
        """
        self._reserve(connection, length)
        try:
            body = _body_type()(length + ALIGNMENT, "uint8")  # not zeroed: all of it will be received
        except MemoryError:
            self._release(connection, length)
            raise
        body.reserved = self, connection, length
        start = -ctypes.addressof(ctypes.c_char.from_buffer(body.data)) % ALIGNMENT
        view: memoryview = body.data[start : start + length]
        return view

    def _reserve(self, connection: object, length: int) -> None:
        if length > min(self._total_bytes, self._connection_bytes):
            most = readable_bytes(int(min(self._total_bytes, self._connection_bytes)))
            raise ProtocolError(f"body of {readable_bytes(length)}: expected at most {most} for a connection")
        with self._lock:
            used_bytes = self._used_by.get(connection, 0) + length
            if used_bytes > self._connection_bytes:
                raise BusyError(f"no memory for {readable_bytes(length)}: this connection is at its limit", RETRY_MS)
            if self._used_bytes + length > self._total_bytes:
                raise BusyError(f"no memory for {readable_bytes(length)}: all connections are at their limit", RETRY_MS)
            self._used_bytes += length
            self._used_by[connection] = used_bytes

    def _release(self, connection: object, length: int) -> None:
        with self._lock:
            self._used_bytes -= length
            if left_bytes := self._used_by.pop(connection, 0) - length:
                self._used_by[connection] = left_bytes


UNLIMITED = MemoryLimit(math.inf, math.inf)  # an edge requests the replies that it receives
