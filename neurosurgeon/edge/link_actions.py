"""The decisions of the link (`edge.link_thread`): its tasks, and the next action of its sender. Pure.

A task that was in flight when the connection was lost is a suspect: it may be the task that crashes the cloud. Suspects
are sent alone, so that no other task is in flight at the next loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neurosurgeon.graph.spec import Array
from neurosurgeon.net.messages import Request
from neurosurgeon.net.session import RemoteResult, SentTask
from neurosurgeon.utils.errors import NeurosurgeonError


class LinkReply(NamedTuple):
    """The reply to a task, its times on the edge (`now_ms`), and the number of retries before it."""

    result: RemoteResult
    sent_ms: float  # at the first byte of the request
    replied_ms: float
    retries: int


OnReply = Callable[[LinkReply | NeurosurgeonError], None]


class LinkProgress(NamedTuple):
    """The transfer progress of the connection."""

    acked_bytes: int  # since the connection began
    left_bytes: Mapping[int, int]  # by task: not yet acknowledged, of the task and of all that is sent before it


@dataclass(slots=True, eq=False)
class PendingTask:
    """A task of the link without a reply. Guarded by the lock of the link."""

    id: int
    request: Request
    tensors: Sequence[Array]  # sent from their own memory
    on_reply: OnReply
    size_bytes: int  # of the tensors; the header adds some hundred bytes
    due_ms: float = 0.0  # the earliest time to send it (`now_ms`)
    sent: SentTask | None = None
    is_in_flight: bool = False  # the sender has begun to send it
    is_wanted: bool = True  # else no retry if the cloud is busy
    end_bytes: int = 0  # `EdgeSession.sent_bytes` after its last byte
    losses: int = 0  # connections that were lost while it was in flight
    refusals: int = 0  # by a busy cloud

    @property
    def name(self) -> str:
        """The task in messages: its number and its model."""
        return f"task {self.id} ({self.request.model})"


class Send(NamedTuple):
    """Send a task."""

    task: int


class Wait(NamedTuple):
    """Wait until the state changes, at most ``ms``."""

    ms: float | None


class Reconnect(NamedTuple):
    """Try once to reconnect."""


class LinkState(NamedTuple):
    """The state on which the next action of the sender depends."""

    is_connected: bool
    pause_ms: float  # until the next attempt to reconnect
    tasks: Sequence[PendingTask]  # the oldest first


def next_action(state: LinkState, now_ms: float) -> Send | Wait | Reconnect:
    """Return the next action of the sender: to send the waiting task with the earliest due time, once it is due."""
    if not state.is_connected:
        return Wait(state.pause_ms) if state.pause_ms > 0 else Reconnect()
    suspects = [task for task in state.tasks if task.losses]
    if suspects and any(task.is_in_flight for task in state.tasks):
        return Wait(None)
    waiting = suspects or [task for task in state.tasks if not task.is_in_flight]
    if not waiting:
        return Wait(None)
    first = min(waiting, key=lambda task: task.due_ms)
    return Send(first.id) if first.due_ms <= now_ms else Wait(first.due_ms - now_ms)
