"""A bounded fair queue: round robin over its clients, and first in, first out for each of them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFullError(Exception):
    """The queue is full, or the share of this client."""


class FairQueue(Generic[Item]):
    """Items of several clients, taken in turns. It has no lock: the caller serialises all calls.

    Args: max_items: how many may wait in all.
          max_per_client: how many of one client may wait, so that no client fills the queue alone.
    """

    def __init__(self, max_items: int, max_per_client: int) -> None:
        self._max_items = max_items
        self._max_per_client = max_per_client
        self._lines: OrderedDict[Hashable, deque[Item]] = OrderedDict()  # the first client's turn is next
        self._count = 0
        self.is_closed = False  # set by the owner, which then puts no more items

    def __len__(self) -> int:
        return self._count

    def put(self, client: Hashable, item: Item, *, is_limited: bool = True) -> None:
        """Add an item after the client's others.

        Args:   is_limited: whether it is refused at a limit.
        Raises: QueueFullError.
        """
        if is_limited and self._count >= self._max_items:
            raise QueueFullError(f"{self._count} tasks wait, the limit of all edges")
        waiting = len(self._lines.get(client, ()))
        if is_limited and waiting >= self._max_per_client:
            raise QueueFullError(f"{waiting} tasks of this edge wait, the limit of one edge")
        self._lines.setdefault(client, deque()).append(item)
        self._count += 1

    def take(self) -> Item | None:
        """Return the first item of the client whose turn it is, and end its turn; None if no item waits."""
        return self._take_of(next(iter(self._lines))) if self._lines else None

    def take_alike(self, is_alike: Callable[[Item], bool], limit: int) -> list[Item]:
        """Return up to ``limit`` items that are alike and each next in its client's line; the clients take turns."""
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
        """Remove a client; return its waiting items."""
        dropped = list(self._lines.pop(client, ()))
        self._count -= len(dropped)
        return dropped

    def _take_of(self, client: Hashable) -> Item:
        line = self._lines.pop(client)
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines[client] = line  # its next turn is after those of all others
        return item
