"""A queue whose reader is woken up for what is urgent alone, and finds the rest when it looks."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")

LOOK_S = 0.03  # between two looks, while items come; those that are found together share the cost of waking up
MANY = 32  # items; whatever comes beyond wakes the reader
LIVELY_S = 1.0  # behind the last item; then the reader sleeps, and whatever comes next wakes it


class LazyQueue(Generic[Item]):
    """First in, first out, for one thread that gets; any may put.

    A thread that wakes up takes a core and the interpreter from those that have made work for it, right when they have
    more to do: from task to task a few of them are all that there is beside computing.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._sleeps = False
        self._last_s = -math.inf  # when there was an item

    def put(self, item: Item, *, is_urgent: bool = True) -> None:
        """Add an item; one that is not urgent may be found some milliseconds later."""
        self._items.append(item)
        if is_urgent or self._sleeps or len(self._items) > MANY:
            self._wake.put(None)

    def get(self, wait_s: float) -> Item:
        """Return the next item, waiting at most ``wait_s`` for it.

        Raises: Empty: none came.
        """
        until_s = time.monotonic() + wait_s
        while True:
            with suppress(IndexError):  # another thread may have taken the rest
                item = self._items.popleft()
                self._last_s = time.monotonic()
                return item
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise Empty
            self._wait(left_s)

    def rest(self) -> Iterator[Item]:
        """Yield what there is, from any thread, once nobody gets any more."""
        with suppress(IndexError):
            while True:
                yield self._items.popleft()

    def _wait(self, left_s: float) -> None:
        self._sleeps = time.monotonic() - self._last_s > LIVELY_S
        if not self._items:  # one that was put before saw nobody asleep
            with suppress(Empty):
                self._wake.get(timeout=left_s if self._sleeps else min(left_s, LOOK_S))
        self._sleeps = False
