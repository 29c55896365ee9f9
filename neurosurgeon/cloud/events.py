"""Events of the cloud's conversations, which scripts print as lines. The events of a task are never interleaved."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from enum import Enum, auto

from neurosurgeon.net.messages import Prepare, Request

log = logging.getLogger(__name__)


class CloudEvent(Enum):
    """An event of a conversation; scripts print one line for each."""

    CONNECTED = auto()
    MODEL_TYPE = auto()
    PARTITION_POINT = auto()
    EDGE_OUTPUT = auto()
    TRANSFER_LATENCY_SENT = auto()
    CLOUD_LATENCY_SENT = auto()
    FINISHED = auto()


ANSWERED = (CloudEvent.TRANSFER_LATENCY_SENT, CloudEvent.CLOUD_LATENCY_SENT, CloudEvent.FINISHED)
Observer = Callable[[CloudEvent, socket.socket], None]


class TaskLines:
    """Reports the events of a conversation, those of each task as one group, also with many tasks in flight.

    The first task to arrive opens a group, and its events are reported at once. Tasks that end meanwhile are held until
    the group is complete, and then reported as a whole. Called on the conversation's reader and writer.
    """

    def __init__(self, observe: Observer, sock: socket.socket) -> None:
        self._observe = observe
        self._sock = sock
        self._lock = threading.Lock()  # guards all below
        self._named: tuple[str, bytes] | None = None  # the model and cut that were reported last
        self._open: int | None = None  # the number of the task whose group is open
        self._held: list[Request] = []  # tasks that ended while a group was open

    def connected(self) -> None:
        """Report that the edge has said hello."""
        self._show(CloudEvent.CONNECTED)

    def prepared(self, prepare: Prepare) -> None:
        """Report that the cloud is ready; while a group is open, the next task of that cut reports it."""
        with self._lock:
            if self._open is None:
                self._name(prepare)

    def arrived(self, number: int, request: Request) -> None:
        """Report that a task was received. Called before the task can end."""
        with self._lock:
            if self._open is None:
                self._open = number
                self._begin(request)

    def ended(self, number: int, request: Request, *, is_answered: bool) -> None:
        """Report that the reply to a task was sent, or end its group if that was an error."""
        with self._lock:
            if self._open not in (None, number):
                self._held += [request] if is_answered else []
                return
            if is_answered:
                if self._open is None:
                    self._begin(request)
                self._show(*ANSWERED)
            for held in self._held:
                self._begin(held)
                self._show(*ANSWERED)
            self._open, self._held = None, []

    def _name(self, cut: Prepare | Request) -> None:
        self._named = cut.model, cut.edge_nodes
        self._show(CloudEvent.MODEL_TYPE, CloudEvent.PARTITION_POINT)

    def _begin(self, request: Request) -> None:
        if self._named != (request.model, request.edge_nodes):
            self._name(request)
        self._show(CloudEvent.EDGE_OUTPUT)

    def _show(self, *events: CloudEvent) -> None:
        """Call the observer. An error of a closed output is logged, and does not end the conversation."""
        try:
            for event in events:
                self._observe(event, self._sock)
        except (OSError, ValueError) as exc:
            log.debug("%s was not shown: %s", event.name, exc)
