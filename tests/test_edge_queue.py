"""A queue on the edge: which cut each task gets, and that every task gets its answer when the cloud is lost."""

from __future__ import annotations

import io
from concurrent.futures import Future
from typing import Any

import pytest

from deployment import SplitPlan, plan_split
from edge_queue import Chooser, QueueModel, QueueRun, QueueSettings, choice, in_order, within
from edge_task import StageKeys
from models.zoo import load_network, model_graph
from net.bandwidth import LinkEstimate, LinkSource
from net.link_watch import LinkWatch
from net.session import OnCloudLoss
from predictor.chain_search import Objective
from predictor.flow_shop import IDLE, Pipeline, Schedule, makespan_ms
from predictor.latencies import LayerLatencies
from utils.errors import ConnectError, NeurosurgeonError, RemoteError
from utils.inference_utils import random_input, run_whole
from utils.queue_report import QueueReport
from utils.queue_tasks import QueuedTask
from utils.report import output_digest

MODEL = "le_net"
LAYERS = len(model_graph(MODEL).layers)
LINK = LinkEstimate(1e9, 0.1, LinkSource.GIVEN)
LATENCIES = LayerLatencies([1.0] * LAYERS, [1.0] * LAYERS, [1.0] * LAYERS, "made up")
FASTER = LATENCIES.scaled(0.5)


def plan(rate_bytes_per_s: float = 1e9, queue_ms: float = 0.0, objective: Objective = Objective.LATENCY) -> SplitPlan:
    graph = model_graph(MODEL)
    return plan_split(graph, LATENCIES, FASTER, rate_bytes_per_s, 0.1, queue_ms=queue_ms, objective=objective)


def point(chooser: Chooser, made: SplitPlan, pipeline: Pipeline = IDLE) -> int:
    """Return the point that is chosen while the plan of every model is the same."""
    return chooser.choose(lambda _: made, pipeline).candidate.point


# ---------------------------------------------------------------- cuts


def test_a_cut_is_kept_unless_another_saves_enough() -> None:
    chooser = Chooser(Objective.LATENCY, [MODEL] * 3)
    assert point(chooser, plan()) == 0
    slightly = plan(queue_ms=LAYERS / 2 - 0.5)  # now the edge alone is faster, by a percent
    assert slightly.best.point == LAYERS
    assert point(chooser, slightly) == 0
    assert point(chooser, plan(queue_ms=10.0 * LAYERS)) == LAYERS


def test_what_is_under_way_makes_the_edge_keep_its_task() -> None:
    busy_link, busy_cloud = Pipeline(link_ms=100.0, cloud_ms=100.0), Pipeline(cloud_ms=100.0)
    assert point(Chooser(Objective.LATENCY, [MODEL]), plan(), busy_link) == LAYERS
    assert point(Chooser(Objective.LATENCY, [MODEL]), plan(), busy_cloud) == LAYERS
    waiting = Chooser(Objective.LATENCY, [MODEL]).choose(lambda _: plan(), Pipeline(link_ms=1.0))
    assert waiting.candidate.point == 0
    assert waiting.predicted.transfer_ms == pytest.approx(waiting.candidate.stages.transfer_ms + 1.0)


def test_a_wait_that_the_cloud_tells_is_not_counted_twice() -> None:
    chooser = Chooser(Objective.LATENCY, [MODEL])
    chosen = chooser.choose(lambda _: plan(queue_ms=3.0), Pipeline(cloud_ms=3.0))
    assert chosen.predicted == chosen.candidate.stages


def test_a_waiting_cloud_makes_the_edge_keep_its_task() -> None:
    assert plan().best.point == 0
    busy = plan(queue_ms=50.0)
    assert busy.best.point == LAYERS
    assert busy.candidates[0].stages.cloud_ms == pytest.approx(plan().candidates[0].stages.cloud_ms + 50.0)
    assert busy.candidates[-1].stages.cloud_ms == 0.0


def test_for_throughput_a_queue_is_spread_over_edge_and_cloud() -> None:
    chooser, by_throughput = Chooser(Objective.THROUGHPUT, [MODEL] * 60), plan(objective=Objective.THROUGHPUT)
    pipeline = Pipeline()
    for _ in range(60):
        busy = by_throughput.candidates[point(chooser, by_throughput, pipeline.from_now())].busy
        pipeline = pipeline.after(busy)
    of_one_cut_ms = min(makespan_ms([candidate.busy] * 60) for candidate in by_throughput.candidates)
    assert max(pipeline[:3]) < 1.01 * of_one_cut_ms
    assert pipeline.edge_ms == pytest.approx(pipeline.cloud_ms, rel=0.1)


def test_the_schedule_orders_and_predicts() -> None:
    tasks = [QueuedTask(number, MODEL) for number in range(1, 6)]
    settings = QueueSettings({}, schedule=Schedule.JOHNSON)
    ordered, predicted = in_order(tasks, {MODEL: queue_model()}, LINK, settings)
    assert sorted(task.id for task in ordered) == [1, 2, 3, 4, 5]
    assert predicted["johnson"] <= predicted["fifo"]


def test_a_long_queue_begins_at_once() -> None:
    tasks = [QueuedTask(number, MODEL) for number in range(1, 100_001)]
    ordered, predicted = in_order(tasks, {MODEL: queue_model()}, LINK, QueueSettings({}, schedule=Schedule.JOHNSON))
    assert len(ordered) == len(tasks)
    assert predicted == {}


# ---------------------------------------------------------------- a cloud that fails


def queue_model() -> QueueModel:
    return QueueModel(load_network(MODEL), LATENCIES, FASTER, StageKeys("edge", "transfer", "cloud"))


class FailingStream:
    """Stands in for a stream: the first tasks fail at once with the errors given, the others are lost."""

    keeps_coming_back = False

    def __init__(self, *errors: NeurosurgeonError) -> None:
        self.errors = list(errors)
        self.submitted: list[int] = []

    @property
    def takes_tasks(self) -> bool:
        return not self.submitted or self.keeps_coming_back

    def submit(self, task: int, *what: Any) -> Future[Any]:
        self.submitted.append(task)
        answer: Future[Any] = Future()
        answer.set_exception(self.errors.pop(0))
        return answer


def run_queue(stream: Any, count: int, in_flight: int = 2, **how: Any) -> tuple[list[Any], str]:
    tasks = [QueuedTask(number, MODEL) for number in range(1, count + 1)]
    settings = QueueSettings({}, learns=False, in_flight=in_flight, **how)
    out = io.StringIO()
    with QueueReport(tasks, out) as report:
        watch = LinkWatch("nowhere", 1, LINK)
        results = QueueRun(settings, {MODEL: queue_model()}, stream, watch, report).run(tasks)
    return results, out.getvalue()


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_cloud_that_is_lost_leaves_the_rest_to_the_edge(in_flight: int, caplog: pytest.LogCaptureFixture) -> None:
    stream = FailingStream(*(ConnectError("the cloud stays away") for _ in range(8)))
    results, _ = run_queue(stream, 8, in_flight)
    expected = output_digest(run_whole(load_network(MODEL), random_input()))
    assert sorted(result.task.id for result in results) == list(range(1, 9))
    assert {result.where for result in results} == {"edge"}
    assert {result.output_digest for result in results} == {expected}
    assert len(stream.submitted) == 1
    assert caplog.text.count("is computed here: the cloud stays away") == 1


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_cloud_that_is_lost_with_every_task_costs_no_answer(in_flight: int) -> None:
    stream = FailingStream(*(ConnectError("gone") for _ in range(12)))
    stream.keeps_coming_back = True
    results, _ = run_queue(stream, 12, in_flight)
    expected = output_digest(run_whole(load_network(MODEL), random_input()))
    assert sorted(result.task.id for result in results) == list(range(1, 13))
    assert {(result.where, result.output_digest) for result in results} == {("edge", expected)}
    assert len(stream.submitted) == 12
    assert all(result.elapsed_ms > 0 for result in results)


@pytest.mark.parametrize("how", [OnCloudLoss.RETRY, OnCloudLoss.FAIL])
def test_tasks_that_are_not_to_run_here_fail_with_their_cloud(how: OnCloudLoss) -> None:
    stream = FailingStream(*(ConnectError("gone") for _ in range(3)))
    results, _ = run_queue(stream, 3, on_cloud_loss=how)
    assert [result.error for result in results] == ["gone"] * 3
    assert len(stream.submitted) == 3


def test_a_task_that_the_cloud_refuses_fails_alone() -> None:
    stream = FailingStream(RemoteError("it broke"), ConnectError("gone"))
    results, out = run_queue(stream, 3, in_flight=1)
    assert [result.error for result in sorted(results, key=lambda r: r.task.id)] == ["it broke", None, None]
    assert "task 1 of 3 failed : it broke" in out


def test_a_deadline_takes_the_fastest_cut_where_the_chosen_one_is_late() -> None:
    made = plan()
    slowest = max(made.candidates, key=lambda candidate: candidate.stages.total_ms)
    chosen = choice(made, slowest.point, IDLE)
    late_ms = chosen.predicted.total_ms
    assert within(chosen, None, IDLE) is chosen
    assert within(chosen, late_ms, IDLE) is chosen
    assert within(chosen, late_ms - 1, IDLE).candidate is made.best
    assert within(chosen, 1e-6, IDLE).candidate is made.best  # the best effort
