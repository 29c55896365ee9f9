"""Which cut each task of a queue gets, and in which order they come."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from neurosurgeon.edge.cuts import Forecast, QueueModel, share_cores
from neurosurgeon.edge.inputs import inputs_of
from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.edge.stages import StageKeys
from neurosurgeon.net.link_watch import LinkNow
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import IDLE, Pipeline, Schedule, makespan_ms
from neurosurgeon.planner.plan import SplitPlan, plan_split
from neurosurgeon.planner.queue import Chooser, choice, cut_for_deadline, plan_resend, replan_whole_task
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.utils.link import LinkEstimate, LinkSource
from neurosurgeon.utils.timing import StageTimes
from tests.networks import ENGINE, load_network, model_graph

MODEL = "le_net"
LAYERS = len(model_graph(MODEL).layers)
LINK = LinkEstimate(1e9, 0.1, LinkSource.GIVEN)
INPUTS = inputs_of(ENGINE, MODEL)
LATENCIES = LayerLatencies([1.0] * LAYERS, [1.0] * LAYERS, [1.0] * LAYERS, "made up")
FASTER = LATENCIES.scaled(0.5)


def queue_model() -> QueueModel:
    return QueueModel(load_network(MODEL), LATENCIES, FASTER, StageKeys("edge", "transfer", "cloud"), INPUTS)


def plan(rate_bytes_per_s: float = 1e9, queue_ms: float = 0.0, objective: Objective = Objective.LATENCY) -> SplitPlan:
    graph = model_graph(MODEL)
    return plan_split(graph, LATENCIES, FASTER, rate_bytes_per_s, 0.1, queue_ms=queue_ms, objective=objective)


def point(chooser: Chooser, made: SplitPlan, pipeline: Pipeline = IDLE) -> int:
    """Return the point that is chosen while the plan of every model is the same."""
    return chooser.choose(lambda _: made, pipeline).candidate.point


@pytest.mark.parametrize("objective", list(Objective))
def test_a_queue_without_end_is_planned_as_a_long_one(objective: Objective) -> None:
    made = plan(objective=objective)
    endless, long = Chooser(objective, itertools.repeat(MODEL)), Chooser(objective, [MODEL] * 100)
    assert [point(endless, made) for _ in range(20)] == [point(long, made) for _ in range(20)]


def test_chooser_goes_on_after_a_task_that_cannot_be_planned() -> None:
    asked = []

    def plan_of(model: str) -> SplitPlan:
        asked.append(model)
        if model == "broken":
            raise ValueError(model)
        return plan()

    chooser = Chooser(Objective.LATENCY, ["broken", MODEL])
    with pytest.raises(ValueError, match="broken"):
        chooser.choose(plan_of)
    chooser.choose(plan_of)
    assert asked == ["broken", MODEL]


def test_a_cut_is_kept_unless_another_saves_enough() -> None:
    chooser = Chooser(Objective.LATENCY, [MODEL] * 3)
    assert point(chooser, plan()) == 0
    slightly = plan(queue_ms=LAYERS / 2 - 0.2)  # now the edge alone is faster, by a percent
    assert slightly.best.point == LAYERS
    assert point(chooser, slightly) == 0
    assert point(chooser, plan(queue_ms=10.0 * LAYERS)) == LAYERS


def test_a_busy_pipeline_keeps_the_task_on_the_edge() -> None:
    busy_link, busy_cloud = Pipeline(link_ms=100.0, cloud_ms=100.0), Pipeline(cloud_ms=100.0)
    assert point(Chooser(Objective.LATENCY, [MODEL]), plan(), busy_link) == LAYERS
    assert point(Chooser(Objective.LATENCY, [MODEL]), plan(), busy_cloud) == LAYERS
    waiting = Chooser(Objective.LATENCY, [MODEL]).choose(lambda _: plan(), Pipeline(link_ms=1.0))
    assert waiting.candidate.point == 0
    assert waiting.predicted.transfer_ms == pytest.approx(waiting.candidate.stages.transfer_ms + 1.0)


def test_a_choice_holds_for_the_same_plan_and_an_idle_pipeline() -> None:
    chooser, made = Chooser(Objective.LATENCY, [MODEL] * 4), plan()
    assert [point(chooser, made), point(chooser, made)] == [0, 0]
    assert point(chooser, made, Pipeline(link_ms=100.0, cloud_ms=100.0)) == LAYERS
    assert point(chooser, made) == 0


def test_a_wait_that_the_cloud_reports_is_not_counted_twice() -> None:
    chooser = Chooser(Objective.LATENCY, [MODEL])
    chosen = chooser.choose(lambda _: plan(queue_ms=3.0), Pipeline(cloud_ms=3.0))
    assert chosen.predicted == chosen.candidate.stages


def test_a_busy_cloud_keeps_the_task_on_the_edge() -> None:
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


def forecast(count: int, model: QueueModel, **settings: Any) -> Forecast:
    tasks = [QueuedTask(number, MODEL) for number in range(1, count + 1)]
    return Forecast(tasks, {MODEL: model}, LINK, QueueSettings({}, **settings))


def test_the_schedule_orders_and_predicts() -> None:
    queue = forecast(5, queue_model())
    assert sorted(task.id for task in queue.in_order(Schedule.JOHNSON)) == [1, 2, 3, 4, 5]
    assert [task.id for task in queue.in_order(Schedule.FIFO)] == [1, 2, 3, 4, 5]
    assert queue.makespans_ms["johnson"] <= queue.makespans_ms["fifo"]


def test_a_long_queue_begins_at_once() -> None:
    queue = forecast(100_001, queue_model())
    assert len(queue.in_order(Schedule.JOHNSON)) == 100_001
    assert queue.makespans_ms == {}


def test_a_makespan_is_predicted_with_the_kept_corrections() -> None:
    model, corrections = queue_model(), Corrections()
    before_ms = forecast(5, model).makespans_ms["fifo"]
    for _ in range(5):
        corrections.learn(model.keys.edge, 1.0, 2.0)
        corrections.learn(model.keys.cloud, 1.0, 2.0)
    corrections.save()
    assert forecast(5, model).makespans_ms["fifo"] == pytest.approx(2 * before_ms, rel=0.05)
    assert forecast(5, model, learns=False).makespans_ms["fifo"] == before_ms


def test_sides_that_share_their_cores_work_one_after_the_other() -> None:
    settings = {"objective": Objective.THROUGHPUT, "in_flight": 4}
    apart_ms = forecast(20, queue_model(), **settings).makespans_ms["fifo"]
    shared_ms = forecast(20, queue_model(), **settings, shares_cores=True).makespans_ms["fifo"]
    alone_ms = min(candidate.busy.total_ms for candidate in plan().candidates)
    assert shared_ms == pytest.approx(20 * alone_ms, rel=0.01)
    assert apart_ms < 0.8 * shared_ms


def test_the_makespan_of_shared_cores_corrects_the_next_queue() -> None:
    first = forecast(5, queue_model(), shares_cores=True)
    expected_ms = first.makespans_ms["fifo"]
    first.learn(1.5 * expected_ms)
    second = forecast(5, queue_model(), shares_cores=True)
    assert second.makespans_ms["fifo"] == pytest.approx(1.5 * expected_ms)
    second.learn(1.5 * expected_ms)
    assert forecast(5, queue_model(), shares_cores=True).makespans_ms["fifo"] == pytest.approx(1.5 * expected_ms)
    assert (
        forecast(5, queue_model()).makespans_ms["fifo"] < expected_ms
    )  # stages side by side have their own corrections


@pytest.mark.parametrize(
    ("host", "device", "edge_threads", "cloud_threads", "expected"),
    [
        ("127.0.0.1", "cpu", 1, 4, True),
        ("127.0.0.1", "cpu", 1, 3, False),  # a core for every thread
        ("127.0.0.1", "cuda", 1, 4, False),
        ("127.0.0.1", "cpu", 1, "4", False),
        ("192.0.2.1", "cpu", 4, 4, False),  # another machine
    ],
)
def test_edge_and_cloud_share_cores_on_one_machine_with_too_few(
    monkeypatch: pytest.MonkeyPatch, host: str, device: str, edge_threads: int, cloud_threads: object, expected: bool
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    settings = QueueSettings({}, threads=edge_threads)
    assert share_cores(host, {"device": device, "threads": cloud_threads}, settings) is expected


def test_cut_for_deadline_takes_the_fastest_if_it_is_late() -> None:
    made = plan()
    slowest = max(made.candidates, key=lambda candidate: candidate.stages.total_ms)
    chosen = choice(made, slowest.point, IDLE)
    late_ms = chosen.predicted.total_ms
    assert cut_for_deadline(chosen, None, IDLE) is chosen
    assert cut_for_deadline(chosen, late_ms, IDLE) is chosen
    assert cut_for_deadline(chosen, late_ms - 1, IDLE).candidate is made.best
    assert cut_for_deadline(chosen, 1e-6, IDLE).candidate is made.best  # the best effort


# ---------------------------------------------------------------- plans of a task that has begun


SLOW = LATENCIES.scaled(1_000.0)


def slow_plan(rate_bytes_per_s: float) -> SplitPlan:
    """Return a plan for an edge that takes a second for every layer."""
    return plan_split(model_graph(MODEL), SLOW, FASTER, rate_bytes_per_s, 0.1)


def test_replan_whole_task_if_the_link_recovers_early() -> None:
    chosen = choice(slow_plan(1e-3), LAYERS, IDLE)
    assert chosen.candidate is chosen.plan.best
    assert replan_whole_task(chosen, 1_000.0, slow_plan(1e-3), IDLE) is None
    better = replan_whole_task(chosen, 1_000.0, slow_plan(1e9), IDLE)
    assert better
    assert better.candidate is better.plan.best
    assert better.predicted.edge_ms == 1_000.0 + better.candidate.stages.edge_ms  # the dropped time counts
    assert replan_whole_task(chosen, 1e3 * LAYERS - 50.0, slow_plan(1e9), IDLE) is None  # it is nearly done
    assert replan_whole_task(chosen, 1e9, slow_plan(1e9), IDLE) is None  # longer than predicted already
    assert (
        replan_whole_task(chosen, 1_000.0, slow_plan(1e9), Pipeline(link_ms=1e6)) is None
    )  # other tasks are in flight


def test_plan_resend_if_the_edge_needs_longer_for_the_rest() -> None:
    chosen = choice(slow_plan(1e9), 1, IDLE)
    there = plan_resend(chosen, 100.0, slow_plan(1e9), Pipeline(link_ms=300.0))
    assert there
    assert there.candidate.point == 1
    stages = there.candidate.stages
    assert there.predicted == StageTimes(0.0, 300.0 + stages.transfer_ms, stages.cloud_ms)  # its edge partition has run
    assert plan_resend(chosen, chosen.rest_ms - 50.0, slow_plan(1e9), IDLE) is None
    assert plan_resend(chosen, 100.0, slow_plan(1e-3), IDLE) is None


def test_a_plan_is_kept_while_its_inputs_round_to_the_same() -> None:
    model, settings = queue_model(), QueueSettings({})

    def plan_at(rate_bytes_per_s: float = 1e6, rtt_ms: float = 10.0, queue_ms: float = 0.0) -> SplitPlan:
        now = LinkNow(LinkEstimate(rate_bytes_per_s, rtt_ms), is_stale=False, queue_ms=queue_ms)
        return model.plan(now, Corrections(), settings)

    first = plan_at()
    assert all(plan is first for plan in (plan_at(1.004e6), plan_at(rtt_ms=10.04), plan_at(queue_ms=0.4)))
    for moved in (plan_at(1.006e6), plan_at(rtt_ms=10.1), plan_at(queue_ms=1.0)):
        assert moved is not first
    assert plan_at(rtt_ms=10.1).candidates[0].stages.transfer_ms > first.candidates[0].stages.transfer_ms


def test_a_plan_follows_corrections() -> None:
    model, settings, corrections = queue_model(), QueueSettings({}), Corrections()
    now = LinkNow(LINK, is_stale=False, queue_ms=0.0)
    before = model.plan(now, corrections, settings)
    for _ in range(5):
        corrections.learn(model.keys.edge, 1.0, 1.5)
    after = model.plan(now, corrections, settings)
    assert model.factors.edge == pytest.approx(1.5)
    assert after.candidates[-1].stages.edge_ms == pytest.approx(1.5 * before.candidates[-1].stages.edge_ms)
