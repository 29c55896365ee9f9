"""Memory for the bodies of messages: each message has its own until it is handed back, and pages are made only once."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading

from neurosurgeon.net.framing import ALIGNMENT
from neurosurgeon.utils.errors import BusyError, ProtocolError
from neurosurgeon.utils.units import readable_bytes

KEPT = 4  # bodies at rest that are kept; one message at a time needs one, a pipelined stream two or three
MAX_SLACK = 4  # a body sits in memory at most this many times its size, so a peer cannot pin large memory with small
SMALL_BYTES = 1_048_576  # below this, slack is no matter
MIN_BYTES = 4096
HEAP_BYTES = 65_536  # answers of this size and less may be kept by the thousand, mappings may not
HUGE_PAGE_BYTES = 2_097_152  # of x86-64 and of ARM with pages of 4 KB
MADV_POPULATE_WRITE = 23  # linux/mman.h; the mmap module has no name for it
RETRY_MS = 100.0  # when to ask again for memory that others have


class MemoryLimit:
    """How much the bodies of all connections together, and of each one, may take; any thread may ask."""

    def __init__(self, total_bytes: float, connection_bytes: float) -> None:
        self._total_bytes, self.connection_bytes = total_bytes, connection_bytes
        self.body_bytes = min(total_bytes, connection_bytes)
        self._used_bytes = 0
        self._lock = threading.Lock()

    def reserve(self, length: int, used_bytes: int) -> None:
        """Set ``length`` bytes aside for a connection that uses ``used_bytes`` already.

        Raises: BusyError: it would have, or all would have, more than they may. ProtocolError: it may never.
        """
        if length > self.body_bytes:
            raise ProtocolError(f"{readable_bytes(length)} are more than a connection may have here")
        with self._lock:
            if used_bytes + length > self.connection_bytes:
                raise BusyError(f"{readable_bytes(length)} are more than this connection may still have", RETRY_MS)
            if self._used_bytes + length > self._total_bytes:
                raise BusyError(f"{readable_bytes(length)} are more than all connections may still have", RETRY_MS)
            self._used_bytes += length

    def release(self, length: int) -> None:
        """Take back what was set aside."""
        with self._lock:
            self._used_bytes -= length


UNLIMITED = MemoryLimit(math.inf, math.inf)  # an edge asks for what it gets


class BodyMemory:
    """A bounded free list; any thread may take and any may give back."""

    def __init__(self, limit: MemoryLimit = UNLIMITED) -> None:
        self._limit = limit
        self._used_bytes = 0  # by bodies in use and at rest
        self._is_closed = False
        self._free: list[memoryview] = []  # the last one given back is last: its pages are the warmest
        self._lock = threading.Lock()

    def take(self, length: int, *, has_pages: bool = False) -> memoryview:
        """Return at least ``length`` writable bytes that start on a cache line.

        Args:   has_pages: make new memory's pages now, not when they are first written to.
        Raises: BusyError: there is no memory for them now. ProtocolError: there never is.
        """
        with self._lock:
            for index in reversed(range(len(self._free))):
                if length <= len(self._free[index]) <= max(MAX_SLACK * length, SMALL_BYTES):
                    return self._free.pop(index)
            size_bytes = _whole(length) if _whole(length) <= self._limit.body_bytes else length
            self._reserve(size_bytes)
        return _aligned(size_bytes) if size_bytes <= HEAP_BYTES else _mapped(size_bytes, has_pages=has_pages)

    def give_back(self, memory: memoryview) -> None:
        """Take memory back that nobody reads any more; the oldest goes where too much is kept."""
        with self._lock:
            if self._is_closed:
                return
            self._free.append(memory)
            if len(self._free) > KEPT:
                self._drop_oldest()

    def close(self) -> None:
        """Let go of everything; what is still read somewhere is freed when that ends."""
        with self._lock:
            self._is_closed = True
            self._free.clear()
            self._release(self._used_bytes)

    def rest(self) -> None:
        """Let go of what is at rest: others may need it."""
        with self._lock:
            while self._free:
                self._drop_oldest()

    def _reserve(self, size_bytes: int) -> None:
        while True:
            try:
                self._limit.reserve(size_bytes, self._used_bytes)
            except BusyError:
                if not self._free:
                    raise
                self._drop_oldest()
            else:
                self._used_bytes += size_bytes
                return

    def _drop_oldest(self) -> None:
        self._release(len(self._free.pop(0)))

    def _release(self, size_bytes: int) -> None:
        self._used_bytes -= size_bytes
        self._limit.release(size_bytes)


def _whole(length: int) -> int:
    """Return how much to take for ``length`` bytes: of more than half a huge page, whole ones."""
    return max(length, MIN_BYTES) if length <= HUGE_PAGE_BYTES / 2 else length + -length % HUGE_PAGE_BYTES


def _mapped(size_bytes: int, *, has_pages: bool) -> memoryview:
    """Return writable memory in pages of its own, in huge ones where it has room for them.

    A page is made when it is first written to, in about as long as it takes to receive its bytes; a huge one as well.
    """
    memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not this system, or not its kernel: pages as they come
        if size_bytes >= HUGE_PAGE_BYTES:
            memory.madvise(mmap.MADV_HUGEPAGE)
        if has_pages and size_bytes <= HUGE_PAGE_BYTES:  # the interpreter waits for it
            memory.madvise(MADV_POPULATE_WRITE)
    return memoryview(memory)


def _aligned(size_bytes: int) -> memoryview:
    """Return writable memory of the heap that starts on a cache line."""
    memory = bytearray(size_bytes + ALIGNMENT)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % ALIGNMENT
    return memoryview(memory)[start : start + size_bytes]
