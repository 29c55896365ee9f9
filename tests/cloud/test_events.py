"""The lines of a conversation: each task's stay together and name its model and point, in whatever order tasks end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from neurosurgeon.cloud.events import CloudEvent, TaskLines, TaskState

NAMED = [CloudEvent.MODEL_TYPE, CloudEvent.PARTITION_POINT]
BEGUN = [CloudEvent.EDGE_OUTPUT]
ENDED = [CloudEvent.TRANSFER_LATENCY_SENT, CloudEvent.CLOUD_LATENCY_SENT, CloudEvent.FINISHED]
A, B = ("le_net", 1), ("le_net", 2)


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
    task = TaskState(*A)
    shown.lines.connected()
    shown.lines.prepared(*A)
    assert shown.events == [CloudEvent.CONNECTED, *NAMED]
    shown.lines.arrived(task)
    assert shown.events == [CloudEvent.CONNECTED, *NAMED, *BEGUN]
    shown.lines.finished(task)
    assert shown.events == [CloudEvent.CONNECTED, *NAMED, *BEGUN, *ENDED]


def test_a_task_that_was_not_announced_names_itself(shown: Shown) -> None:
    for what in (A, A, B, A):
        task = TaskState(*what)
        shown.lines.arrived(task)
        shown.lines.finished(task)
    whole = [*BEGUN, *ENDED]
    assert shown.events == [*NAMED, *whole, *whole, *NAMED, *whole, *NAMED, *whole]


def test_a_task_that_is_done_before_its_arrival_is_shown_is_shown_once(shown: Shown) -> None:
    task = TaskState(*A)
    shown.lines.finished(task)
    shown.lines.arrived(task)
    assert shown.events == [*NAMED, *BEGUN, *ENDED]


def test_tasks_that_overtake_wait_for_the_open_group(shown: Shown) -> None:
    first, second, third = TaskState(*A), TaskState(*B), TaskState(*A)
    for task in (first, second, third):
        shown.lines.arrived(task)
    shown.lines.finished(third)
    shown.lines.prepared(*B)
    assert shown.events == [*NAMED, *BEGUN]
    shown.lines.finished(first)
    assert shown.events == [*NAMED, *BEGUN, *ENDED, *BEGUN, *ENDED]
    shown.lines.finished(second)
    assert shown.events[-6:] == [*NAMED, *BEGUN, *ENDED]


def test_a_failed_task_leaves_room_for_the_others(shown: Shown) -> None:
    first, second = TaskState(*A), TaskState(*A)
    shown.lines.arrived(first)
    shown.lines.finished(second)
    shown.lines.failed(first)
    assert shown.events == [*NAMED, *BEGUN, *BEGUN, *ENDED]


def test_an_output_that_is_closed_is_no_matter() -> None:
    def closed(event: CloudEvent, sock: socket.socket) -> None:
        raise ValueError("I/O operation on closed file")

    with socket.socket() as sock:
        TaskLines(closed, sock).connected()
