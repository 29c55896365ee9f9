"""The link: what its sender does next, and clouds that reorder, refuse, forget, die and come back."""

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
from neurosurgeon.edge.link_thread import (
    Answered,
    Flight,
    LinkState,
    Reconnect,
    Send,
    TaskStream,
    Wait,
    next_action,
)
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
    """Answer a task with the double of its tensor."""
    connection.send(Reply(0.0, 0.0, 0.0, 0.0), [received.arrays[0] * 2], received.task)


class ScriptedCloud:
    """A cloud whose conversations follow one script each, the last one for all that come later."""

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
    """A stream to a scripted cloud; both are gone after the block."""
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


def submit_one(stream: TaskStream, task: int, array: Array, request: Request = REQUEST) -> Future[Answered]:
    answer: Future[Answered] = Future()

    def take(outcome: Answered | NeurosurgeonError) -> None:
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


# ---------------------------------------------------------------- what the sender does next

NOW_MS = 1_000.0


def flight(task: int, **fields: Any) -> Flight:
    """Return a task of one byte that is due at once."""
    return Flight(task, REQUEST, [], pytest.fail, 1, **fields)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([], Wait(None)),
        ([flight(1), flight(2)], Send(1)),
        ([flight(1, is_out=True), flight(2)], Send(2)),
        ([flight(1, is_out=True)], Wait(None)),
        ([flight(1, due_ms=NOW_MS + 30), flight(2)], Send(2)),
        ([flight(1, due_ms=NOW_MS + 30), flight(2, due_ms=NOW_MS + 20)], Wait(20.0)),
        ([flight(1), flight(2, losses=1)], Send(2)),  # it goes alone
        ([flight(1, is_out=True), flight(2, losses=1)], Wait(None)),
        ([flight(1), flight(2, losses=1, is_out=True)], Wait(None)),
    ],
)
def test_the_task_that_is_due_first_is_sent_and_suspects_alone(
    tasks: list[Flight], expected: Send | Wait | Reconnect
) -> None:
    assert next_action(LinkState(True, 0.0, tasks), NOW_MS) == expected


def test_a_lost_cloud_is_looked_for_after_its_pause() -> None:
    assert next_action(LinkState(False, 0.0, [flight(1)]), NOW_MS) == Reconnect()
    assert next_action(LinkState(False, 50.0, [flight(1)]), NOW_MS) == Wait(50.0)


# ---------------------------------------------------------------- at work


def test_a_sender_without_memory_loses_the_connection_but_no_task(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_task = EdgeSession.send_task
    errors = iter([MemoryError()])

    def failing(session: EdgeSession, *arguments: Any) -> SentTask:
        if error := next(errors, None):
            raise error
        return send_task(session, *arguments)

    monkeypatch.setattr(EdgeSession, "send_task", failing)
    with streaming(listener, reply_to) as (stream, _):
        assert values(submit(stream, 1)) == [2.0]


def test_a_defect_in_looking_for_the_cloud_fails_what_waits_for_it(
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


def test_answers_in_any_order_find_their_tasks(listener: socket.socket) -> None:
    waiting: list[Received] = []

    def reversed_order(connection: Connection, received: Received) -> None:
        waiting.append(received._replace(arrays=tuple(array.copy() for array in received.arrays)))
        if len(waiting) == 3:
            for one in reversed(waiting):
                reply_to(connection, one)

    with streaming(listener, reversed_order) as (stream, _):
        assert values(submit(stream, 7, 8, 9)) == [14.0, 16.0, 18.0]
        assert not stream.sending_bytes


def test_a_busy_cloud_is_asked_again(listener: socket.socket) -> None:
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


def test_an_answer_that_cannot_be_true_is_a_lost_connection(listener: socket.socket) -> None:
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


def test_tasks_of_a_lost_connection_are_sent_again_and_answered_once(listener: socket.socket) -> None:
    def answer_one_and_die(connection: Connection, received: Received) -> None:
        if received.task == 1:
            reply_to(connection, received)
        else:
            raise PeerGoneError("the script ends here")

    with streaming(listener, answer_one_and_die, reply_to) as (stream, cloud):
        assert values(submit(stream, 1)) == [2.0]  # else its answer may be lost with the connection
        answers = submit(stream, 2, 3, 4)
        assert values(answers) == [4.0, 6.0, 8.0]
        assert cloud.prepared == ["le_net"]  # the weights are compared again before any tensor is sent
        assert answers[0].result().retries == 1
        assert cloud.tasks.count(1) == 1


def test_a_silent_cloud_is_lost(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosurgeon.net.session.SILENCE_S", 0.05)
    server = threading.Thread(target=ScriptedCloud(listener, lambda connection, received: None).serve, daemon=True)
    server.start()
    session = EdgeSession.open(*listener.getsockname())
    with TaskStream(session, Mock(side_effect=ConnectError("away")), patience_s=None) as stream:
        (answer,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="sent nothing"):
            answer.result(WAIT_S)
    stop_accepting(listener)
    server.join()


def test_a_lost_task_fails_with_its_cause_however_soon_the_cloud_is_looked_for(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = threading.Semaphore(0)

    def reopen() -> EdgeSession:
        attempts.release()
        raise ConnectError("away")

    def warn_late(*what: Any) -> None:  # when the first attempt has failed
        assert attempts.acquire(timeout=WAIT_S) and attempts.acquire(timeout=WAIT_S)

    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    monkeypatch.setattr("neurosurgeon.edge.link_thread.log.warning", warn_late)
    server = threading.Thread(target=ScriptedCloud(listener, die).serve, daemon=True)
    server.start()
    with TaskStream(EdgeSession.open(*listener.getsockname()), reopen, patience_s=None) as stream:
        (answer,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="the cloud is lost: .*closed the connection"):
            answer.result(2 * WAIT_S)
    stop_accepting(listener)
    server.join()


def test_an_answer_that_comes_twice_counts_once(listener: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    def stammer(connection: Connection, received: Received) -> None:
        reply_to(connection, received)
        reply_to(connection, received)

    with streaming(listener, stammer) as (stream, _):
        assert values(submit(stream, 1)) == [2.0]
        assert values(submit(stream, 2)) == [4.0]
    assert "dropped" in caplog.text


def test_other_weights_behind_a_new_connection_fail_their_tasks(listener: socket.socket) -> None:
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


def test_a_cloud_that_stays_away_fails_its_tasks(listener: socket.socket) -> None:
    def leave_for_good(connection: Connection, received: Received) -> None:
        stop_accepting(listener)
        raise PeerGoneError("the script ends here")

    with streaming(listener, leave_for_good, patience_s=0.0) as (stream, _):
        for answer in submit(stream, 1, 2):
            with pytest.raises(ConnectError, match="the cloud stays away"):
                answer.result(WAIT_S)


def test_where_tasks_are_not_kept_they_fail_at_once_and_the_cloud_is_found_again(listener: socket.socket) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    with streaming(listener, die, reply_to, patience_s=None) as (stream, cloud):
        assert stream.takes_tasks
        (lost,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="the cloud is lost"):
            lost.result(WAIT_S)
        while not stream.takes_tasks:
            threading.Event().wait(0.001)
        assert values(submit(stream, 2)) == [4.0]
        assert cloud.tasks == [1, 2]
        assert cloud.prepared == ["le_net"]


def test_a_cloud_that_is_back_gets_one_task_until_it_has_answered(listener: socket.socket) -> None:
    may_answer = threading.Event()

    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    def answer_late(connection: Connection, received: Received) -> None:
        assert may_answer.wait(WAIT_S)
        reply_to(connection, received)

    with streaming(listener, die, answer_late, patience_s=None) as (stream, _):
        (lost,) = submit(stream, 1)
        with pytest.raises(ConnectError):
            lost.result(WAIT_S)
        while not stream.takes_tasks:
            threading.Event().wait(0.001)
        trial = submit(stream, 2)
        assert not stream.takes_tasks
        may_answer.set()
        assert values(trial) == [4.0]
        assert stream.takes_tasks


def test_while_the_cloud_is_away_nothing_waits_for_it(listener: socket.socket) -> None:
    def leave_for_good(connection: Connection, received: Received) -> None:
        stop_accepting(listener)
        raise PeerGoneError("the script ends here")

    with streaming(listener, leave_for_good, patience_s=None) as (stream, _):
        for task in (1, 2, 3):
            with pytest.raises(ConnectError, match=r"the cloud (is lost|stays away)"):
                submit(stream, task)[0].result(WAIT_S)
            assert not stream.takes_tasks


def test_a_name_that_resolves_no_more_is_a_cloud_that_is_away(listener: socket.socket) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    def reopen() -> EdgeSession:
        raise UsageError("address 'cloud' cannot be resolved")

    cloud = ScriptedCloud(listener, die)
    server = threading.Thread(target=cloud.serve, daemon=True)
    server.start()
    with TaskStream(EdgeSession.open(*listener.getsockname()), reopen, patience_s=0.0) as stream:
        with pytest.raises(ConnectError, match="stays away: address 'cloud'"):
            submit(stream, 1)[0].result(WAIT_S)
    stop_accepting(listener)
    server.join()


def test_a_task_that_takes_every_connection_down_is_given_up(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(connection: Connection, received: Received) -> None:
        raise PeerGoneError("the script ends here")

    monkeypatch.setattr(link_thread, "MAX_LOSSES", 2)
    with streaming(listener, die) as (stream, cloud):
        (answer,) = submit(stream, 1)
        with pytest.raises(ConnectError, match="was lost 3 times"):
            answer.result(WAIT_S)
        assert cloud.tasks == [1, 1, 1]


def test_a_task_that_takes_the_cloud_down_costs_no_other_its_answer(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die_of_the_second(connection: Connection, received: Received) -> None:
        if received.task == 2:
            raise PeerGoneError("the script ends here")
        reply_to(connection, received)

    monkeypatch.setattr(link_thread, "MAX_LOSSES", 1)
    with streaming(listener, die_of_the_second) as (stream, cloud):
        answers = submit(stream, 1, 2, 3, 4, 5)
        with pytest.raises(ConnectError, match="was lost 2 times"):
            answers.pop(1).result(WAIT_S)
        assert values(answers) == [2.0, 6.0, 8.0, 10.0]
        assert cloud.tasks.count(2) == 2


def test_a_tensor_that_cannot_be_sent_costs_no_connection(listener: socket.socket) -> None:
    with streaming(listener, reply_to) as (stream, cloud):
        first = submit_one(stream, 1, np.zeros(1, np.complex64))
        with pytest.raises(ProtocolError):
            first.result(WAIT_S)
        assert values(submit(stream, 2)) == [4.0]
        assert cloud.prepared == []


def test_a_cloud_that_lives_but_forgets_a_task_is_left(
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


def test_closing_fails_what_has_no_answer(listener: socket.socket) -> None:
    with streaming(listener, lambda connection, received: None) as (stream, _):
        (answer,) = submit(stream, 1)
    with pytest.raises(NetworkError, match="closed"):
        answer.result(0)
    with pytest.raises(ValueError, match="closed"):
        submit(stream, 2)


@pytest.mark.parametrize("hint_ms", [float("nan"), -5.0, 1e30])
def test_a_senseless_hint_is_bounded(listener: socket.socket, hint_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_thread, "MAX_RETRY_MS", 20.0)
    hints = iter([True, False])

    def busy_once(connection: Connection, received: Received) -> None:
        if next(hints):
            connection.send(ErrorReply("busy", "later", hint_ms), task=received.task)
        else:
            reply_to(connection, received)

    with streaming(listener, busy_once) as (stream, _):
        assert values(submit(stream, 1)) == [2.0]


def test_a_task_that_was_withdrawn_is_not_sent_or_its_answer_still_comes(listener: socket.socket) -> None:
    may_answer = threading.Event()

    def answer_late(connection: Connection, received: Received) -> None:
        assert may_answer.wait(WAIT_S)
        reply_to(connection, received)

    with streaming(listener, answer_late) as (stream, cloud):
        (sent,) = submit(stream, 1)
        while not cloud.tasks:
            threading.Event().wait(0.001)
        assert stream.withdraw(1)
        may_answer.set()
        assert values([sent]) == [2.0]
        assert not stream.withdraw(1)
        assert not stream.sending_bytes


def test_a_withdrawn_task_is_not_sent_again_to_a_busy_cloud(listener: socket.socket) -> None:
    may_answer = threading.Event()

    def refuse_late(connection: Connection, received: Received) -> None:
        assert may_answer.wait(WAIT_S)
        connection.send(ErrorReply("busy", "64 tasks wait", 1.0), task=received.task)

    with streaming(listener, refuse_late) as (stream, cloud):
        (sent,) = submit(stream, 1)
        while not cloud.tasks:
            threading.Event().wait(0.001)
        assert stream.withdraw(1)
        may_answer.set()
        with pytest.raises(BusyError):
            sent.result(WAIT_S)
        assert cloud.tasks == [1]


def test_the_stream_tells_how_far_its_tensors_are(listener: socket.socket) -> None:
    may_read = threading.Event()

    def read_later(connection: Connection, received: Received) -> None:
        assert may_read.wait(WAIT_S)
        reply_to(connection, received)

    with streaming(listener, read_later) as (stream, _):
        if stream.crossing() is None:
            pytest.skip("this system does not tell what was acknowledged")
        large = np.zeros(8_000_000, np.float32)
        answers = [submit_one(stream, task, large) for task in (1, 2)]
        crossing = stream.crossing()
        assert crossing is not None
        assert crossing.left_bytes[2] - crossing.left_bytes[1] == pytest.approx(large.nbytes, rel=0.01)
        may_read.set()
        for answer in answers:
            answer.result(WAIT_S)
        assert stream.crossing() is not None and not stream.crossing().left_bytes  # type: ignore[union-attr]
