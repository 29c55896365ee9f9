"""Memory of messages: reused where it fits, bounded in number, never far larger than what it holds."""

from __future__ import annotations

from net.memory import KEPT, MAX_SLACK, SMALL_BYTES, BodyMemory


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


def test_memory_starts_on_a_page_and_can_be_written() -> None:
    memory = BodyMemory().take(1)
    memory[0] = 1
    assert memory[0] == 1
