"""A bounded queue that is fair between clients: round robin over them, each one's own items in order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFullError(Exception):
    """No place for one more item: of anybody, or of this client."""


class FairQueue(Generic[Item]):
    """Not safe for threads by itself: whoever uses it holds a lock.

    Args: max_items: how many may wait in all.
          max_per_client: how many of one client may wait, so that nobody takes all the places.
    """

    def __init__(self, max_items: int, max_per_client: int) -> None:
        self._max_items = max_items
        self._max_per_client = max_per_client
        self._lines: OrderedDict[Hashable, deque[Item]] = OrderedDict()  # the first client's turn is next
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: Hashable, item: Item, *, is_limited: bool = True) -> None:
        """Let an item wait behind the client's others.

        Args:   is_limited: whether it may be refused.
        Raises: QueueFullError.
        """
        if is_limited and self._count >= self._max_items:
            raise QueueFullError(f"{self._count} tasks wait, which is all that may")
        line = self._lines.get(client)
        if line is None:
            line = self._lines[client] = deque()
        elif is_limited and len(line) >= self._max_per_client:
            raise QueueFullError(f"{len(line)} tasks of this edge wait, which is all that may")
        line.append(item)
        self._count += 1

    def take(self) -> Item | None:
        """Return the first item of the client whose turn it is, and end its turn; None where nothing waits."""
        return self._take_of(next(iter(self._lines))) if self._lines else None

    def take_alike(self, is_alike: Callable[[Item], bool], limit: int) -> list[Item]:
        """Return up to ``limit`` items that are next in their client's line and alike, in turn of the clients."""
        taken: list[Item] = []
        found = True
        while found:
            found = False
            for client in list(self._lines):
                if len(taken) == limit:
                    return taken
                if is_alike(self._lines[client][0]):
                    taken.append(self._take_of(client))
                    found = True
        return taken

    def drop(self, client: Hashable) -> list[Item]:
        """Forget a client; return what of it waited."""
        dropped = list(self._lines.pop(client, ()))
        self._count -= len(dropped)
        return dropped

    def _take_of(self, client: Hashable) -> Item:
        line = self._lines.pop(client)
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines[client] = line  # behind all others
        return item
