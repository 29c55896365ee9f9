"""The link of a queue to one cloud: many tasks in flight on one connection, which is reopened where it is lost.

    submit ──▶ waiting ──sender──▶ in flight ──receiver──▶ answered
                  ▲                    │
                  └── cloud busy, or connection lost and tasks are kept ──┘

Theory of operation. The link owns the socket. One of its threads, the sender, does what `next_action` says: it sends
the task that is due, waits, or looks for a lost cloud again. The other, the receiver, one for each connection, takes
whatever the cloud says, in whatever order, so that replies come in while a large tensor goes out. The main loop
(`edge.queue`) submits and withdraws tasks, and asks how far they are. `TaskStream._lock` guards all that these threads
share; none of them holds it while it sends or receives.

A task leaves the link exactly once: with its answer, or with the error that ended it. An answer to a task that has left
is dropped. A task that was in flight when the connection was lost is a suspect: it may be what takes the cloud down.
Suspects are sent alone, and fail after `MAX_LOSSES` losses.

Errors: only what `is_connection_loss` names loses the connection, with the tasks on it. Any other exception is an
internal error: it is logged with its traceback, and ends the task in whose work it came (InternalError); the others go
on. Their connection is kept, too, if it is between two frames. Inside one it must be given up: the cloud would read the
next frame as the rest of this one, or this side its own answers.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from neurosurgeon.net.breaker import Breaker
from neurosurgeon.net.connection import Received
from neurosurgeon.net.messages import Pong, Request
from neurosurgeon.net.session import REPLY_TIMEOUT_S, EdgeSession, RemoteResult, SentTask
from neurosurgeon.utils.errors import (
    BusyError,
    ConnectError,
    DeadlineError,
    NetworkError,
    NeurosurgeonError,
    ProtocolError,
    is_connection_loss,
)
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

log = logging.getLogger(__name__)

MAX_LOSSES = 5  # a task that takes the cloud down each time is not sent for ever
PATIENCE_S = 30.0  # a cloud that restarts loads its networks first
MIN_RETRY_MS, MAX_RETRY_MS = 5.0, 10_000.0  # whatever a busy cloud says
CLOSE_TIMEOUT_S = 1.0  # a thread that looks for the cloud may wait longer for its address to answer
RETRY_JITTER = 0.5  # edges that were refused together do not come back together


class Answered(NamedTuple):
    """A task's answer, and what it took to get it."""

    result: RemoteResult
    sent_ms: float  # when it began to go out (`now_ms`)
    answered_ms: float
    retries: int


OnAnswer = Callable[[Answered | NeurosurgeonError], None]


class Crossing(NamedTuple):
    """How far the tensors of the tasks are on their way."""

    acked_bytes: int  # of the connection, by the cloud's machine
    left_bytes: Mapping[int, int]  # of each task: until its last byte is acknowledged, with those before it


@dataclass(slots=True, eq=False)
class Flight:
    """A task that has no answer yet."""

    task: int
    request: Request
    tensors: Sequence[Any]  # torch's, sent from their own memory
    on_answer: OnAnswer
    size_bytes: int  # what it takes on the wire, nearly
    due_ms: float = 0.0  # not to be sent before
    sent: SentTask | None = None
    is_out: bool = False  # taken by the sender
    is_wanted: bool = True
    end_bytes: int = 0  # of what the connection has sent, when this is out
    losses: int = 0  # connections that were lost while it was on its way
    refusals: int = 0  # by a busy cloud


# ---------------------------------------------------------------- what the sender does next


class Send(NamedTuple):
    """Send a task."""

    task: int


class Wait(NamedTuple):
    """Wait for a change, and at most so long."""

    ms: float | None


class Reconnect(NamedTuple):
    """Look for the cloud."""


class LinkState(NamedTuple):
    """What the sender's next action depends on."""

    is_connected: bool
    pause_ms: float  # until the cloud may be looked for again
    tasks: Sequence[Flight]  # without an answer, the oldest first


def next_action(state: LinkState, now_ms: float) -> Send | Wait | Reconnect:
    """Return what the sender does: of the tasks that may go, the one that is due first is sent at its time."""
    if not state.is_connected:
        return Wait(state.pause_ms) if state.pause_ms > 0 else Reconnect()
    suspects = [flight for flight in state.tasks if flight.losses]
    if suspects and any(flight.is_out for flight in state.tasks):  # suspects go alone
        return Wait(None)
    waiting = suspects or [flight for flight in state.tasks if not flight.is_out]
    if not waiting:
        return Wait(None)
    first = min(waiting, key=lambda flight: flight.due_ms)
    return Send(first.task) if first.due_ms <= now_ms else Wait(first.due_ms - now_ms)


class TaskStream:
    """Sends tasks to a cloud and brings their answers; use it in a ``with`` block.

    Args: session: a conversation in which every model has been prepared; the stream owns it from now on.
          reopen: opens another one when that is lost.
          patience_s: how long tasks are kept for a lost cloud, to be sent again; None: they fail at once.
    """

    def __init__(
        self,
        session: EdgeSession,
        reopen: Callable[[], EdgeSession],
        patience_s: float | None = PATIENCE_S,
    ) -> None:
        self._reopen = reopen
        self._patience_s = patience_s
        self._lock = threading.Condition()  # notified when the sender's next action may be another one
        self._flights: dict[int, Flight] = {}
        self._known: dict[str, Request] = {}  # of every model, the last request
        self._unfit: dict[str, NeurosurgeonError] = {}  # models that the cloud, when it came back, had otherwise
        self._breaker = Breaker()
        self._lost_ms = 0.0
        self._session: EdgeSession | None = None
        self._opening: EdgeSession | None = None
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._use(session)
        self._start(self._run_sender, "sender")

    def __enter__(self) -> TaskStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, task: int, request: Request, tensors: Sequence[Any], on_answer: OnAnswer, losses: int = 0) -> None:
        """Queue a task to be sent; ``task`` must differ from all that have no answer yet.

        Args: on_answer: called once, by whatever thread, with the answer, or with what the cloud answered in its place;
                         with ConnectError where the cloud is lost, and InternalError for a defect of this side.
              losses: how often the cloud was lost with this task before.
        """
        size_bytes = sum([tensor.nbytes for tensor in tensors])
        flight = Flight(task, request, tensors, on_answer, size_bytes, losses=losses)
        with self._lock:
            if self._closing.is_set() or task in self._flights:
                raise ValueError(f"task {task} is on its way already, or the stream is closed")
            self._flights[task] = flight
            self._known[request.model] = request
            is_away = self._session is None and self._patience_s is None
            self._lock.notify_all()
        if is_away:
            self._fail([flight], ConnectError("the cloud is lost, and not found again yet"))
        elif request.model in self._unfit:
            self._fail([flight], self._unfit[request.model])

    def pace_first_task(self, link: LinkEstimate) -> None:
        """See `EdgeSession.pace_first_task`; a connection that is opened later starts anew."""
        if session := self._session:
            session.pace_first_task(link)

    def withdraw(self, task: int) -> bool:
        """Do not send a task any more; return whether it has been sent, so that it has an answer all the same."""
        with self._lock:
            flight = self._flights.get(task)
            if flight is None:
                return False
            flight.is_wanted = False
            if not flight.is_out:
                del self._flights[task]
                self._lock.notify_all()
            return flight.is_out

    def crossing(self) -> Crossing | None:
        """Return how far tensors are on their way; None where the cloud is lost, or the system does not tell."""
        with self._lock:
            acked_bytes = self._session.acked_bytes() if self._session else None
            if acked_bytes is None:
                return None
            end_bytes, left_bytes = acked_bytes, {}
            for task, flight in self._flights.items():
                end_bytes = flight.end_bytes if flight.is_out else end_bytes + flight.size_bytes
                left_bytes[task] = max(end_bytes - acked_bytes, 0)
            return Crossing(acked_bytes, left_bytes)

    @property
    def takes_tasks(self) -> bool:
        """Whether a task should go to the cloud now: it is there, and has not just come back untried."""
        with self._lock:
            return self._session is not None and self._breaker.admits(len(self._flights))

    @property
    def sending_bytes(self) -> int:
        """The size of the largest task that is on its way to the cloud or waits to be sent; 0 where none is."""
        return max((flight.size_bytes for flight in list(self._flights.values())), default=0)

    def close(self) -> None:
        """End the stream; tasks without an answer fail."""
        self._closing.set()
        with self._lock:
            sessions, self._session = (self._session, self._opening), None
            self._lock.notify_all()
        for session in sessions:
            if session:
                session.close()
        self._fail(list(self._flights.values()), NetworkError("the stream of tasks was closed"))
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ sending

    def _run_sender(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                session, time_ms = self._session, now_ms()
                tasks = list(self._flights.values())
                action = next_action(LinkState(session is not None, self._breaker.pause_ms(time_ms), tasks), time_ms)
                if isinstance(action, Wait) and not self._closing.is_set():
                    self._lock.wait(action.ms and action.ms / MS_PER_S)
                if isinstance(action, Send) and session:
                    flight = self._flights[action.task]
                    flight.end_bytes = session.sent_bytes + flight.size_bytes
                    flight.is_out = True
            if isinstance(action, Reconnect):
                self._reconnect()
            elif isinstance(action, Send) and session:
                self._send(session, flight)

    def _send(self, session: EdgeSession, flight: Flight) -> None:
        try:
            flight.sent = SentTask(now_ms(), 0)  # an answer may come before ``send_task`` returns
            flight.sent = session.send_task(flight.task, flight.request, flight.tensors)
        except Exception as exc:
            self._not_sent(session, flight, exc)

    def _not_sent(self, session: EdgeSession, flight: Flight, exc: Exception) -> None:
        """Fail a task that could not be sent, or lose its connection, or both; see the head of this file."""
        if isinstance(exc, ProtocolError) and not session.is_mid_frame:  # a tensor that cannot be packed
            self._fail([flight], exc)
        elif is_connection_loss(exc) or isinstance(exc, MemoryError):  # there may be memory for the next attempt
            self._lose(session, exc)
        else:
            self._fail([flight], internal_error(log, exc, f"{_name(flight)} could not be sent"))
            if session.is_mid_frame:
                self._lose(session, NetworkError(f"the frame of {_name(flight)} was sent in part"))

    # ------------------------------------------------------------ receiving

    def _receive_all(self, session: EdgeSession) -> None:
        try:
            while True:
                self._take_next(session)
        except Exception as exc:
            self._not_received(session, exc)

    def _not_received(self, session: EdgeSession, exc: Exception) -> None:
        """Lose a connection by which no more can be received; a defect also fails the task whose answer it met."""
        if not is_connection_loss(exc):
            flight = self._flights.get(session.reading)
            name = _name(flight) if flight else "a task"
            exc = internal_error(log, exc, f"the answer to {name} could not be received")
            self._fail([flight] if flight else [], exc)
        self._lose(session, exc)

    def _take_next(self, session: EdgeSession) -> None:
        """Receive a message, and see whose it is.

        Raises: NetworkError.
        """
        received = session.receive_next()
        flight = self._flights.get(received.task)
        if isinstance(received.message, Pong):
            self._check_overdue()
        elif flight is None or flight.sent is None:
            log.warning("an answer to task %d, which has one already, is dropped", received.task)
        else:
            self._answer(flight, session, flight.sent, received)

    def _check_overdue(self) -> None:
        """Give up a cloud that lives, but has forgotten a task.

        Raises: DeadlineError.
        """
        oldest_ms = min(
            (flight.sent.start_ms for flight in list(self._flights.values()) if flight.sent), default=now_ms()
        )
        if now_ms() - oldest_ms > s_to_ms(REPLY_TIMEOUT_S):
            raise DeadlineError(f"the cloud lives, but gave no answer within {REPLY_TIMEOUT_S:g} s")

    def _answer(self, flight: Flight, session: EdgeSession, sent: SentTask, received: Received) -> None:
        try:
            result = session.result_of(received, sent)
        except BusyError as exc:
            if flight.is_wanted:
                self._send_later(flight, exc.retry_ms)
            else:
                self._fail([flight], exc)
        except ProtocolError:
            raise  # what else comes by this connection is not to be trusted, either
        except NeurosurgeonError as exc:
            self._fail([flight], exc)
        except Exception as exc:
            self._fail([flight], internal_error(log, exc, f"the answer to {_name(flight)} could not be read"))
        else:
            answered = Answered(result, sent.start_ms, now_ms(), flight.losses + flight.refusals)
            self._end(flight, answered)

    def _send_later(self, flight: Flight, retry_ms: float) -> None:
        bounded_ms = max(MIN_RETRY_MS, min(retry_ms, MAX_RETRY_MS))  # in this order NaN becomes the shortest
        pause_ms = bounded_ms * (1 + RETRY_JITTER * random.random())  # noqa: S311  # no secret
        with self._lock:
            flight.due_ms = now_ms() + pause_ms
            flight.is_out, flight.sent = False, None
            flight.refusals += 1
            self._lock.notify_all()

    # ------------------------------------------------------------ losing the connection, and finding it again

    def _lose(self, session: EdgeSession, exc: Exception) -> None:
        """Give up a connection: what is in flight waits to be sent again, or fails where tasks are not kept."""
        session.close()
        why = str(exc) or type(exc).__name__
        with self._lock:
            if self._session is not session:
                return  # the other thread was first, or the stream closes
            self._session = None
            self._lost_ms = now_ms()
            self._breaker.lost(self._lost_ms)
            lost = [flight for flight in self._flights.values() if flight.is_out]
            waiting = list(self._flights.values())
            for flight in lost:
                flight.losses += flight.sent is not None
                flight.is_out, flight.sent = False, None
            self._lock.notify_all()
        if self._patience_s is None:
            log.warning("the cloud is lost with %d tasks (%s); looking for it", len(waiting), why)
            self._fail(waiting, ConnectError(f"the cloud is lost: {why}"))
        else:
            log.warning("%s; %d tasks will be sent again", why, len(lost))
            hopeless = [flight for flight in lost if flight.losses > MAX_LOSSES]
            often = f"the cloud was lost {MAX_LOSSES + 1} times while it had this task"
            self._fail(hopeless, ConnectError(f"{often}: {why}"))

    def _reconnect(self) -> None:
        """Look for the cloud, and begin a new conversation with every model prepared."""
        try:
            session = self._prepared(self._reopen())
        except NeurosurgeonError as exc:
            self._breaker.lost(now_ms())
            # Tasks that are not kept have failed already, or are failing just now, with the cause of the loss.
            if self._patience_s is not None and now_ms() - self._lost_ms > s_to_ms(self._patience_s):
                self._fail(list(self._flights.values()), ConnectError(f"the cloud stays away: {exc}"))
            return
        except Exception as exc:
            self._breaker.lost(now_ms())
            self._fail(list(self._flights.values()), internal_error(log, exc, "the cloud cannot be looked for"))
            return
        self._breaker.reached()
        log.info("the cloud is back")
        self._use(session)

    def _prepared(self, session: EdgeSession) -> EdgeSession:
        """Compare the weights of every model once more, before any tensor is sent; a model that differs fails."""
        self._opening = session
        self._unfit = {}
        try:
            for model, request in list(self._known.items()):
                try:
                    session.ask_to_prepare(request.preparation)
                    session.wait_until_ready(request.weights_digest)
                except NetworkError:
                    session.close()
                    raise
                except NeurosurgeonError as exc:
                    self._unfit[model] = exc
                    self._fail([one for one in list(self._flights.values()) if one.request.model == model], exc)
        finally:
            self._opening = None
        return session

    def _use(self, session: EdgeSession) -> None:
        with self._lock:
            if self._closing.is_set():
                session.close()
                return
            self._session = session
        self._start(lambda: self._receive_all(session), "receiver")

    # ------------------------------------------------------------ bookkeeping

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads = [known for known in self._threads if known.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _fail(self, flights: Iterable[Flight], why: NeurosurgeonError) -> None:
        for flight in flights:
            self._end(flight, why)

    def _end(self, flight: Flight, outcome: Answered | NeurosurgeonError) -> None:
        """Let a task leave with its answer, or what stands for it, unless it has left already."""
        with self._lock:
            if isinstance(outcome, Answered):
                self._breaker.answered()
            if flight.losses:
                self._lock.notify_all()  # others waited for it
            is_there = self._flights.get(flight.task) is flight  # one that was lost may have been sent again
            if is_there:
                del self._flights[flight.task]
        if is_there:
            try:
                flight.on_answer(outcome)
            except Exception as exc:  # belongs to whoever submitted it
                internal_error(log, exc, f"the answer to {_name(flight)} could not be taken")


def _name(flight: Flight) -> str:
    return f"task {flight.task} ({flight.request.model})"
