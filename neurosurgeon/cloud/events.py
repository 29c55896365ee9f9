"""What happens in the cloud's conversations, for scripts to turn into lines: each task's events stay together."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

log = logging.getLogger(__name__)


class CloudEvent(Enum):
    """What happened in a conversation; scripts turn these into lines."""

    CONNECTED = auto()
    MODEL_TYPE = auto()
    PARTITION_POINT = auto()
    EDGE_OUTPUT = auto()
    TRANSFER_LATENCY_SENT = auto()
    CLOUD_LATENCY_SENT = auto()
    FINISHED = auto()


Observer = Callable[[CloudEvent, socket.socket], None]


@dataclass(slots=True, eq=False)
class TaskState:
    """A task, and how much of it has been shown."""

    model: str
    cut: bytes
    shown: bool = False
    ended: bool = False


class TaskLines:
    """What is shown of a conversation: the events of each task in one group, however many are in flight.

    One thread at a time tells it.
    """

    def __init__(self, observe: Observer, sock: socket.socket) -> None:
        self._observe = observe
        self._sock = sock
        self._named: tuple[str, bytes] | None = None  # the model and cut that were shown last
        self._open: TaskState | None = None  # its group has begun
        self._held: list[TaskState] = []  # done meanwhile

    def connected(self) -> None:
        """The edge said hello."""
        self._show(CloudEvent.CONNECTED)

    def prepared(self, model: str, cut: bytes) -> None:
        """The cloud is ready; inside another task's group it is shown with its first task."""
        if self._open is None:
            self._name(model, cut)

    def arrived(self, task: TaskState) -> None:
        """A task was taken; it may even be done already."""
        if self._open is None and not task.ended:
            self._begin(task)
            self._open = task

    def finished(self, task: TaskState) -> None:
        """A task's answer has been sent."""
        task.ended = True
        if self._open in (None, task):
            self._finish(task)
        else:
            self._held.append(task)

    def failed(self, task: TaskState) -> None:
        """A task that was taken has no answer."""
        task.ended = True
        if self._open is task:
            self._close()

    def _name(self, model: str, cut: bytes) -> None:
        self._named = model, cut
        self._show(CloudEvent.MODEL_TYPE)
        self._show(CloudEvent.PARTITION_POINT)

    def _begin(self, task: TaskState) -> None:
        task.shown = True
        if self._named != (task.model, task.cut):
            self._name(task.model, task.cut)
        self._show(CloudEvent.EDGE_OUTPUT)

    def _finish(self, task: TaskState) -> None:
        if not task.shown:
            self._begin(task)
        for event in (CloudEvent.TRANSFER_LATENCY_SENT, CloudEvent.CLOUD_LATENCY_SENT, CloudEvent.FINISHED):
            self._show(event)
        self._close()

    def _show(self, event: CloudEvent) -> None:
        """Tell the observer; what becomes of its lines is no matter of the conversation."""
        try:
            self._observe(event, self._sock)
        except (OSError, ValueError) as exc:  # its output is closed
            log.debug("%s was not shown: %s", event.name, exc)

    def _close(self) -> None:
        self._open = None
        held, self._held = self._held, []
        for task in held:
            self._finish(task)
