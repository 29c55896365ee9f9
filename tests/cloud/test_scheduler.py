"""The fair queue: turns between clients, each one's order, and its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.cloud.scheduler import FairQueue, QueueFullError

Item = tuple[str, int]  # client, number


def filled(*items: Item, max_items: int = 100, max_per_client: int = 100) -> FairQueue[Item]:
    """Return a queue in which these wait."""
    queue: FairQueue[Item] = FairQueue(max_items, max_per_client)
    for item in items:
        queue.put(item[0], item)
    return queue


def drained(queue: FairQueue[Item]) -> list[Item]:
    """Return all that waits, in order."""
    taken = []
    while item := queue.take():
        taken.append(item)
    return taken


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    queue = filled(("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("c", 6))
    assert drained(queue) == [("a", 1), ("b", 4), ("c", 5), ("a", 2), ("c", 6), ("a", 3)]
    assert queue.take() is None


def test_a_newcomer_waits_one_round_at_most() -> None:
    queue = filled(("a", 1), ("a", 2), ("b", 3), ("b", 4))
    assert queue.take() == ("a", 1)
    queue.put("c", ("c", 5))
    assert drained(queue) == [("b", 3), ("a", 2), ("c", 5), ("b", 4)]


def test_no_client_takes_all_the_places() -> None:
    queue = filled(("a", 1), ("a", 2), max_per_client=2)
    with pytest.raises(QueueFullError, match="2 tasks of this edge"):
        queue.put("a", ("a", 3))
    queue.put("b", ("b", 4))
    queue.take()
    queue.put("a", ("a", 5))
    assert len(queue) == 3


def test_there_is_an_end_to_the_places() -> None:
    queue = filled(("a", 1), ("b", 2), max_items=2)
    with pytest.raises(QueueFullError, match="2 tasks wait"):
        queue.put("c", ("c", 3))
    assert len(queue) == 2


def test_an_item_without_limits_is_not_refused() -> None:
    queue = filled(("a", 1), max_items=1, max_per_client=1)
    queue.put("a", ("a", 2), is_limited=False)
    queue.put("b", ("b", 3), is_limited=False)
    with pytest.raises(QueueFullError):
        queue.put("c", ("c", 4))
    assert drained(queue) == [("a", 1), ("b", 3), ("a", 2)]


def test_alike_items_are_taken_from_the_head_of_every_line() -> None:
    queue = filled(("a", 1), ("a", 1), ("a", 2), ("a", 1), ("b", 2), ("c", 1))
    assert queue.take_alike(lambda item: item[1] == 1, 10) == [("a", 1), ("c", 1), ("a", 1)]
    assert drained(queue) == [("b", 2), ("a", 2), ("a", 1)]


def test_no_more_are_taken_than_asked_for() -> None:
    queue = filled(("a", 1), ("a", 1), ("b", 1))
    assert queue.take_alike(lambda item: True, 0) == []
    assert queue.take_alike(lambda item: True, 2) == [("a", 1), ("b", 1)]
    assert len(queue) == 1


def test_a_client_that_leaves_is_forgotten() -> None:
    queue = filled(("a", 1), ("b", 2), ("a", 3))
    assert queue.drop("a") == [("a", 1), ("a", 3)]
    assert queue.drop("a") == []
    assert drained(queue) == [("b", 2)]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=30))
def test_nothing_is_lost_and_shares_differ_by_one_at_most(items: list[Item]) -> None:
    taken = drained(filled(*items))
    for client in "abcd":
        assert [item for item in taken if item[0] == client] == [item for item in items if item[0] == client]
    waiting = {client: sum(item[0] == client for item in items) for client in "abcd"}
    served = dict.fromkeys("abcd", 0)
    for client, _ in taken:
        served[client] += 1
        unserved = [served[other] for other in "abcd" if served[other] < waiting[other]]
        assert all(served[client] <= count + 1 for count in unserved)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), max_size=20),
    st.integers(0, 1),
    st.integers(0, 6),
)
def test_taking_alike_ones_leaves_the_rest_as_it_was(items: list[Item], wanted: int, limit: int) -> None:
    queue = filled(*items)
    taken = queue.take_alike(lambda item: item[1] == wanted, limit)
    assert len(taken) <= limit
    assert all(item[1] == wanted for item in taken)
    rest = drained(queue)
    for client in "abc":
        of_client = [item for item in items if item[0] == client]
        assert [item for item in [*taken, *rest] if item[0] == client] == of_client
