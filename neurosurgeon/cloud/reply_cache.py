"""Replies kept for edges that retry: a task whose reply was lost in transit is not computed twice."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import NamedTuple

from neurosurgeon.cloud.executor import CloudResult
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import s_to_ms

KEPT_S = 60.0
MAX_REPLY_BYTES = 65_536  # a larger reply that was lost is computed again
MAX_KEPT_BYTES = 64 * 1024 * 1024  # 16,000 replies of a thousand classes; then the oldest are dropped
MAX_KEPT = 16_384  # replies of any size

Compute = Callable[[], Future[CloudResult]]


class _Entry(NamedTuple):
    """A task that is being computed, or its reply."""

    request: object
    future: Future[CloudResult]
    size_bytes: int = 0
    done_ms: float = 0.0


class ReplyCache:
    """Replies by task, for a minute and within bounded memory. Any thread may call it; no call blocks.

    A task that failed or was cancelled is not kept: the next request computes it again.
    """

    def __init__(self, kept_s: float = KEPT_S, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._kept_ms, self._max_bytes = s_to_ms(kept_s), max_bytes
        self._lock = threading.Lock()  # guards all below
        self._computing: dict[bytes, _Entry] = {}
        self._kept: OrderedDict[bytes, _Entry] = OrderedDict()  # the oldest is first
        self._size_bytes = 0  # of the kept replies

    def get_or_compute(self, key: bytes, request: object, compute: Compute) -> Future[CloudResult]:
        """Return the future reply of a task: the kept one, the one that is being computed, or a new one.

        Args:   key: the task's id, the same on all connections. request: its message; the same id with another
                message is another task. compute: starts the computation. It must not block.
        Raises: any error of ``compute``.
        """
        with self._lock:
            self._expire()
            known = self._kept.get(key) or self._computing.get(key)
            if known is not None and known.request == request and not known.future.cancelled():
                return known.future
            entry = self._computing[key] = _Entry(request, compute())
        entry.future.add_done_callback(lambda future: self._keep(key, future))  # no cycle: its callbacks hold memory
        return entry.future

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop the replies of these tasks, whose requests may have been damaged."""
        with self._lock:
            for key in keys:
                self._computing.pop(key, None)
                self._drop(key)

    def _keep(self, key: bytes, future: Future[CloudResult]) -> None:
        """Keep a copy of a small reply, which shares no larger memory. A done callback of the task's future."""
        with self._lock:
            entry = self._computing.get(key)
            if entry is None or entry.future is not future:  # forgotten, or another request has its place
                return
            del self._computing[key]
            if future.cancelled() or future.exception() or future.result().size_bytes > MAX_REPLY_BYTES:
                return
            kept: Future[CloudResult] = Future()
            kept.set_result(future.result().copy())
            self._drop(key)
            self._kept[key] = _Entry(entry.request, kept, kept.result().size_bytes, now_ms())
            self._size_bytes += kept.result().size_bytes
            self._expire()

    def _expire(self) -> None:
        oldest_ms = now_ms() - self._kept_ms
        while self._kept:
            key, entry = next(iter(self._kept.items()))
            if entry.done_ms >= oldest_ms and self._size_bytes <= self._max_bytes and len(self._kept) <= MAX_KEPT:
                return
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        if entry := self._kept.pop(key, None):
            self._size_bytes -= entry.size_bytes
