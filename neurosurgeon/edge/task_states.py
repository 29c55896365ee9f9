"""The five states of a queued task, and what each event makes of them: no threads, no sockets, no clock of its own.

    PLANNED -- edge partition done --> SENT -- reply --------------------> DONE
       | nothing is sent                |  -- stalled, or lost: local --> LOCAL -- rest done, or reply --> DONE
       +-------------------> DONE       ^ ---- the cloud is back -------- LOCAL    (once a task)
                                        |  -- lost (not local), refused -> FAILED
    PLANNED, SENT, LOCAL -- error on this side --> FAILED

Theory of operation. A task begins PLANNED: it has a cut, and the edge computes its partition. While it is SENT, its
tensors or its reply travel. While it is LOCAL, the edge is to compute the rest: the connection was lost, or the
tensors do not move (hedging, `planner.hedge`). DONE and FAILED are final: the first answer counts, and each task is
reported at exactly one transition, that into a final state.

A hedged task is LOCAL while the cloud may still reply; a task that is DONE may be replied to later. So whether the link
still owes an outcome (`awaits_reply`) is a fact of its own beside the state. The link gives exactly one outcome for
each task that it was given: a reply, or the error in its place.

`on_event` is called by one thread, the main loop (`edge.queue`), which also executes the commands. An event that means
nothing in a state changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from neurosurgeon.planner.hedge import Hedging
from neurosurgeon.utils.errors import ConnectError, NeurosurgeonError


class State(Enum):
    """Where a task is; see the head of this file."""

    PLANNED = auto()
    SENT = auto()
    LOCAL = auto()
    DONE = auto()
    FAILED = auto()


FINAL = (State.DONE, State.FAILED)


class TaskRecord(NamedTuple):
    """A task, as far as its transitions depend on it; times as predicted."""

    may_run_here: bool  # --on-cloud-loss local
    state: State = State.PLANNED
    rest_ms: float = 0.0  # what the edge takes for the cloud's partition
    timeout_ms: float = 0.0  # how long the reply may take, with all waits that are known
    sent_ms: float = 0.0
    losses: int = 0  # how often the connection was lost with it, and it was sent again
    is_hedged: bool = False
    awaits_reply: bool = False

    @property
    def may_be_sent_again(self) -> bool:
        """Whether a task that is LOCAL may go to the cloud after all."""
        return not self.is_hedged and not self.losses


class Command(Enum):
    """What the main loop has to do."""

    SEND = auto()
    WITHDRAW = auto()  # send it no more, if it has not been sent yet
    REPORT = auto()  # its result, or its error


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PartDone:
    """The edge has computed its partition."""

    sends: bool  # tensors to the cloud; False: that was the whole network
    rest_ms: float  # of the cut, as `TaskRecord` has them
    timeout_ms: float


@dataclass(frozen=True, slots=True)
class Replied:
    """The cloud has replied."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The link returned an error in place of a reply."""

    error: NeurosurgeonError


@dataclass(frozen=True, slots=True)
class Progress:
    """Time to check transfer progress."""

    hedging: Hedging  # what is known of the connection's bytes
    left_bytes: int  # until the task's last one is acknowledged


@dataclass(frozen=True, slots=True)
class NotSent:
    """A task was withdrawn before it was sent: the link returns nothing for it."""


@dataclass(frozen=True, slots=True)
class CloudBack:
    """Sending a lost task again is predicted to be clearly faster than computing the rest."""

    timeout_ms: float


@dataclass(frozen=True, slots=True)
class RestDone:
    """The edge has computed the rest."""


@dataclass(frozen=True, slots=True)
class Broke:
    """An error on this side: of the image, of the network, or an internal one."""

    error: Exception


Event = PartDone | Replied | Refused | Progress | NotSent | CloudBack | RestDone | Broke


# ---------------------------------------------------------------- transitions


def on_event(record: TaskRecord, event: Event, now_ms: float) -> tuple[TaskRecord, list[Command]]:
    """Return what a task becomes, and what is to be done for it."""
    match record.state, event:
        case (State.PLANNED, PartDone(sends=False)) | (State.LOCAL, RestDone()):
            return record._replace(state=State.DONE), [Command.REPORT]
        case State.PLANNED, PartDone():
            sent = _sent(record, event.timeout_ms, now_ms)
            return sent._replace(rest_ms=event.rest_ms), [Command.SEND]
        case State.SENT, Progress() if _is_stalled(record, event, now_ms):
            return record._replace(state=State.LOCAL, is_hedged=True), [Command.WITHDRAW]
        case State.SENT, Refused() if _runs_here_after(record, event.error):
            return record._replace(state=State.LOCAL, awaits_reply=False), []
        case State.SENT, Refused():
            return record._replace(state=State.FAILED, awaits_reply=False), [Command.REPORT]
        case State.SENT | State.LOCAL, Replied():
            return record._replace(state=State.DONE, awaits_reply=False), [Command.REPORT]
        case State.LOCAL, CloudBack() if record.may_be_sent_again:
            return _sent(record, event.timeout_ms, now_ms)._replace(losses=1), [Command.SEND]
        case State.PLANNED | State.SENT | State.LOCAL, Broke():
            return record._replace(state=State.FAILED, awaits_reply=False), [Command.REPORT]
        case _, Replied() | Refused() | NotSent() | Broke():
            return record._replace(awaits_reply=False), []
    return record, []


def _sent(record: TaskRecord, timeout_ms: float, now_ms: float) -> TaskRecord:
    return record._replace(state=State.SENT, sent_ms=now_ms, timeout_ms=timeout_ms, awaits_reply=True)


def _is_stalled(record: TaskRecord, progress: Progress, now_ms: float) -> bool:
    way = progress.hedging.progress_of(now_ms, record.sent_ms, record.timeout_ms, progress.left_bytes)
    return record.may_run_here and progress.hedging.should_hedge(way, record.rest_ms)


def _runs_here_after(record: TaskRecord, error: NeurosurgeonError) -> bool:
    """Return whether a task's error is one of the link: sent again, it may meet another cloud, and any error."""
    return record.may_run_here and (record.losses > 0 or isinstance(error, ConnectError))
