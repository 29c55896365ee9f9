"""A stream of tasks to one cloud: many in flight on one connection, which is looked for again where it is lost.

    submit ──▶ waiting ──sender──▶ in flight ──receiver──▶ answered
                  ▲                    │
                  └── cloud busy, or connection lost and tasks are kept ──┘

Tasks go out in the order of `submit`: at once where nothing is before them and the system has room for their bytes,
else by a thread that sends, and finds a lost cloud again. Another one receives, in whatever order the cloud answers; or
whoever waits for a task does (`serve`), and need not be woken up. A task leaves the stream exactly once: with its
answer, or with the error that ended it. An answer to a task that has left is dropped.

Errors: only what `is_connection_loss` names loses the connection, with the tasks on it. Any other exception is a defect
of this program: it is logged with its traceback, and ends the task in whose work it came (InternalError); the others go
on. Their connection is kept, too, if it is between two frames. Inside one it must be given up: the cloud would read the
next frame as the rest of this one, or this side its own answers.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from neurosurgeon.net.bandwidth import LinkEstimate
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
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import now_ms
from neurosurgeon.utils.units import MS_PER_S, s_to_ms

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_LOSSES = 5  # a task that takes the cloud down each time is not sent for ever
PATIENCE_S = 30.0  # a cloud that restarts loads its networks first
MIN_RETRY_MS, MAX_RETRY_MS = 5.0, 10_000.0  # whatever a busy cloud says
MAX_SIGNS = 100  # of life, that are read at once: more than a cloud gives during any half
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
class _Flight:
    """A task that has no answer yet."""

    task: int
    request: Request
    tensors: Sequence[Tensor]
    on_answer: OnAnswer
    size_bytes: int  # what it takes on the wire, nearly
    due_ms: float = 0.0  # not to be sent before
    sent: SentTask | None = None
    is_out: bool = False  # taken by the sender
    is_wanted: bool = True
    end_bytes: int = 0  # of what the connection has sent, when this is out
    losses: int = 0  # connections that were lost while it was on its way
    refusals: int = 0  # by a busy cloud


class TaskStream:
    """Sends tasks to a cloud and brings their answers; use it in a ``with`` block.

    Args: session: a conversation in which every model has been prepared; the stream owns it from now on.
          reopen: opens another one when that is lost.
          patience_s: how long tasks are kept for a lost cloud, to be sent again; None: they fail at once.
          is_served: answers are received in `serve` alone, by one thread.
    """

    def __init__(
        self,
        session: EdgeSession,
        reopen: Callable[[], EdgeSession],
        patience_s: float | None = PATIENCE_S,
        *,
        is_served: bool = False,
    ) -> None:
        self.is_served = is_served
        self._reopen = reopen
        self._patience_s = patience_s
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # to hold the lock itself is quicker
        self._flights: dict[int, _Flight] = {}
        self._known: dict[str, Request] = {}  # of every model, the last request
        self._unfit: dict[str, NeurosurgeonError] = {}  # models that the cloud, when it came back, had otherwise
        self._breaker = Breaker()
        self._lost_ms = 0.0
        self._is_sending = False  # a task, by the sender or by whoever submitted it
        self._session: EdgeSession | None = None
        self._opening: EdgeSession | None = None
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._use(session)
        self._start(self._send_all, "sender")

    def __enter__(self) -> TaskStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(
        self, task: int, request: Request, tensors: Sequence[Tensor], on_answer: OnAnswer, losses: int = 0
    ) -> None:
        """Queue a task to be sent; ``task`` must differ from all that have no answer yet.

        Args: on_answer: called once, by whatever thread, with the answer, or with what the cloud answered in its place;
                         with ConnectError where the cloud is lost, and InternalError for a defect of this side.
              losses: how often the cloud was lost with this task before.
        """
        size_bytes = sum([tensor.nbytes for tensor in tensors])
        flight = _Flight(task, request, tensors, on_answer, size_bytes, losses=losses)
        with self._lock:
            if self._closing.is_set() or task in self._flights:
                raise ValueError(f"task {task} is on its way already, or the stream is closed")
            self._flights[task] = flight
            self._known[request.model] = request
            is_away = self._session is None and self._patience_s is None
            session = self._session if self._goes_at_once(flight) else None
            if session:
                self._mark_out(flight, session)
            else:
                self._changed.notify_all()
        if is_away:
            self._fail([flight], ConnectError("the cloud is lost, and not found again yet"))
        elif session:
            self._send(session, flight)
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
                self._changed.notify_all()
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
            self._changed.notify_all()
        for session in sessions:
            if session:
                session.close()
        self._fail(list(self._flights.values()), NetworkError("the stream of tasks was closed"))
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ sending

    def _send_all(self) -> None:
        while not self._closing.is_set():
            session = self._session or self._reconnect()
            flight = self._next_due() if session else None
            if session and flight:
                self._send(session, flight)

    def _goes_at_once(self, flight: _Flight) -> bool:
        """Whether whoever submits a task sends it himself: nothing is before it, and its bytes fit into the system.

        The sender's thread would need a tenth of a millisecond to wake up.
        """
        session = self._session
        is_next = not self._is_sending and (len(self._flights) == 1 or self._may_go() == [flight])
        is_next &= flight.request.model not in self._unfit
        return session is not None and is_next and session.takes_at_once(flight.size_bytes)

    def _mark_out(self, flight: _Flight, session: EdgeSession) -> None:
        flight.end_bytes = session.sent_bytes + flight.size_bytes
        flight.is_out = self._is_sending = True

    def _send(self, session: EdgeSession, flight: _Flight) -> None:
        try:
            flight.sent = SentTask(now_ms(), 0)  # an answer may come before ``send_task`` returns
            flight.sent = session.send_task(flight.task, flight.request, flight.tensors)
        except Exception as exc:
            self._not_sent(session, flight, exc)
        except BaseException:
            session.close()
            raise
        finally:
            with self._lock:
                self._is_sending = False
                if self._may_go():
                    self._changed.notify_all()

    def _not_sent(self, session: EdgeSession, flight: _Flight, exc: Exception) -> None:
        """Fail a task that could not be sent, or lose its connection, or both; see the head of this file."""
        if isinstance(exc, ProtocolError) and not session.is_mid_frame:  # a tensor that cannot be packed
            self._fail([flight], exc)
        elif is_connection_loss(exc) or isinstance(exc, MemoryError):  # there may be memory for the next attempt
            self._lose(session, exc)
        else:
            self._fail([flight], internal_error(log, exc, f"{_name(flight)} could not be sent"))
            if session.is_mid_frame:
                self._lose(session, NetworkError(f"the frame of {_name(flight)} was sent in part"))

    def _next_due(self) -> _Flight | None:
        """Return the first task that may be sent, waiting for one; None when the cloud is lost or the stream closes."""
        with self._lock:
            while self._session and not self._closing.is_set():
                waiting = [] if self._is_sending else self._may_go()
                next_due = min(waiting, key=lambda flight: flight.due_ms, default=None)
                wait_s = (next_due.due_ms - now_ms()) / MS_PER_S if next_due else None
                if next_due and wait_s is not None and wait_s <= 0:
                    self._mark_out(next_due, self._session)
                    return next_due
                self._changed.wait(wait_s)
        return None

    def _may_go(self) -> list[_Flight]:
        """Return the tasks that may be sent. Those that were lost go alone: one of them may take the cloud down."""
        flights = self._flights.values()
        suspects = [flight for flight in flights if flight.losses]
        if not suspects:
            return [flight for flight in flights if not flight.is_out]
        return [] if any(flight.is_out for flight in flights) else suspects

    # ------------------------------------------------------------ receiving

    def serve(self, wait_s: float) -> None:
        """Receive one answer, if it begins to come within ``wait_s``, and the signs of life that came before it.

        Once it has begun, it is waited for: such a stream is for small answers.
        """
        session = self._session
        if session is None:
            with self._lock:
                self._changed.wait(wait_s)
            return
        try:
            for _ in range(MAX_SIGNS):
                if not session.has_message(wait_s) or self._take_next(session):
                    return
        except Exception as exc:
            self._not_received(session, exc)

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

    def _take_next(self, session: EdgeSession) -> bool:
        """Receive a message, and see whose it is; return whether it is more than a sign of life.

        Raises: NetworkError.
        """
        received = session.receive_next()
        flight = self._flights.get(received.task)
        if isinstance(received.message, Pong):
            self._check_overdue()
            return False
        if flight is None or flight.sent is None:
            log.warning("an answer to task %d, which has one already, is dropped", received.task)
        else:
            self._answer(flight, session, flight.sent, received)
        return True

    def _check_overdue(self) -> None:
        """Give up a cloud that lives, but has forgotten a task.

        Raises: DeadlineError.
        """
        oldest_ms = min(
            (flight.sent.start_ms for flight in list(self._flights.values()) if flight.sent), default=now_ms()
        )
        if now_ms() - oldest_ms > s_to_ms(REPLY_TIMEOUT_S):
            raise DeadlineError(f"the cloud lives, but gave no answer within {REPLY_TIMEOUT_S:g} s")

    def _answer(self, flight: _Flight, session: EdgeSession, sent: SentTask, received: Received) -> None:
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

    def _send_later(self, flight: _Flight, retry_ms: float) -> None:
        bounded_ms = max(MIN_RETRY_MS, min(retry_ms, MAX_RETRY_MS))  # in this order NaN becomes the shortest
        pause_ms = bounded_ms * (1 + RETRY_JITTER * random.random())  # noqa: S311  # no secret
        with self._lock:
            flight.due_ms = now_ms() + pause_ms
            flight.is_out, flight.sent = False, None
            flight.refusals += 1
            self._changed.notify_all()

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
            self._changed.notify_all()
        if self._patience_s is None:
            log.warning("the cloud is lost with %d tasks (%s); looking for it", len(waiting), why)
            self._fail(waiting, ConnectError(f"the cloud is lost: {why}"))
        else:
            log.warning("%s; %d tasks will be sent again", why, len(lost))
            hopeless = [flight for flight in lost if flight.losses > MAX_LOSSES]
            often = f"the cloud was lost {MAX_LOSSES + 1} times while it had this task"
            self._fail(hopeless, ConnectError(f"{often}: {why}"))

    def _reconnect(self) -> EdgeSession | None:
        """Return a new conversation with every model prepared; None when the cloud is still away."""
        if self._closing.wait(self._breaker.pause_ms(now_ms()) / MS_PER_S):
            return None
        try:
            session = self._prepared(self._reopen())
        except NeurosurgeonError as exc:
            self._breaker.lost(now_ms())
            # Tasks that are not kept have failed already, or are failing just now, with the cause of the loss.
            if self._patience_s is not None and now_ms() - self._lost_ms > s_to_ms(self._patience_s):
                self._fail(list(self._flights.values()), ConnectError(f"the cloud stays away: {exc}"))
            return None
        except Exception as exc:
            self._breaker.lost(now_ms())
            self._fail(list(self._flights.values()), internal_error(log, exc, "the cloud cannot be looked for"))
            return None
        self._breaker.reached()
        log.info("the cloud is back")
        return self._use(session)

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

    def _use(self, session: EdgeSession) -> EdgeSession | None:
        with self._lock:
            if self._closing.is_set():
                session.close()
                return None
            self._session = session
        if not self.is_served:
            self._start(lambda: self._receive_all(session), "receiver")
        return session

    # ------------------------------------------------------------ bookkeeping

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads = [known for known in self._threads if known.is_alive()]
        self._threads.append(thread)
        thread.start()

    def _fail(self, flights: Iterable[_Flight], why: NeurosurgeonError) -> None:
        for flight in flights:
            self._end(flight, why)

    def _end(self, flight: _Flight, outcome: Answered | NeurosurgeonError) -> None:
        """Let a task leave with its answer, or what stands for it, unless it has left already."""
        with self._lock:
            if isinstance(outcome, Answered):
                self._breaker.answered()
            if flight.losses:
                self._changed.notify_all()  # others waited for it
            is_there = self._flights.get(flight.task) is flight  # one that was lost may have been sent again
            if is_there:
                del self._flights[flight.task]
        if is_there:
            try:
                flight.on_answer(outcome)
            except Exception as exc:  # belongs to whoever submitted it
                internal_error(log, exc, f"the answer to {_name(flight)} could not be taken")


def _name(flight: _Flight) -> str:
    return f"task {flight.task} ({flight.request.model})"
