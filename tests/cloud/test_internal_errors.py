"""An internal error in each step of a task: it costs that task alone, and the log says where it is."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import tasks_edge_api
from neurosurgeon.cloud import executor
from neurosurgeon.cloud.conversation import Conversation
from neurosurgeon.cloud.events import CloudEvent, TaskLines
from neurosurgeon.edge import link_thread, results
from neurosurgeon.edge import queue as edge_queue
from neurosurgeon.engine.torch_engine import TorchPartition
from neurosurgeon.net import connection, session
from neurosurgeon.net.connection import Connection
from neurosurgeon.net.frames import Kind
from neurosurgeon.net.messages import Reply, Request
from neurosurgeon.net.wire import SocketWire
from neurosurgeon.predictor.places import config_path
from neurosurgeon.reports.queue_report import QueueReport
from neurosurgeon.utils import load
from neurosurgeon.utils.metrics import Metrics
from tests.faults import write_slow_edge
from tests.net.clouds import MODEL, Cloud

TASKS, BROKEN = 8, 4  # the number of tasks, and the task that meets the error
ERROR = "AttributeError: 'NoneType' object has no attribute 'shape'"
Install = Callable[[pytest.MonkeyPatch], None]


def fail() -> None:
    raise AttributeError(ERROR.partition(": ")[2])


def when(owner: Any, name: str, task_of: Callable[..., int]) -> Install:
    """Return a change that lets a function fail once, when it works for the broken task."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        real, pending = getattr(owner, name), [BROKEN]

        def failing(*arguments: Any, **named: Any) -> Any:
            if task_of(*arguments, **named) in pending:
                pending.clear()
                fail()
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, failing)

    return install


def at_call(owner: Any, name: str, thread: str = "") -> Install:
    """Return a change that lets a function fail at one of its calls: which task that is depends on the threads.

    Args: thread: the beginning of the names of the threads whose calls count.
    """

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        calls = itertools.count(1)

        def number(*arguments: Any) -> int:
            return next(calls) if threading.current_thread().name.startswith(thread) else 0

        when(owner, name, number)(monkeypatch)

    return install


def packing(kind: type) -> Install:
    """Return a change that lets the packing of a message of one kind fail."""

    def task_of(message: Any, arrays: Sequence[Any] = (), task: int = 0) -> int:
        return task * isinstance(message, kind)

    return when(connection, "pack_message", task_of)


def reading(kind: type) -> Install:
    """Return a change that lets the receiving of a message of one kind fail, after its head."""
    expected = Kind.REPLY if kind is Reply else Kind.REQUEST

    def task_of(connection: Connection, start_s: float) -> int:
        return connection.reading * (connection._head[5] == expected)

    return when(Connection, "_read_outline", task_of)


def sending(kind: type) -> Install:
    """Return a change that lets the sending of a message of one kind fail once, with a part of its frame sent."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        send, send_pieces = Connection.send, SocketWire.send
        chosen: list[SocketWire] = []
        pending = [BROKEN]

        def choosing(connection: Connection, message: Any, arrays: Any = (), task: int = 0, *more: Any) -> None:
            if isinstance(message, kind) and task in pending:
                pending.clear()
                chosen.append(connection._link)
            send(connection, message, arrays, task, *more)

        def failing(wire: SocketWire, pieces: Any, deadline_s: float) -> None:
            if wire in chosen:
                chosen.clear()
                send_pieces(wire, [memoryview(pieces[0])[:40]], deadline_s)
                fail()
            send_pieces(wire, pieces, deadline_s)

        monkeypatch.setattr(Connection, "send", choosing)
        monkeypatch.setattr(SocketWire, "send", failing)

    return install


@pytest.fixture
def run_queue(cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Run a queue whose tasks all go to the cloud, and return its document."""

    def run(*flags: str, code: int = 0) -> dict[str, Any]:
        arguments = ["-p", str(cloud.address[1]), "--monitor-port", "1", "-t", MODEL, "--tasks", str(TASKS)]
        arguments += ["--bandwidth", "1000", "--rtt", "0.1", "--no-correction", "--json"]
        arguments += ["--edge-config", str(write_slow_edge(tmp_path / "slow.json"))]
        arguments += ["--cloud-config", str(config_path("cloud")), "--predictor", "linear", *flags]
        assert tasks_edge_api.main(arguments) == code
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


def errors_of(document: dict[str, Any]) -> dict[int, str]:
    """Return the errors by task; every task has a result, and all that were answered have the same output."""
    tasks = document["tasks"]
    assert sorted(task["id"] for task in tasks) == list(range(1, TASKS + 1))
    answered = [task for task in tasks if task["error"] is None]
    assert len({task["output_digest"] for task in answered}) == 1
    assert {task["where"] for task in answered} == {"cloud"}
    return {task["id"]: task["error"] for task in tasks if task["error"]}


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages of the log with a traceback of the error."""
    failed = [record for record in caplog.records if record.exc_info]
    assert {record.levelno for record in failed} <= {logging.ERROR}
    return [record.getMessage() for record in failed if ERROR in caplog.handler.format(record)]


ON_THE_EDGE = {
    "submitting": when(link_thread.TaskStream, "submit", lambda stream, task, *more: task),
    "packing": packing(Request),
    "sending": when(session.EdgeSession, "send_task", lambda session, task, *more: task),
    "reading the reply": when(session.EdgeSession, "result_of", lambda session, received, sent: received.task),
    "using the reply": when(edge_queue.QueueRun, "_update_estimates", lambda run, task, reply: task.id),
    "making the result": when(results.Results, "_result_of_reply", lambda results, task, reply: task.id),
    "reporting": when(QueueReport, "_task_done", lambda report, result: result.task.id),
}
INSIDE_A_FRAME = {"request sent in part": sending(Request), "reply received in part": reading(Reply)}


@pytest.mark.parametrize("step", [*ON_THE_EDGE, *INSIDE_A_FRAME])
@pytest.mark.parametrize("in_flight", ["1", "2"])
def test_an_error_on_the_edge_fails_its_task_alone(
    step: str,
    in_flight: str,
    cloud: Cloud,
    run_queue: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    {**ON_THE_EDGE, **INSIDE_A_FRAME}[step](monkeypatch)
    document = run_queue("--on-cloud-loss", "retry", "--in-flight", in_flight, code=1)
    assert errors_of(document) == {BROKEN: f"internal error: {ERROR}"}
    (logged,) = tracebacks(caplog)
    assert f"task {BROKEN} ({MODEL})" in logged
    assert cloud.events.count(CloudEvent.CONNECTED) == 1 + (step in INSIDE_A_FRAME)


IN_THE_CLOUD = {
    "taking the request": when(Conversation, "_submit", lambda talk, request, received, arrived_ms: received.task),
    "computing": at_call(TorchPartition, "run", "compute"),
    "joining a batch": at_call(executor, "run_batch"),
    "counting": at_call(load.LoadMeter, "ended"),
    "making the reply": when(Conversation, "_send_content", lambda talk, unsent: unsent.received.task),
    "packing the reply": packing(Reply),
    "request read in part": reading(Request),
}


@pytest.mark.parametrize("step", IN_THE_CLOUD)
def test_an_error_in_the_cloud_fails_its_task_alone(
    step: str,
    cloud: Cloud,
    run_queue: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    IN_THE_CLOUD[step](monkeypatch)
    document = run_queue("--on-cloud-loss", "retry", "--in-flight", "2", code=1)
    (error,) = errors_of(document).values()
    assert error == "the cloud answered: internal error: the task failed in the cloud; its log says why"
    (logged,) = tracebacks(caplog)
    assert "task " in logged and "of 127.0.0.1:" in logged
    assert step == "request read in part" or f"({MODEL})" in logged
    assert cloud.events.count(CloudEvent.CONNECTED) == 1 + (step == "request read in part")


AFTER_A_REPLY = {
    "showing it": when(Conversation, "_record", lambda talk, received, sent: received.task),
    "showing that a task came": at_call(TaskLines, "arrived"),
    "keeping it": at_call(executor.CloudResult, "copy"),
    "counting it": at_call(Metrics, "batch"),
    "reply sent in part": sending(Reply),
}


@pytest.mark.parametrize("step", AFTER_A_REPLY)
def test_an_error_after_a_reply_costs_no_task(
    step: str,
    cloud: Cloud,
    run_queue: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    AFTER_A_REPLY[step](monkeypatch)
    assert errors_of(run_queue("--on-cloud-loss", "retry", "--in-flight", "2")) == {}
    cloud.stop()  # the work after the last reply is done
    (logged,) = tracebacks(caplog)
    assert step != "reply sent in part" or logged.split(": ")[0].endswith(f"/{BROKEN} ({MODEL})")
    assert cloud.events.count(CloudEvent.CONNECTED) == 1 + (step == "reply sent in part")
