"""The lines of a conversation: each task's stay together and name its model and point, in whatever order tasks end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from neurosurgeon.cloud.events import CloudEvent, TaskLines
from neurosurgeon.net.messages import Request

NAMED = [CloudEvent.MODEL_TYPE, CloudEvent.PARTITION_POINT]
BEGUN = [CloudEvent.EDGE_OUTPUT]
ENDED = [CloudEvent.TRANSFER_LATENCY_SENT, CloudEvent.CLOUD_LATENCY_SENT, CloudEvent.FINISHED]
A, B = (Request("le_net", mask, "graph", "weights") for mask in (b"\1", b"\3"))


class Shown:
    """Lines, and what was shown."""

    def __init__(self, sock: socket.socket) -> None:
        self.events: list[CloudEvent] = []
        self.lines = TaskLines(lambda event, sock: self.events.append(event), sock)


@pytest.fixture
def shown() -> Iterator[Shown]:
    with socket.socket() as sock:
        yield Shown(sock)


def test_a_single_task_is_shown_as_it_goes(shown: Shown) -> None:
    shown.lines.connected()
    shown.lines.prepared(A.preparation)
    assert shown.events == [CloudEvent.CONNECTED, *NAMED]
    shown.lines.arrived(1, A)
    assert shown.events == [CloudEvent.CONNECTED, *NAMED, *BEGUN]
    shown.lines.ended(1, A, is_answered=True)
    assert shown.events == [CloudEvent.CONNECTED, *NAMED, *BEGUN, *ENDED]


def test_a_task_that_was_not_announced_names_itself(shown: Shown) -> None:
    for number, request in enumerate((A, A, B, A)):
        shown.lines.arrived(number, request)
        shown.lines.ended(number, request, is_answered=True)
    whole = [*BEGUN, *ENDED]
    assert shown.events == [*NAMED, *whole, *whole, *NAMED, *whole, *NAMED, *whole]


def test_a_task_sent_again_with_its_number_is_shown_twice(shown: Shown) -> None:
    for _ in range(2):
        shown.lines.arrived(1, A)
    for _ in range(2):
        shown.lines.ended(1, A, is_answered=True)
    assert shown.events == [*NAMED, *BEGUN, *ENDED, *BEGUN, *ENDED]


def test_a_task_that_is_refused_on_arrival_is_not_shown(shown: Shown) -> None:
    shown.lines.ended(1, A, is_answered=False)
    assert shown.events == []


def test_tasks_that_overtake_wait_for_the_open_group(shown: Shown) -> None:
    for number, request in enumerate((A, B, A)):
        shown.lines.arrived(number, request)
    shown.lines.ended(2, A, is_answered=True)
    shown.lines.prepared(B.preparation)
    assert shown.events == [*NAMED, *BEGUN]
    shown.lines.ended(0, A, is_answered=True)
    assert shown.events == [*NAMED, *BEGUN, *ENDED, *BEGUN, *ENDED]
    shown.lines.ended(1, B, is_answered=True)
    assert shown.events[-6:] == [*NAMED, *BEGUN, *ENDED]


def test_a_failed_task_leaves_room_for_the_others(shown: Shown) -> None:
    for number in (1, 2):
        shown.lines.arrived(number, A)
    shown.lines.ended(2, A, is_answered=True)
    shown.lines.ended(1, A, is_answered=False)
    assert shown.events == [*NAMED, *BEGUN, *BEGUN, *ENDED]


def test_an_output_that_is_closed_is_no_matter() -> None:
    def closed(event: CloudEvent, sock: socket.socket) -> None:
        raise ValueError("I/O operation on closed file")

    with socket.socket() as sock:
        TaskLines(closed, sock).connected()
