"""Memory for the bodies of messages: each message has its own until it is handed back, and pages are made only once."""

from __future__ import annotations

import mmap
import threading

KEPT = 4  # bodies at rest that are kept; one message at a time needs one, a pipelined stream two or three
MAX_SLACK = 4  # a body sits in memory at most this many times its size, so a peer cannot pin large memory with small
SMALL_BYTES = 1_048_576  # below this, slack is no matter


class BodyMemory:
    """A bounded free list; any thread may take and any may give back."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []  # the last one given back is last: its pages are the warmest
        self._lock = threading.Lock()

    def take(self, length: int) -> memoryview:
        """Return at least ``length`` writable bytes that start on a page."""
        with self._lock:
            for index in reversed(range(len(self._free))):
                if length <= len(self._free[index]) <= max(MAX_SLACK * length, SMALL_BYTES):
                    return self._free.pop(index)
        return memoryview(mmap.mmap(-1, max(length, mmap.PAGESIZE)))

    def give_back(self, memory: memoryview) -> None:
        """Take memory back that nobody reads any more; the oldest goes where too much is kept."""
        with self._lock:
            self._free.append(memory)
            if len(self._free) > KEPT:
                self._free.pop(0)
