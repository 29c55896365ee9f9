"""Memory of messages: reused where it fits, bounded in number, never far larger than what it holds."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from neurosurgeon.net.framing import ALIGNMENT
from neurosurgeon.net.memory import HEAP_BYTES, HUGE_PAGE_BYTES, KEPT, MAX_SLACK, SMALL_BYTES, BodyMemory, MemoryLimit
from neurosurgeon.utils.errors import BusyError, ProtocolError


def test_what_is_given_back_is_taken_again() -> None:
    bodies = BodyMemory()
    first = bodies.take(100_000)
    bodies.give_back(first)
    assert bodies.take(5) is first
    assert bodies.take(5) is not first


def test_what_is_too_small_is_left() -> None:
    bodies = BodyMemory()
    bodies.give_back(bodies.take(100))
    assert len(bodies.take(100_000)) >= 100_000


def test_a_small_body_does_not_hold_large_memory() -> None:
    bodies = BodyMemory()
    large = bodies.take((MAX_SLACK + 1) * SMALL_BYTES)
    bodies.give_back(large)
    assert bodies.take(SMALL_BYTES) is not large
    assert bodies.take(len(large)) is large


def test_the_warmest_is_taken_first_and_the_oldest_goes() -> None:
    bodies = BodyMemory()
    taken = [bodies.take(100) for _ in range(KEPT + 1)]
    for memory in taken:
        bodies.give_back(memory)
    again = [bodies.take(100) for _ in range(KEPT + 1)]
    assert [any(memory is other for other in taken) for memory in again] == [True] * KEPT + [False]
    assert again[0] is taken[-1]
    assert not any(memory is taken[0] for memory in again)


@pytest.mark.parametrize("length", [1, 4096, HEAP_BYTES + 1, HUGE_PAGE_BYTES - 1, HUGE_PAGE_BYTES + 1])
@pytest.mark.parametrize("has_pages", [False, True])
def test_memory_starts_on_a_cache_line_and_can_be_written(length: int, *, has_pages: bool) -> None:
    memory = BodyMemory().take(length, has_pages=has_pages)
    memory[0] = memory[length - 1] = 1
    assert memory[0] == memory[length - 1] == 1
    assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % ALIGNMENT == 0


def test_large_memory_is_whole_huge_pages_where_so_much_is_allowed() -> None:
    assert len(BodyMemory().take(HUGE_PAGE_BYTES + 1)) == 2 * HUGE_PAGE_BYTES
    assert len(BodyMemory(MemoryLimit(3_000_000, 3_000_000)).take(HUGE_PAGE_BYTES + 1)) == HUGE_PAGE_BYTES + 1


def test_a_system_without_advice_gives_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = BodyMemory().take(HUGE_PAGE_BYTES, has_pages=True)
    memory[0] = 1
    assert memory[0] == 1


# ---------------------------------------------------------------- limits


def test_a_connection_and_all_together_may_have_so_much() -> None:
    limit = MemoryLimit(300_000, 200_000)
    first, second = BodyMemory(limit), BodyMemory(limit)
    taken = first.take(150_000)
    with pytest.raises(BusyError, match="this connection"):
        first.take(100_000)
    with pytest.raises(BusyError, match="all connections"):
        second.take(160_000)
    second.take(100_000)
    first.give_back(taken)
    assert first.take(150_000) is taken


def test_what_never_fits_is_not_to_be_asked_for_again() -> None:
    with pytest.raises(ProtocolError, match="may have here"):
        BodyMemory(MemoryLimit(300_000, 200_000)).take(200_001)


def test_memory_at_rest_is_left_to_others() -> None:
    limit = MemoryLimit(300_000, 200_000)
    first, second = BodyMemory(limit), BodyMemory(limit)
    first.give_back(first.take(150_000))
    with pytest.raises(BusyError):
        second.take(160_000)
    first.rest()
    assert second.take(160_000)


def test_memory_of_its_own_at_rest_makes_room_where_all_together_have_much() -> None:
    limit = MemoryLimit(300_000, 250_000)
    first, second = BodyMemory(limit), BodyMemory(limit)
    first.take(100_000)
    second.give_back(second.take(100_000))
    assert second.take(160_000)


def test_memory_at_rest_makes_room_for_a_larger_body() -> None:
    bodies = BodyMemory(MemoryLimit(300_000, 200_000))
    bodies.give_back(bodies.take(150_000))
    assert len(bodies.take(190_000)) >= 190_000


def test_a_closed_connection_leaves_its_memory_to_others() -> None:
    limit = MemoryLimit(200_000, 200_000)
    for _ in range(3):
        bodies = BodyMemory(limit)
        memory = bodies.take(150_000)
        bodies.close()
        bodies.give_back(memory)  # its answer was sent too late
    assert BodyMemory(limit).take(200_000)
