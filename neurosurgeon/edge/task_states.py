"""The five states of a queued task, and its transition for each event. Pure: no threads, no sockets, no clock.

    PLANNED -- edge partition done --> SENT -- reply ----------------------> DONE
       | nothing is sent                |  -- stalled, or lost ----> LOCAL -- rest done, or reply --> DONE
       +-------------------> DONE       ^ -- reconnected, resend --- LOCAL    (once a task)
                                        |  -- lost (not local), refused ---> FAILED
    PLANNED, SENT, LOCAL -- error on this side --> FAILED

Theory of operation. A task begins PLANNED: it has a cut, and the edge computes its partition. While it is SENT, its
tensors or its reply are being transferred. While it is LOCAL, the edge computes the rest, the cloud's partition: the
connection was lost, or the transfer has stalled (hedging, `planner.hedge`). DONE and FAILED are final: the first
outcome counts, and each task is reported at exactly one transition, the one into a final state.

A hedged task is LOCAL while the cloud may still reply; the reply to a task that is DONE may arrive later. So whether
the link still owes an outcome (`awaits_reply`) is kept beside the state. The link returns exactly one outcome for each
task that was submitted: a reply, or the error in its place.

`on_event` is called on one thread, that of the main loop (`edge.queue`), which also executes the commands. An event
without a transition in a state changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from neurosurgeon.planner.hedge import Hedging
from neurosurgeon.utils.errors import ConnectError, NeurosurgeonError


class State(Enum):
    """The state of a task; see the top of this file."""

    PLANNED = auto()
    SENT = auto()
    LOCAL = auto()
    DONE = auto()
    FAILED = auto()


FINAL = (State.DONE, State.FAILED)


class TaskRecord(NamedTuple):
    """The part of a task on which its transitions depend."""

    may_run_locally: bool  # --on-cloud-loss local
    state: State = State.PLANNED
    rest_ms: float = 0.0  # predicted latency of the cloud partition on the edge
    timeout_ms: float = 0.0  # predicted time until the reply, with all known waits
    sent_ms: float = 0.0  # when it was submitted to the link
    losses: int = 0  # lost connections after which it was sent again
    is_hedged: bool = False
    awaits_reply: bool = False

    @property
    def may_be_resent(self) -> bool:
        """Whether a LOCAL task may be sent to the cloud again."""
        return not self.is_hedged and not self.losses


class Command(Enum):
    """A command to the main loop."""

    SEND = auto()
    WITHDRAW = auto()  # do not send it, if it still waits, nor retry it
    REPORT = auto()  # its result, or its error


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class EdgePartitionDone:
    """The edge has computed its partition."""

    sends: bool  # False: the partition is the whole network
    rest_ms: float  # see `TaskRecord`
    timeout_ms: float


@dataclass(frozen=True, slots=True)
class Replied:
    """The cloud has replied."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The link returned an error in place of a reply."""

    error: NeurosurgeonError


@dataclass(frozen=True, slots=True)
class ProgressCheck:
    """Time to check transfer progress."""

    hedging: Hedging  # the acknowledged bytes of the connection
    left_bytes: int  # not yet acknowledged, of the task and of all that is sent before it


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A task was withdrawn before it was sent: the link returns no outcome for it."""


@dataclass(frozen=True, slots=True)
class ResendPlanned:
    """The cloud is reconnected, and sending a lost task again is predicted to be clearly faster than the rest."""

    timeout_ms: float


@dataclass(frozen=True, slots=True)
class RestDone:
    """The edge has computed the rest."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on this side: of the image or the network, or an internal error."""

    error: Exception


Event = EdgePartitionDone | Replied | Refused | ProgressCheck | Withdrawn | ResendPlanned | RestDone | Failure


# ---------------------------------------------------------------- transitions


def on_event(record: TaskRecord, event: Event, now_ms: float) -> tuple[TaskRecord, list[Command]]:
    """Return the record of a task after an event, and the commands to execute in this order."""
    match record.state, event:
        case (State.PLANNED, EdgePartitionDone(sends=False)) | (State.LOCAL, RestDone()):
            return record._replace(state=State.DONE), [Command.REPORT]
        case State.PLANNED, EdgePartitionDone():
            sent = _sent(record, event.timeout_ms, now_ms)
            return sent._replace(rest_ms=event.rest_ms), [Command.SEND]
        case State.SENT, ProgressCheck() if _is_stalled(record, event, now_ms):
            return record._replace(state=State.LOCAL, is_hedged=True), [Command.WITHDRAW]
        case State.SENT, Refused() if _runs_locally_after(record, event.error):
            return record._replace(state=State.LOCAL, awaits_reply=False), []
        case State.SENT, Refused():
            return record._replace(state=State.FAILED, awaits_reply=False), [Command.REPORT]
        case State.SENT | State.LOCAL, Replied():
            return record._replace(state=State.DONE, awaits_reply=False), [Command.REPORT]
        case State.LOCAL, ResendPlanned() if record.may_be_resent:
            return _sent(record, event.timeout_ms, now_ms)._replace(losses=1), [Command.SEND]
        case State.PLANNED | State.SENT | State.LOCAL, Failure():
            return record._replace(state=State.FAILED, awaits_reply=False), [Command.REPORT]
        case _, Replied() | Refused() | Withdrawn() | Failure():
            return record._replace(awaits_reply=False), []
    return record, []


def _sent(record: TaskRecord, timeout_ms: float, now_ms: float) -> TaskRecord:
    return record._replace(state=State.SENT, sent_ms=now_ms, timeout_ms=timeout_ms, awaits_reply=True)


def _is_stalled(record: TaskRecord, progress: ProgressCheck, now_ms: float) -> bool:
    transfer = progress.hedging.progress_of(now_ms, record.sent_ms, record.timeout_ms, progress.left_bytes)
    return record.may_run_locally and progress.hedging.should_hedge(transfer, record.rest_ms)


def _runs_locally_after(record: TaskRecord, error: NeurosurgeonError) -> bool:
    """Return whether the edge computes the rest: the link failed, or a restarted cloud refuses a resend."""
    return record.may_run_locally and (record.losses > 0 or isinstance(error, ConnectError))
