"""A queue on the edge: every task has exactly one result, also if the cloud disconnects."""

from __future__ import annotations

import io
import itertools
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.edge import queue as edge_queue
from neurosurgeon.edge.cuts import QueueModel
from neurosurgeon.edge.inputs import NetworkInputs, inputs_ahead
from neurosurgeon.edge.link_actions import LinkReply, OnReply
from neurosurgeon.edge.link_thread import TaskStream
from neurosurgeon.edge.queue import QueueRun
from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.edge.stages import StageKeys
from neurosurgeon.engine.torch_engine import TorchPartition
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.link_watch import LinkNow, LinkWatch
from neurosurgeon.net.messages import Prepare, Request
from neurosurgeon.net.session import EdgeSession, OnCloudLoss, RemoteResult
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.hedge import Hedging
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.reports.queue_report import QueueReport
from neurosurgeon.utils.errors import ConnectError, NeurosurgeonError, RemoteError, WeightsError
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.timing import now_ms
from tests.edge.test_cuts import FASTER, INPUTS, LATENCIES, LINK, MODEL, queue_model
from tests.equality import whole_digest
from tests.faults import FaultProxy
from tests.networks import load_network, model_graph


class FailingStream:
    """A stream whose tasks fail at once with the given errors, one after the other."""

    reconnects = False

    def __init__(self, *errors: NeurosurgeonError) -> None:
        self.errors = list(errors)
        self.submitted: list[int] = []

    @property
    def takes_tasks(self) -> bool:
        return not self.submitted or self.reconnects

    def pace_first_task(self, link: LinkEstimate) -> None:
        pass

    def submit(self, task: int, request: Request, tensors: Any, on_reply: OnReply, losses: int = 0) -> None:
        self.submitted.append(task)
        on_reply(self.errors.pop(0))


def run_queue(stream: Any, count: int, in_flight: int = 2, **how: Any) -> tuple[list[Any], str]:
    tasks = [QueuedTask(number, MODEL) for number in range(1, count + 1)]
    settings = QueueSettings({}, learns=False, in_flight=in_flight, **how)
    out = io.StringIO()
    with QueueReport(out) as report:
        watch = LinkWatch("nowhere", 1, LINK)
        results = QueueRun(settings, {MODEL: queue_model()}, stream, watch, report).run(tasks)
    return results, out.getvalue()


@pytest.mark.parametrize("in_flight", [1, 3])
def test_after_a_loss_the_edge_computes_all_tasks(in_flight: int, caplog: pytest.LogCaptureFixture) -> None:
    stream = FailingStream(*(ConnectError("the cloud is unreachable") for _ in range(8)))
    results, _ = run_queue(stream, 8, in_flight)
    expected = whole_digest(MODEL)
    assert sorted(result.task.id for result in results) == list(range(1, 9))
    assert {result.where for result in results} == {"edge"}
    assert {result.output_digest for result in results} == {expected}
    assert len(stream.submitted) == 1
    assert caplog.text.count("is computed on the edge: the cloud is unreachable") == 1


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_loss_with_every_task_loses_no_result(in_flight: int) -> None:
    stream = FailingStream(*(ConnectError("gone") for _ in range(12)))
    stream.reconnects = True
    results, _ = run_queue(stream, 12, in_flight)
    expected = whole_digest(MODEL)
    assert sorted(result.task.id for result in results) == list(range(1, 13))
    assert {(result.where, result.output_digest) for result in results} == {("edge", expected)}
    assert len(stream.submitted) == 12
    assert all(result.elapsed_ms > 0 for result in results)


@pytest.mark.parametrize("how", [OnCloudLoss.RETRY, OnCloudLoss.FAIL])
def test_tasks_that_may_not_run_locally_fail_with_the_cloud(how: OnCloudLoss) -> None:
    stream = FailingStream(*(ConnectError("gone") for _ in range(3)))
    results, _ = run_queue(stream, 3, on_cloud_loss=how)
    assert [result.error for result in results] == ["gone"] * 3
    assert len(stream.submitted) == 3


def test_a_task_that_the_cloud_refuses_fails_alone() -> None:
    stream = FailingStream(RemoteError("it broke"), ConnectError("gone"))
    results, out = run_queue(stream, 3, in_flight=1)
    assert [result.error for result in sorted(results, key=lambda r: r.task.id)] == ["it broke", None, None]
    assert "task 1 of 3 failed : it broke" in out


OUTPUT_SHAPE = model_graph(MODEL).outputs[0].spec.shape


class LateCloud:
    """A stream whose tasks take ``compute_ms`` in the cloud; four others are sent before the reply to each."""

    takes_tasks = True
    later_tasks = 4

    def __init__(self, compute_ms: float, count: int) -> None:
        self.compute_ms = compute_ms
        self.left = count
        self.waiting: list[OnReply] = []

    def progress(self) -> None:
        return None

    def pace_first_task(self, link: LinkEstimate) -> None:
        pass

    def submit(self, task: int, request: Request, tensors: Any, on_reply: OnReply, losses: int = 0) -> None:
        self.waiting.append(on_reply)
        self.left -= 1
        keeps = self.later_tasks if self.left else 0
        while len(self.waiting) > keeps:
            self.waiting.pop(0)(self.reply())

    def reply(self) -> LinkReply:
        output = np.zeros(OUTPUT_SHAPE, np.float32)
        result = RemoteResult((output,), 1.0, self.compute_ms, self.compute_ms, 0.1, 0.0, 1_000)
        return LinkReply(result, now_ms(), now_ms(), 0)


class StalledStream(LateCloud):
    """A stream that replies to its task when the test says so."""

    def __init__(self) -> None:
        super().__init__(1.0, 1)

    def submit(self, task: int, request: Request, tensors: Any, on_reply: OnReply, losses: int = 0) -> None:
        self.waiting.append(on_reply)

    def withdraw(self, task: int) -> bool:
        return True

    def answer(self) -> None:
        self.waiting.pop()(self.reply())


def test_a_late_reply_corrects_its_own_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow_edge = LATENCIES.scaled(1_000.0)  # every task goes to the cloud
    model = QueueModel(load_network(MODEL), slow_edge, FASTER, StageKeys("edge", "transfer", "cloud"), INPUTS)
    tasks = [QueuedTask(number, MODEL) for number in range(1, 41)]
    predicted_ms = sum(FASTER.latency_ms)
    settings = QueueSettings({}, in_flight=8, hedges=False)
    with QueueReport(io.StringIO()) as report:
        stream: Any = LateCloud(1.5 * predicted_ms, len(tasks))
        results = QueueRun(settings, {MODEL: model}, stream, LinkWatch("nowhere", 1, LINK), report).run(tasks)
    assert {result.where for result in results} == {"cloud"}
    assert Corrections.load().factor("cloud") == pytest.approx(1.5)


# ---------------------------------------------------------------- errors of one task


def test_a_task_on_which_the_network_raises_fails_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, calls = TorchPartition.run, itertools.count(1)

    def breaking(*arguments: Any) -> Any:
        if next(calls) == 1:  # task 1 goes to the cloud as it is
            raise ZeroDivisionError("of this image")
        return run(*arguments)

    monkeypatch.setattr(TorchPartition, "run", breaking)
    results, out = run_queue(FailingStream(RemoteError("refused")), 3, in_flight=1)
    error = "internal error: ZeroDivisionError: of this image"
    assert [result.error for result in results] == ["refused", error, None]
    assert f"task 2 of 3 failed : {error}" in out
    (logged,) = (record for record in caplog.records if record.exc_info)
    assert logged.getMessage() == f"task 2 ({MODEL}) failed: {error}"


def test_a_closed_output_ends_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(QueueReport, "_task_done", gone)
    stream = FailingStream(*[RemoteError("refused")] * 1_000)
    with pytest.raises(BrokenPipeError):
        run_queue(stream, 1_000, in_flight=1)


# ---------------------------------------------------------------- a stalled link


SLOW_EDGE = LATENCIES.scaled(20.0)  # in predictions: a cloud that is late for other reasons is not hedged


@pytest.mark.parametrize("in_flight", [1, 3])
def test_stalled_tasks_are_finished_on_the_edge(in_flight: int, cloud: ServiceProcess) -> None:
    network = load_network(MODEL)
    model = QueueModel(network, SLOW_EDGE, FASTER, StageKeys("edge", "transfer", "cloud"), INPUTS)
    tasks = [QueuedTask(number, MODEL) for number in range(1, 1_001)]
    settings = QueueSettings({}, learns=False, in_flight=in_flight)
    begun = itertools.count(1)
    with FaultProxy(cloud.ports[0]) as proxy:
        session, graph = EdgeSession.open("127.0.0.1", proxy.port), network.graph
        session.ask_to_prepare(Prepare(MODEL, pack_nodes(graph, graph.edge_nodes(0)), graph.digest))
        session.wait_until_ready(network.ref.weights_digest)
        with TaskStream(session, pytest.fail) as stream, QueueReport(io.StringIO()) as report:

            def wait_for_the_cloud() -> None:
                while stream.sending_bytes:
                    threading.Event().wait(0.001)

            def stall_from_the_fifth_to_the_tenth() -> bool:
                task = next(begun)
                if task == 5:
                    wait_for_the_cloud()  # a busy one may have a task yet that the edge has finished
                    proxy.flows.clear()
                elif task == 11:
                    proxy.flows.set()
                    wait_for_the_cloud()
                return any(result.where == "cloud" and result.task.id > 10 for result in list(run.results.reported))

            run = QueueRun(settings, {MODEL: model}, stream, LinkWatch("nowhere", 1, LINK), report)
            results = run.run(tasks, stall_from_the_fifth_to_the_tenth)
    assert 10 < len(results) < len(tasks)  # the link is used again
    assert sorted(result.task.id for result in results) == list(range(1, len(results) + 1))
    assert {result.output_digest for result in results} == {whole_digest(MODEL)}
    where = {result.task.id: result.where for result in results}
    assert "edge" in where.values()
    if in_flight == 1:
        assert [where[task] for task in range(5, 11)] == ["edge"] * 6
        stalled = next(result for result in results if result.task.id == 5)
        assert stalled.point == 0
        assert stalled.measured.transfer_ms > 0


class RestoredLink:
    """A link watch whose first estimate is nearly zero, and whose later ones are fast."""

    def __init__(self) -> None:
        self.links = itertools.chain([LinkEstimate(1.0, 0.1)], itertools.repeat(LINK))

    def now(self) -> LinkNow:
        return LinkNow(next(self.links), is_stale=False, queue_ms=0.0)

    def ignore(self, *arguments: Any) -> None:
        pass

    record_transfer = record_load = record_exchange = ignore


@pytest.mark.parametrize(
    ("hedges", "objective", "starts_over"),
    [
        (True, Objective.LATENCY, True),
        (False, Objective.LATENCY, False),
        (True, Objective.THROUGHPUT, False),  # there the cuts of all tasks belong together
    ],
)
def test_a_long_edge_partition_starts_over_if_the_link_recovers(
    hedges: bool, objective: Objective, starts_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_queue, "REPLAN_MS", 0.0)
    model = QueueModel(
        load_network(MODEL), LATENCIES.scaled(1_000.0), FASTER, StageKeys("edge", "transfer", "cloud"), INPUTS
    )
    stream: Any = LateCloud(1.0, 1)
    watch: Any = RestoredLink()
    settings = QueueSettings({}, learns=False, in_flight=1, hedges=hedges, objective=objective)
    with QueueReport(io.StringIO()) as report:
        (result,) = QueueRun(settings, {MODEL: model}, stream, watch, report).run([QueuedTask(1, MODEL)])
    assert (result.where, result.point) == (("cloud", 0) if starts_over else ("edge", len(LATENCIES.latency_ms)))
    assert result.rate_bytes_per_s == (LINK.rate_bytes_per_s if starts_over else 1.0)
    assert result.measured.edge_ms <= result.spans[0].end_ms - result.spans[0].start_ms  # the dropped time is in both


class LosingStream(LateCloud):
    """A stream whose tasks end with the given errors, one after the other; later tasks get replies."""

    def __init__(self, errors: list[NeurosurgeonError]) -> None:
        super().__init__(1.0, 1)
        self.errors = list(errors)
        self.losses: list[int] = []

    def submit(self, task: int, request: Request, tensors: Any, on_reply: OnReply, losses: int = 0) -> None:
        self.losses.append(losses)
        if self.errors:
            on_reply(self.errors.pop(0))
        else:
            super().submit(task, request, tensors, on_reply, losses)


@pytest.mark.parametrize(
    ("errors", "hedges", "where"),
    [
        ([ConnectError("gone")], True, "cloud"),
        ([ConnectError("gone")], False, "edge"),
        ([ConnectError("gone")] * 2, True, "edge"),
        ([ConnectError("gone"), WeightsError("others, now")], True, "edge"),
    ],
)
def test_a_lost_task_is_resent_once_after_a_reconnect(
    errors: list[NeurosurgeonError], hedges: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_queue, "REPLAN_MS", 0.0)
    model = QueueModel(
        load_network(MODEL), LATENCIES.scaled(1_000.0), FASTER, StageKeys("edge", "transfer", "cloud"), INPUTS
    )
    stream: Any = LosingStream(errors)
    settings = QueueSettings({}, learns=False, in_flight=1, hedges=hedges)
    watch = LinkWatch("nowhere", 1, LINK)
    with QueueReport(io.StringIO()) as report:
        results = QueueRun(settings, {MODEL: model}, stream, watch, report).run([QueuedTask(1, MODEL)])
    assert [(result.where, result.error) for result in results] == [(where, None)]
    assert stream.losses == list(range(1 + hedges))


def place_of_a_stalled_task(stream: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run one task that is hedged as soon as it is sent; return where it was computed."""
    monkeypatch.setattr(Hedging, "should_hedge", lambda *arguments: True)
    model = QueueModel(load_network(MODEL), SLOW_EDGE, FASTER, StageKeys("edge", "transfer", "cloud"), INPUTS)
    settings = QueueSettings({}, learns=False, in_flight=1)
    watch = LinkWatch("nowhere", 1, LINK)
    with QueueReport(io.StringIO()) as report:
        results = QueueRun(settings, {MODEL: model}, stream, watch, report).run([QueuedTask(1, MODEL)])
    return [str(result.where) for result in results]


def test_a_reply_stops_the_local_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    run, ended = TorchPartition.run, []
    stream: Any = StalledStream()

    def replied_meanwhile(*arguments: Any) -> Any:
        stream.answer()
        result = run(*arguments)
        ended.append(result)
        return result

    monkeypatch.setattr(TorchPartition, "run", replied_meanwhile)
    assert place_of_a_stalled_task(stream, monkeypatch) == ["cloud"]
    assert ended == [None]


# ---------------------------------------------------------------- images


def test_images_are_read_ahead_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    read: SimpleQueue[Path] = SimpleQueue()

    def load(self: NetworkInputs, path: Path) -> tuple[Array, ...]:
        read.put(path)
        return (np.full(1, int(path.name)),)

    monkeypatch.setattr(NetworkInputs, "read", load)
    tasks = [QueuedTask(number, MODEL, Path(str(number)) if number % 3 else None) for number in range(1, 13)]
    ahead = inputs_ahead(tasks, {MODEL: INPUTS})
    first, read_input = next(ahead)
    seen = [read.get(timeout=10).name for _ in range(4)]  # of tasks 1 to 5, of which the third has none
    assert (first.id, read_input()[0].item(), seen) == (1, 1, ["1", "2", "4", "5"])
    assert read.empty()
    rest = [(task.id, read_input()[0].size == 1 and read_input()[0].item()) for task, read_input in ahead]
    assert rest == [(number, number if number % 3 else False) for number in range(2, 13)]


def test_a_queue_that_stops_early_waits_for_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, asked = threading.Event(), threading.Event()

    def load(self: NetworkInputs, path: Path) -> tuple[Array, ...]:
        asked.set()
        gate.wait(10)
        return (np.zeros(1),)

    monkeypatch.setattr(NetworkInputs, "read", load)
    tasks = [QueuedTask(number, MODEL, Path("x")) for number in range(1, 9)]
    ahead = inputs_ahead(tasks, {MODEL: INPUTS})
    _, first = next(ahead)
    _, second = next(ahead)
    assert asked.wait(10)
    ahead.close()  # type: ignore[attr-defined]
    gate.set()
    assert first()[0].item() == 0
    with pytest.raises(CancelledError):
        second()
