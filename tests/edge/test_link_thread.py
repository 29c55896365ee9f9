"""The link: the next action of its sender, and clouds that reorder, refuse, forget, crash and reconnect."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from neurosurgeon.edge import link_thread
from neurosurgeon.edge.link_actions import LinkReply, LinkState, PendingTask, Reconnect, Send, Wait, next_action
from neurosurgeon.edge.link_thread import TaskStream
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.connection import Connection, Received
from neurosurgeon.net.messages import ErrorReply, Hello, Pong, Prepare, Ready, Reply, Request
from neurosurgeon.net.session import EdgeSession, SentTask
from neurosurgeon.net.sockets import accepted, stop_accepting
from neurosurgeon.utils.errors import (
    BusyError,
    ConnectError,
    InternalError,
    NetworkError,
    NeurosurgeonError,
    PeerGoneError,
    ProtocolError,
    RemoteError,
    UsageError,
    WeightsError,
)

WAIT_S = 20.0
REQUEST = Request("le_net", b"\3", "graph", "digest")
Script = Callable[[Connection, Received], None]


def reply_to(connection: Connection, received: Received) -> None:
    """Reply to a task with its tensor, doubled."""
    connection.send(Reply(0.0, 0.0, 0.0, 0.0), [received.arrays[0] * 2], received.task)


class ScriptedCloud:
    """A cloud with one script for each connection; the last one is for all later connections."""

    def __init__(self, listener: socket.socket, *scripts: Script, digest: str = "digest") -> None:
        self.scripts = scripts
        self.digest = digest
        self.prepared: list[str] = []
        self.tasks: list[int] = []
        self._listener = listener
        self._threads: list[threading.Thread] = []

    def serve(self) -> None:
        for number, (sock, _) in enumerate(accepted(self._listener)):
            script = self.scripts[min(number, len(self.scripts) - 1)]
            thread = threading.Thread(target=self._converse, args=(Connection(sock), script), daemon=True)
            thread.start()
            self._threads.append(thread)
        for thread in self._threads:
            thread.join()

    def _converse(self, connection: Connection, script: Script) -> None:
        with connection:
            try:
                connection.receive(WAIT_S)
                connection.send(Hello.of())
                while True:
                    received = connection.receive(WAIT_S)
                    if isinstance(received.message, Prepare):
                        self.prepared.append(received.message.model)
                        connection.send(Ready(received.message.model, self.digest))
                    else:
                        self.tasks.append(received.task)
                        script(connection, received)
            except NetworkError:
                pass


@contextmanager
def streaming(listener: socket.socket, *scripts: Script, **options: Any) -> Iterator[tuple[TaskStream, ScriptedCloud]]:
    """Yield a stream to a scripted cloud; both are closed after the block."""
    cloud = ScriptedCloud(listener, *scripts)
    server = threading.Thread(target=cloud.serve, daemon=True)
    server.start()
    host, port = listener.getsockname()

    def connect() -> EdgeSession:
        return EdgeSession.open(host, port)

    try:
        with TaskStream(connect(), connect, **options) as stream:
            yield stream, cloud
    finally:
        stop_accepting(listener)
        server.join()


def submit_one(stream: TaskStream, task: int, array: Array, request: Request = REQUEST) -> Future[LinkReply]:
    answer: Future[LinkReply] = Future()

    def take(outcome: LinkReply | NeurosurgeonError) -> None:
        if isinstance(outcome, NeurosurgeonError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    stream.submit(task, request, [array], take)
    return answer


def submit(stream: TaskStream, *tasks: int, request: Request = REQUEST) -> list[Any]:
    return [submit_one(stream, task, np.array([float(task)], np.float32), request) for task in tasks]


def values(answers: list[Any]) -> list[float]:
    return [answer.result(WAIT_S).result.arrays[0].item() for answer in answers]


# ---------------------------------------------------------------- the next action of the sender

NOW_MS = 1_000.0


def pending(task: int, **fields: Any) -> PendingTask:
    """Return a task of one byte that is due at once."""
    return PendingTask(task, REQUEST, [], pytest.fail, 1, **fields)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([], Wait(None)),
        ([pending(1), pending(2)], Send(1)),
        ([pending(1, is_in_flight=True), pending(2)], Send(2)),
        ([pending(1, is_in_flight=True)], Wait(None)),
        ([pending(1, due_ms=NOW_MS + 30), pending(2)], Send(2)),
        ([pending(1, due_ms=NOW_MS + 30), pending(2, due_ms=NOW_MS + 20)], Wait(20.0)),
        ([pending(1), pending(2, losses=1)], Send(2)),  # a suspect is sent alone
        ([pending(1, is_in_flight=True), pending(2, losses=1)], Wait(None)),
        ([pending(1), pending(2, losses=1, is_in_flight=True)], Wait(None)),
    ],
)
def test_next_action_sends_the_first_due_task_and_suspects_alone(
    tasks: list[PendingTask], expected: Send | Wait | Reconnect
) -> None:
    assert next_action(LinkState(True, 0.0, tasks), NOW_MS) == expected


def test_next_action_reconnects_after_the_pause() -> None:
    assert next_action(LinkState(False, 0.0, [pending(1)]), NOW_MS) == Reconnect()
    assert next_action(LinkState(False, 50.0, [pending(1)]), NOW_MS) == Wait(50.0)


# ---------------------------------------------------------------- the link and a scripted cloud


def test_a_memory_error_of_sending_is_retried(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    send_task = EdgeSession.send_task
    errors = iter([MemoryError()])

    def failing(session: EdgeSession, *arguments: Any) -> SentTask:
        if error := next(errors, None):
            raise error
        return send_task(session, *arguments)

    monkeypatch.setattr(EdgeSession, "send_task", failing)
    with streaming(listener, reply_to) as (stream, _):
        assert values(submit(stream, 1)) == [2.0]


def test_an_internal_error_of_reconnecting_fails_the_tasks(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    def reopen() -> EdgeSession:
        raise AttributeError("no such thing")

    cloud = ScriptedCloud(listener, die)
    server = threading.Thread(target=cloud.serve, daemon=True)
    server.start()
    with TaskStream(EdgeSession.open(*listener.getsockname()), reopen) as stream:
        with pytest.raises(InternalError, match="internal error: AttributeError: no such thing"):
            submit(stream, 1)[0].result(WAIT_S)
    stop_accepting(listener)
    server.join()
    assert "Traceback" in caplog.text


def test_replies_in_any_order_find_their_tasks(listener: socket.socket) -> None:
    waiting: list[Received] = []

    def reversed_order(connection: Connection, received: Received) -> None:
        waiting.append(received._replace(arrays=tuple(array.copy() for array in received.arrays)))
        if len(waiting) == 3:
            for one in reversed(waiting):
                reply_to(connection, one)

    with streaming(listener, reversed_order) as (stream, _):
        assert values(submit(stream, 7, 8, 9)) == [14.0, 16.0, 18.0]
        assert not stream.sending_bytes


def test_a_task_refused_by_a_busy_cloud_is_retried(listener: socket.socket) -> None:
    refusals = iter([True, True, False])

    def busy_twice(connection: Connection, received: Received) -> None:
        if next(refusals):
            connection.send(ErrorReply("busy", "64 tasks wait", 1.0), task=received.task)
        else:
            reply_to(connection, received)

    with streaming(listener, busy_twice) as (stream, cloud):
        (answer,) = submit(stream, 1)
        assert values([answer]) == [2.0]
        assert answer.result().retries == 2
        assert cloud.tasks == [1, 1, 1]


def test_a_reply_with_impossible_durations_loses_the_connection(listener: socket.socket) -> None:
    def lie(connection: Connection, received: Received) -> None:
        connection.send(Reply(1e9, 0.0, 0.0, 0.0), [received.arrays[0]], received.task)

    with streaming(listener, lie, reply_to) as (stream, cloud):
        assert values(submit(stream, 1)) == [2.0]
        assert cloud.tasks == [1, 1]


def test_a_refused_task_fails_alone(listener: socket.socket) -> None:
    def refuse_the_second(connection: Connection, received: Received) -> None:
        if received.task == 2:
            connection.send(ErrorReply("internal", "it broke"), task=2)
        else:
            reply_to(connection, received)

    with streaming(listener, refuse_the_second) as (stream, _):
        first, second, third = submit(stream, 1, 2, 3)
        assert values([first, third]) == [2.0, 6.0]
        with pytest.raises(RemoteError, match="it broke"):
            second.result(WAIT_S)


def test_tasks_of_a_lost_connection_are_retried_and_replied_once(listener: socket.socket) -> None:
    def reply_to_one_and_die(connection: Connection, received: Received) -> None:
        if received.task == 1:
            reply_to(connection, received)
        else:
            raise PeerGoneError("the script ends here")

    with streaming(listener, reply_to_one_and_die, reply_to) as (stream, cloud):
        assert values(submit(stream, 1)) == [2.0]  # else its reply may be lost with the connection
        answers = submit(stream, 2, 3, 4)
        assert values(answers) == [4.0, 6.0, 8.0]
        assert cloud.prepared == ["le_net"]  # the weights are compared again before any tensor is sent
        assert answers[0].result().retries == 1
        assert cloud.tasks.count(1) == 1


def test_a_silent_cloud_is_disconnected(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosurgeon.net.session.SILENCE_S", 0.05)
    server = threading.Thread(target=ScriptedCloud(listener, lambda connection, received: None).serve, daemon=True)
    server.start()
    session = EdgeSession.open(*listener.getsockname())
    with TaskStream(session, Mock(side_effect=ConnectError("away")), reconnect_timeout_s=None) as stream:
        (answer,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="timed out"):
            answer.result(WAIT_S)
    stop_accepting(listener)
    server.join()


def test_a_lost_task_fails_with_the_cause_of_the_loss(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = threading.Semaphore(0)

    def reopen() -> EdgeSession:
        attempts.release()
        raise ConnectError("away")

    def warn_late(*arguments: Any) -> None:  # when the first attempt has failed
        assert attempts.acquire(timeout=WAIT_S) and attempts.acquire(timeout=WAIT_S)

    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    monkeypatch.setattr("neurosurgeon.edge.link_thread.log.warning", warn_late)
    server = threading.Thread(target=ScriptedCloud(listener, die).serve, daemon=True)
    server.start()
    with TaskStream(EdgeSession.open(*listener.getsockname()), reopen, reconnect_timeout_s=None) as stream:
        (answer,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="the cloud disconnected: .*closed the connection"):
            answer.result(2 * WAIT_S)
    stop_accepting(listener)
    server.join()


def test_a_second_reply_to_a_task_is_dropped(listener: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    def stammer(connection: Connection, received: Received) -> None:
        reply_to(connection, received)
        reply_to(connection, received)

    with streaming(listener, stammer) as (stream, _):
        assert values(submit(stream, 1)) == [2.0]
        assert values(submit(stream, 2)) == [4.0]
    assert "dropped" in caplog.text


def test_other_weights_after_a_reconnect_fail_their_tasks(listener: socket.socket) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    with streaming(listener, die, reply_to) as (stream, cloud):
        cloud.digest = "another digest"
        (answer,) = submit(stream, 1)
        with pytest.raises(WeightsError, match="different weights of le_net"):
            answer.result(WAIT_S)
        with pytest.raises(WeightsError, match="different weights of le_net"):
            submit(stream, 2)[0].result(WAIT_S)
        assert cloud.tasks == [1]


def test_an_unreachable_cloud_fails_its_tasks_at_the_timeout(listener: socket.socket) -> None:
    def leave_for_good(connection: Connection, received: Received) -> None:
        stop_accepting(listener)
        raise PeerGoneError("the script ends here")

    with streaming(listener, leave_for_good, reconnect_timeout_s=0.0) as (stream, _):
        for answer in submit(stream, 1, 2):
            with pytest.raises(ConnectError, match="the cloud is unreachable"):
                answer.result(WAIT_S)


def test_without_a_timeout_tasks_fail_at_once_then_it_reconnects(listener: socket.socket) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    with streaming(listener, die, reply_to, reconnect_timeout_s=None) as (stream, cloud):
        assert stream.takes_tasks
        (lost,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="the cloud disconnected"):
            lost.result(WAIT_S)
        while not stream.takes_tasks:
            threading.Event().wait(0.001)
        assert values(submit(stream, 2)) == [4.0]
        assert cloud.tasks == [1, 2]
        assert cloud.prepared == ["le_net"]


def test_a_reconnected_cloud_gets_one_task_until_its_first_reply(listener: socket.socket) -> None:
    may_reply = threading.Event()

    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    def reply_late(connection: Connection, received: Received) -> None:
        assert may_reply.wait(WAIT_S)
        reply_to(connection, received)

    with streaming(listener, die, reply_late, reconnect_timeout_s=None) as (stream, _):
        (lost,) = submit(stream, 1)
        with pytest.raises(ConnectError):
            lost.result(WAIT_S)
        while not stream.takes_tasks:
            threading.Event().wait(0.001)
        trial = submit(stream, 2)
        assert not stream.takes_tasks
        may_reply.set()
        assert values(trial) == [4.0]
        assert stream.takes_tasks


def test_without_a_timeout_no_task_waits_for_a_reconnect(listener: socket.socket) -> None:
    def leave_for_good(connection: Connection, received: Received) -> None:
        stop_accepting(listener)
        raise PeerGoneError("the script ends here")

    with streaming(listener, leave_for_good, reconnect_timeout_s=None) as (stream, _):
        for task in (1, 2, 3):
            with pytest.raises(ConnectError, match=r"the cloud (disconnected|is unreachable)"):
                submit(stream, task)[0].result(WAIT_S)
            assert not stream.takes_tasks


def test_a_name_that_no_longer_resolves_is_an_unreachable_cloud(listener: socket.socket) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    def reopen() -> EdgeSession:
        raise UsageError("address 'cloud' cannot be resolved")

    cloud = ScriptedCloud(listener, die)
    server = threading.Thread(target=cloud.serve, daemon=True)
    server.start()
    with TaskStream(EdgeSession.open(*listener.getsockname()), reopen, reconnect_timeout_s=0.0) as stream:
        with pytest.raises(ConnectError, match="is unreachable: address 'cloud'"):
            submit(stream, 1)[0].result(WAIT_S)
    stop_accepting(listener)
    server.join()


def test_a_task_that_crashes_the_cloud_each_time_fails(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    monkeypatch.setattr(link_thread, "MAX_LOSSES", 2)
    with streaming(listener, die) as (stream, cloud):
        (answer,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="disconnected 3 times"):
            answer.result(WAIT_S)
        assert cloud.tasks == [1, 1, 1]


def test_a_task_that_crashes_the_cloud_fails_alone(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    def die_of_the_second(connection: Connection, received: Received) -> None:
        if received.task == 2:
            raise PeerGoneError("the script ends here")
        reply_to(connection, received)

    monkeypatch.setattr(link_thread, "MAX_LOSSES", 1)
    with streaming(listener, die_of_the_second) as (stream, cloud):
        answers = submit(stream, 1, 2, 3, 4, 5)
        with pytest.raises(ConnectError, match="disconnected 2 times"):
            answers.pop(1).result(WAIT_S)
        assert values(answers) == [2.0, 6.0, 8.0, 10.0]
        assert cloud.tasks.count(2) == 2


def test_a_tensor_that_cannot_be_sent_costs_no_connection(listener: socket.socket) -> None:
    with streaming(listener, reply_to) as (stream, cloud):
        first = submit_one(stream, 1, np.zeros(1, np.uint32))
        with pytest.raises(ProtocolError):
            first.result(WAIT_S)
        assert values(submit(stream, 2)) == [4.0]
        assert cloud.prepared == []


def test_an_overdue_reply_despite_heartbeats_loses_the_cloud(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(connection: Connection, received: Received) -> None:
        monkeypatch.setattr(link_thread, "REPLY_TIMEOUT_S", -1.0)
        connection.send(Pong(0))

    def remember(connection: Connection, received: Received) -> None:
        monkeypatch.undo()
        reply_to(connection, received)

    with streaming(listener, forget, remember) as (stream, cloud):
        assert values(submit(stream, 1)) == [2.0]
        assert cloud.tasks == [1, 1]


def test_closing_fails_tasks_without_a_reply(listener: socket.socket) -> None:
    with streaming(listener, lambda connection, received: None) as (stream, _):
        (answer,) = submit(stream, 1)
    with pytest.raises(NetworkError, match="closed"):
        answer.result(0)
    with pytest.raises(ValueError, match="closed"):
        submit(stream, 2)


@pytest.mark.parametrize("hint_ms", [float("nan"), -5.0, 1e30])
def test_a_senseless_retry_after_is_bounded(
    listener: socket.socket, hint_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_thread, "MAX_RETRY_MS", 20.0)
    hints = iter([True, False])

    def busy_once(connection: Connection, received: Received) -> None:
        if next(hints):
            connection.send(ErrorReply("busy", "later", hint_ms), task=received.task)
        else:
            reply_to(connection, received)

    with streaming(listener, busy_once) as (stream, _):
        assert values(submit(stream, 1)) == [2.0]


def test_a_withdrawn_task_in_flight_still_gets_its_reply(listener: socket.socket) -> None:
    may_reply = threading.Event()

    def reply_late(connection: Connection, received: Received) -> None:
        assert may_reply.wait(WAIT_S)
        reply_to(connection, received)

    with streaming(listener, reply_late) as (stream, cloud):
        (sent,) = submit(stream, 1)
        while not cloud.tasks:
            threading.Event().wait(0.001)
        assert stream.withdraw(1)
        may_reply.set()
        assert values([sent]) == [2.0]
        assert not stream.withdraw(1)
        assert not stream.sending_bytes


def test_a_withdrawn_task_is_not_sent_again_to_a_busy_cloud(listener: socket.socket) -> None:
    may_reply = threading.Event()

    def refuse_late(connection: Connection, received: Received) -> None:
        assert may_reply.wait(WAIT_S)
        connection.send(ErrorReply("busy", "64 tasks wait", 1.0), task=received.task)

    with streaming(listener, refuse_late) as (stream, cloud):
        (sent,) = submit(stream, 1)
        while not cloud.tasks:
            threading.Event().wait(0.001)
        assert stream.withdraw(1)
        may_reply.set()
        with pytest.raises(BusyError):
            sent.result(WAIT_S)
        assert cloud.tasks == [1]


def test_the_stream_reports_transfer_progress(listener: socket.socket) -> None:
    may_read = threading.Event()

    def read_later(connection: Connection, received: Received) -> None:
        assert may_read.wait(WAIT_S)
        reply_to(connection, received)

    with streaming(listener, read_later) as (stream, _):
        if stream.progress() is None:
            pytest.skip("this system does not report acknowledged bytes")
        large = np.zeros(8_000_000, np.float32)
        answers = [submit_one(stream, task, large) for task in (1, 2)]
        progress = stream.progress()
        assert progress is not None
        assert progress.left_bytes[2] - progress.left_bytes[1] == pytest.approx(large.nbytes, rel=0.01)
        may_read.set()
        for answer in answers:
            answer.result(WAIT_S)
        assert stream.progress() is not None and not stream.progress().left_bytes  # type: ignore[union-attr]
