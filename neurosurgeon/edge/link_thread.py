"""The link of a queue to one cloud: many tasks in flight on one connection, which is reopened after it is lost.

    submit ──▶ waiting ──sender──▶ in flight ──receiver──▶ replied
                  ▲                    │
                  └── cloud busy, or connection lost and tasks are retried ──┘

Theory of operation. The link owns the socket. Its sender thread executes the actions of `next_action`: it sends the
next task, waits, or reconnects. Each connection has a receiver thread, which accepts replies in any order, also while
the sender sends a large tensor. The main loop (`edge.queue`) submits and withdraws tasks, and reads their transfer
progress. `TaskStream._lock` guards all state that these threads share. No thread holds it while it sends or receives.

A task leaves the link exactly once: with its reply, or with the error that ended it. A reply to a task that has left is
dropped. A task that was in flight when the connection was lost is a suspect: it may be the task that crashes the cloud.
Suspects are sent alone, and fail after more than `MAX_LOSSES` losses.

Errors. Only the errors of `is_connection_loss` lose the connection, with the tasks in flight on it. Any other exception
is an internal error: it is logged with its traceback, and fails the task that was handled (InternalError); the other
tasks go on. The connection is kept, too, if the error occurred between two frames. Inside a frame it is given up: the
peer would read the next frame as the rest of this one.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from neurosurgeon.edge.link_actions import (
    LinkProgress,
    LinkReply,
    LinkState,
    OnReply,
    PendingTask,
    Reconnect,
    Send,
    Wait,
    next_action,
)
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.breaker import Breaker
from neurosurgeon.net.connection import Received
from neurosurgeon.net.messages import Pong, Request
from neurosurgeon.net.session import REPLY_TIMEOUT_S, EdgeSession, SentTask
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
from neurosurgeon.utils.units import MS_PER_S, ms_to_s, s_to_ms

log = logging.getLogger(__name__)

MAX_LOSSES = 5  # of one task: a task that crashes the cloud each time must not be sent forever
RECONNECT_TIMEOUT_S = 30.0  # a cloud that restarts loads its networks first
MIN_RETRY_MS, MAX_RETRY_MS = 5.0, 10_000.0  # bounds of a busy cloud's retry-after
CLOSE_TIMEOUT_S = 1.0  # a thread that reconnects may block for longer
RETRY_JITTER = 0.5  # share of the pause: edges that were refused together must not retry together


@dataclass(slots=True)
class LinkModel:
    """A model that every new connection prepares."""

    request: Request  # of its last task
    error: NeurosurgeonError | None = None  # the cloud refused it at the last reconnect


class TaskStream:
    """Sends tasks to a cloud and returns the replies; use it in a ``with`` block.

    Args: session: a connection on which every model has been prepared; the stream owns it from now on.
          reopen: opens a new connection after a loss. May block; called on the sender thread.
          reconnect_timeout_s: how long tasks are kept for a retry after a loss; None: they fail at once.
    """

    def __init__(
        self,
        session: EdgeSession,
        reopen: Callable[[], EdgeSession],
        reconnect_timeout_s: float | None = RECONNECT_TIMEOUT_S,
    ) -> None:
        self._reopen = reopen
        self._reconnect_timeout_s = reconnect_timeout_s
        self._lock = threading.Condition()  # guards all below; notified when the sender's next action may change
        self._tasks: dict[int, PendingTask] = {}
        self._models: dict[str, LinkModel] = {}
        self._breaker = Breaker()
        self._session: EdgeSession | None = None
        self._opening: EdgeSession | None = None  # a new connection before it is used
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._use(session)
        self._start(self._run_sender, "sender")

    def __enter__(self) -> TaskStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, task: int, request: Request, tensors: Sequence[Array], on_reply: OnReply, losses: int = 0) -> None:
        """Queue a task to be sent. Does not block.

        Args:   task: its number, which differs from the numbers of all tasks without a reply.
                tensors: must not change before ``on_reply`` is called.
                on_reply: called once, on any thread, with the reply or the error in its place: the cloud's error;
                          ConnectError: the cloud is disconnected; InternalError: a defect of this side.
                losses: how often the connection was lost with this task before.
        Raises: ValueError: the number is in use, or the stream is closed.
        """
        pending = PendingTask(
            task, request, tensors, on_reply, sum([tensor.nbytes for tensor in tensors]), losses=losses
        )
        with self._lock:
            if self._closing.is_set() or task in self._tasks:
                raise ValueError(f"task {task} cannot be submitted: its number is in use, or the stream is closed")
            self._tasks[task] = pending
            model = self._models.setdefault(request.model, LinkModel(request))
            model.request, error = request, model.error
            if self._session is None and self._reconnect_timeout_s is None:
                error = ConnectError("the cloud disconnected, and is not reconnected yet")
            self._lock.notify_all()
        if error:
            self._fail([pending], error)

    def pace_first_task(self, link: LinkEstimate) -> None:
        """Pace the connection until its first reply (`EdgeSession.pace_first_task`); one opened later is not paced."""
        if session := self._session:
            session.pace_first_task(link)

    def withdraw(self, task: int) -> bool:
        """Do not send a task, if it waits, nor retry it. Return whether it is in flight, so that it has an outcome."""
        with self._lock:
            pending = self._tasks.get(task)
            if pending is None:
                return False
            pending.is_wanted = False
            if not pending.is_in_flight:
                del self._tasks[task]
                self._lock.notify_all()
            return pending.is_in_flight

    def progress(self) -> LinkProgress | None:
        """Return the transfer progress, or None if the cloud is disconnected or the system does not report it."""
        with self._lock:
            acked_bytes = self._session.acked_bytes() if self._session else None
            if acked_bytes is None:
                return None
            end_bytes, left_bytes = acked_bytes, {}
            for task in self._tasks.values():
                end_bytes = task.end_bytes if task.is_in_flight else end_bytes + task.size_bytes
                left_bytes[task.id] = max(end_bytes - acked_bytes, 0)
            return LinkProgress(acked_bytes, left_bytes)

    @property
    def takes_tasks(self) -> bool:
        """Whether a new task should go to the cloud: it is connected, and its breaker admits one."""
        with self._lock:
            return self._session is not None and self._breaker.admits(len(self._tasks))

    @property
    def sending_bytes(self) -> int:
        """The size of the largest task without a reply; 0 if there is none."""
        return max((task.size_bytes for task in list(self._tasks.values())), default=0)

    def close(self) -> None:
        """Close the connection; tasks without a reply fail. Blocks for at most `CLOSE_TIMEOUT_S` for each thread."""
        self._closing.set()
        with self._lock:
            sessions, self._session = (self._session, self._opening), None
            self._lock.notify_all()
        for session in filter(None, sessions):
            session.close()
        self._fail_all(NetworkError("the stream of tasks was closed"))
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    # ------------------------------------------------------------ the sender thread

    def _run_sender(self) -> None:
        outage_start_ms: float | None = None  # the time of the first attempt to reconnect
        while not self._closing.is_set():
            with self._lock:
                session, time_ms = self._session, now_ms()
                tasks = list(self._tasks.values())
                action = next_action(LinkState(session is not None, self._breaker.pause_ms(time_ms), tasks), time_ms)
                if isinstance(action, Wait) and not self._closing.is_set():
                    self._lock.wait(action.ms and action.ms / MS_PER_S)
                if isinstance(action, Send) and session:
                    task = self._tasks[action.task]
                    task.end_bytes = session.sent_bytes + task.size_bytes
                    task.is_in_flight = True
            if isinstance(action, Reconnect):
                outage_start_ms = time_ms if outage_start_ms is None else outage_start_ms
                if self._reconnect(outage_start_ms):
                    outage_start_ms = None
            elif isinstance(action, Send) and session:
                self._send(session, task)

    def _send(self, session: EdgeSession, task: PendingTask) -> None:
        """Send a task. An error fails it, or loses the connection, or both (see "Errors" at the top of this file)."""
        try:
            task.sent = SentTask(now_ms(), 0)  # the reply may arrive before ``send_task`` returns
            task.sent = session.send_task(task.id, task.request, task.tensors)
        except Exception as exc:
            if isinstance(exc, ProtocolError) and not session.is_mid_frame:  # a tensor that cannot be packed
                self._fail([task], exc)
            elif is_connection_loss(exc) or isinstance(exc, MemoryError):  # there may be memory for the next attempt
                self._lose(session, exc)
            else:
                self._fail([task], internal_error(log, exc, f"{task.name} could not be sent"))
                if session.is_mid_frame:
                    self._lose(session, NetworkError(f"the frame of {task.name} was sent in part"))

    # ------------------------------------------------------------ the receiver thread

    def _receive_all(self, session: EdgeSession) -> None:
        """Receive replies until the connection is lost; an internal error also fails the task of the current reply."""
        try:
            while True:
                received = session.receive_next()
                task = self._tasks.get(received.task)
                if isinstance(received.message, Pong):
                    self._check_overdue()
                elif task is None or task.sent is None:
                    log.warning("the reply to task %d is dropped: the task has ended", received.task)
                else:
                    self._take_reply(task, session, task.sent, received)
        except Exception as exc:
            error: Exception = exc
            if not is_connection_loss(exc):
                met = self._tasks.get(session.reading)
                error = internal_error(log, exc, f"the reply to {met.name if met else 'a task'} could not be received")
                self._fail([met] if met else [], error)
            self._lose(session, error)

    def _check_overdue(self) -> None:
        """Detect a cloud that sends heartbeats, but has forgotten a task.

        Raises: DeadlineError.
        """
        sent = [(task.sent.start_ms, task.name) for task in list(self._tasks.values()) if task.sent]
        start_ms, name = min(sent, default=(now_ms(), ""))
        waited_s = ms_to_s(now_ms() - start_ms)
        if waited_s > REPLY_TIMEOUT_S:
            raise DeadlineError(
                f"{name}: no reply for {waited_s:.1f} s although heartbeats arrive; limit {REPLY_TIMEOUT_S:g} s"
            )

    def _take_reply(self, task: PendingTask, session: EdgeSession, sent: SentTask, received: Received) -> None:
        """Let a task leave with its reply, or retry it later if the cloud was busy.

        Raises: ProtocolError: the other messages of this connection cannot be trusted, either.
        """
        try:
            result = session.result_of(received, sent)
        except BusyError as exc:
            if task.is_wanted:
                self._send_later(task, exc.retry_ms)
            else:
                self._fail([task], exc)
        except ProtocolError:
            raise
        except NeurosurgeonError as exc:
            self._fail([task], exc)
        except Exception as exc:
            self._fail([task], internal_error(log, exc, f"the reply to {task.name} could not be read"))
        else:
            self._end(task, LinkReply(result, sent.start_ms, now_ms(), task.losses + task.refusals))

    def _send_later(self, task: PendingTask, retry_ms: float) -> None:
        bounded_ms = max(MIN_RETRY_MS, min(retry_ms, MAX_RETRY_MS))  # in this order NaN becomes the shortest
        pause_ms = bounded_ms * (1 + RETRY_JITTER * random.random())  # noqa: S311  # no secret
        with self._lock:
            task.due_ms = now_ms() + pause_ms
            task.is_in_flight, task.sent = False, None
            task.refusals += 1
            self._lock.notify_all()

    # ------------------------------------------------------------ a lost connection, and the next one

    def _lose(self, session: EdgeSession, exc: Exception) -> None:
        """Give up a connection: its tasks wait for a retry, or fail if they are not kept. Called on any thread."""
        session.close()
        reason = str(exc) or type(exc).__name__
        with self._lock:
            if self._session is not session:
                return  # the other thread was first, or the stream is closing
            self._session = None
            self._breaker.lost(now_ms())
            pending = list(self._tasks.values())
            lost = [task for task in pending if task.is_in_flight]
            for task in lost:
                task.losses += task.sent is not None
                task.is_in_flight, task.sent = False, None
            self._lock.notify_all()
        if self._reconnect_timeout_s is None:
            log.warning("the cloud disconnected with %d tasks (%s); reconnecting", len(pending), reason)
            self._fail(pending, ConnectError(f"the cloud disconnected: {reason}"))
        else:
            log.warning("%s; reconnecting to send %d tasks again", reason, len(lost))
            suspects = [task for task in lost if task.losses > MAX_LOSSES]
            often = f"the cloud disconnected {MAX_LOSSES + 1} times with this task in flight"
            self._fail(suspects, ConnectError(f"{often}: {reason}"))

    def _reconnect(self, outage_start_ms: float) -> bool:
        """Open a new connection with every model prepared; return whether it is open. Called on the sender thread."""
        try:
            session = self._prepared(self._reopen())
        except NeurosurgeonError as exc:
            self._breaker.lost(now_ms())
            # Without a timeout, tasks have failed or are failing with the cause of the loss.
            if self._reconnect_timeout_s is not None and now_ms() - outage_start_ms > s_to_ms(
                self._reconnect_timeout_s
            ):
                self._fail_all(ConnectError(f"the cloud is unreachable: {exc}"))
            return False
        except Exception as exc:
            self._breaker.lost(now_ms())
            self._fail_all(internal_error(log, exc, "reconnecting to the cloud failed"))
            return False
        self._breaker.reached()
        log.info("the cloud is reconnected after %.0f ms", now_ms() - outage_start_ms)
        self._use(session)
        return True

    def _prepared(self, session: EdgeSession) -> EdgeSession:
        """Compare the weights of every model again before any tensor is sent; tasks of a model that differs fail."""
        self._opening = session
        try:
            for name, model in list(self._models.items()):
                model.error = None
                try:
                    session.ask_to_prepare(model.request.preparation)
                    session.wait_until_ready(model.request.weights_digest)
                except NetworkError:
                    session.close()
                    raise
                except NeurosurgeonError as exc:
                    model.error = exc
                    self._fail([task for task in list(self._tasks.values()) if task.request.model == name], exc)
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

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads = [known for known in self._threads if known.is_alive()]
        self._threads.append(thread)
        thread.start()

    # ------------------------------------------------------------ the end of a task

    def _fail_all(self, error: NeurosurgeonError) -> None:
        self._fail(list(self._tasks.values()), error)

    def _fail(self, tasks: Iterable[PendingTask], error: NeurosurgeonError) -> None:
        for task in tasks:
            self._end(task, error)

    def _end(self, task: PendingTask, outcome: LinkReply | NeurosurgeonError) -> None:
        """Let a task leave with its outcome, unless it has left already."""
        with self._lock:
            if isinstance(outcome, LinkReply):
                self._breaker.answered()
            if task.losses:
                self._lock.notify_all()  # tasks may wait for the end of a suspect
            is_there = self._tasks.get(task.id) is task  # the main loop may have submitted it again
            if is_there:
                del self._tasks[task.id]
        if is_there:
            try:
                task.on_reply(outcome)
            except Exception as exc:  # of the caller's function
                internal_error(log, exc, f"the reply to {task.name} could not be handled")
