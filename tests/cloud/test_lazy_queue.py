"""The lazy queue: nothing is lost, its order holds, and its reader wakes up for what is urgent alone."""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue

import pytest

from neurosurgeon.cloud import lazy_queue
from neurosurgeon.cloud.lazy_queue import LazyQueue

WAIT_S = 20.0


def test_items_come_in_order_urgent_or_not() -> None:
    queue: LazyQueue[int] = LazyQueue()
    for number in range(5):
        queue.put(number, is_urgent=number % 2 == 0)
    assert [queue.get(WAIT_S) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(Empty):
        queue.get(0.0)


class Reader:
    """Gets from a queue in a thread of its own, until it gets None."""

    def __init__(self, queue: LazyQueue[int | None]) -> None:
        self.got: SimpleQueue[int] = SimpleQueue()
        self._queue = queue
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while (item := self._queue.get(WAIT_S)) is not None:
            self.got.put(item)

    def end(self) -> None:
        self._queue.put(None)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def test_what_is_not_urgent_is_found_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_queue, "LOOK_S", WAIT_S)  # no look of its own
    queue: LazyQueue[int | None] = LazyQueue()
    reader = Reader(queue)
    queue.put(1)
    assert reader.got.get(timeout=WAIT_S) == 1
    queue.put(2, is_urgent=False)
    with pytest.raises(Empty):
        reader.got.get(timeout=0.05)
    queue.put(3)
    assert [reader.got.get(timeout=WAIT_S) for _ in range(2)] == [2, 3]
    reader.end()


def test_a_lively_reader_looks_by_itself() -> None:
    queue: LazyQueue[int | None] = LazyQueue()
    reader = Reader(queue)
    for number in range(20):
        queue.put(number, is_urgent=number == 0)
    assert [reader.got.get(timeout=WAIT_S) for _ in range(20)] == list(range(20))
    reader.end()


def test_whatever_comes_wakes_a_reader_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_queue, "LIVELY_S", 0.0)
    queue: LazyQueue[int | None] = LazyQueue()
    reader = Reader(queue)
    for number in range(20):
        time.sleep(0.002)  # it may sleep by now, or be about to
        queue.put(number, is_urgent=False)
        assert reader.got.get(timeout=WAIT_S / 2) == number  # long before its wait is over
    reader.end()


def test_the_rest_can_be_taken_by_others() -> None:
    queue: LazyQueue[int] = LazyQueue()
    for number in range(3):
        queue.put(number, is_urgent=False)
    assert list(queue.rest()) == [0, 1, 2]
    assert list(queue.rest()) == []
