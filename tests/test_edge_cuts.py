"""Which cut each task of a queue gets, and in which order they come."""

from __future__ import annotations

import pytest

from deployment import SplitPlan, plan_split
from edge_cuts import Chooser, QueueModel, QueueSettings, anew, choice, in_order, once_more, within
from edge_task import StageKeys
from models.zoo import load_network, model_graph
from net.bandwidth import LinkEstimate, LinkSource
from net.link_watch import LinkNow
from predictor.chain_search import Objective
from predictor.correction import Corrections
from predictor.flow_shop import IDLE, Pipeline, Schedule, makespan_ms
from predictor.latencies import LayerLatencies
from utils.queue_tasks import QueuedTask
from utils.timing import StageTimes

MODEL = "le_net"
LAYERS = len(model_graph(MODEL).layers)
LINK = LinkEstimate(1e9, 0.1, LinkSource.GIVEN)
LATENCIES = LayerLatencies([1.0] * LAYERS, [1.0] * LAYERS, [1.0] * LAYERS, "made up")
FASTER = LATENCIES.scaled(0.5)


def queue_model() -> QueueModel:
    return QueueModel(load_network(MODEL), LATENCIES, FASTER, StageKeys("edge", "transfer", "cloud"))


def plan(rate_bytes_per_s: float = 1e9, queue_ms: float = 0.0, objective: Objective = Objective.LATENCY) -> SplitPlan:
    graph = model_graph(MODEL)
    return plan_split(graph, LATENCIES, FASTER, rate_bytes_per_s, 0.1, queue_ms=queue_ms, objective=objective)


def point(chooser: Chooser, made: SplitPlan, pipeline: Pipeline = IDLE) -> int:
    """Return the point that is chosen while the plan of every model is the same."""
    return chooser.choose(lambda _: made, pipeline).candidate.point


def test_a_cut_is_kept_unless_another_saves_enough() -> None:
    chooser = Chooser(Objective.LATENCY, [MODEL] * 3)
    assert point(chooser, plan()) == 0
    slightly = plan(queue_ms=LAYERS / 2 - 0.2)  # now the edge alone is faster, by a percent
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


def test_a_choice_holds_while_the_plan_does_and_nothing_is_under_way() -> None:
    chooser, made = Chooser(Objective.LATENCY, [MODEL] * 4), plan()
    assert [point(chooser, made), point(chooser, made)] == [0, 0]
    assert point(chooser, made, Pipeline(link_ms=100.0, cloud_ms=100.0)) == LAYERS
    assert point(chooser, made) == 0


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


def test_a_deadline_takes_the_fastest_cut_where_the_chosen_one_is_late() -> None:
    made = plan()
    slowest = max(made.candidates, key=lambda candidate: candidate.stages.total_ms)
    chosen = choice(made, slowest.point, IDLE)
    late_ms = chosen.predicted.total_ms
    assert within(chosen, None, IDLE) is chosen
    assert within(chosen, late_ms, IDLE) is chosen
    assert within(chosen, late_ms - 1, IDLE).candidate is made.best
    assert within(chosen, 1e-6, IDLE).candidate is made.best  # the best effort


# ---------------------------------------------------------------- a task that begins anew


SLOW = LATENCIES.scaled(1_000.0)


def slow_plan(rate_bytes_per_s: float) -> SplitPlan:
    """Return a plan for an edge that takes a second for every layer."""
    return plan_split(model_graph(MODEL), SLOW, FASTER, rate_bytes_per_s, 0.1)


def test_a_task_begins_anew_when_the_link_is_back_long_before_its_end() -> None:
    chosen = choice(slow_plan(1e-3), LAYERS, IDLE)
    assert chosen.candidate is chosen.plan.best
    assert anew(chosen, 1_000.0, slow_plan(1e-3), IDLE) is None
    better = anew(chosen, 1_000.0, slow_plan(1e9), IDLE)
    assert better
    assert better.candidate is better.plan.best
    assert better.predicted.edge_ms == 1_000.0 + better.candidate.stages.edge_ms  # what is lost counts
    assert anew(chosen, 1e3 * LAYERS - 50.0, slow_plan(1e9), IDLE) is None  # it is all but done
    assert anew(chosen, 1e9, slow_plan(1e9), IDLE) is None  # longer than predicted: who knows for how much longer
    assert anew(chosen, 1_000.0, slow_plan(1e9), Pipeline(link_ms=1e6)) is None  # other tasks are under way


def test_a_task_is_sent_once_more_when_the_edge_needs_longer_for_its_rest() -> None:
    chosen = choice(slow_plan(1e9), 1, IDLE)
    there = once_more(chosen, 100.0, slow_plan(1e9), Pipeline(link_ms=300.0))
    assert there
    assert there.candidate.point == 1
    stages = there.candidate.stages
    assert there.predicted == StageTimes(0.0, 300.0 + stages.transfer_ms, stages.cloud_ms)  # its edge half has run
    assert once_more(chosen, chosen.rest_ms - 50.0, slow_plan(1e9), IDLE) is None
    assert once_more(chosen, 100.0, slow_plan(1e-3), IDLE) is None


def test_a_plan_is_kept_until_what_has_moved_adds_up() -> None:
    model, settings = queue_model(), QueueSettings({})

    def plan_at(rate_bytes_per_s: float = 1e6, rtt_ms: float = 10.0, queue_ms: float = 0.0) -> SplitPlan:
        now = LinkNow(LinkEstimate(rate_bytes_per_s, rtt_ms), is_stale=False, queue_ms=queue_ms)
        return model.plan(now, Corrections(), settings)

    first = plan_at()
    assert all(plan is first for plan in (plan_at(1.0015e6), plan_at(rtt_ms=10.04), plan_at(queue_ms=0.4)))
    second = plan_at(1.003e6)  # of which half was no matter before
    assert second is not first
    assert plan_at(queue_ms=1.0) is not second
    assert plan_at(rtt_ms=10.1).candidates[0].stages.transfer_ms > first.candidates[0].stages.transfer_ms


def test_a_plan_follows_what_is_learnt() -> None:
    model, settings, corrections = queue_model(), QueueSettings({}), Corrections()
    now = LinkNow(LINK, is_stale=False, queue_ms=0.0)
    before = model.plan(now, corrections, settings)
    for _ in range(5):
        corrections.learn(model.keys.edge, 1.0, 1.5)
    after = model.plan(now, corrections, settings)
    assert model.factors.edge == pytest.approx(1.5)
    assert after.candidates[-1].stages.edge_ms == pytest.approx(1.5 * before.candidates[-1].stages.edge_ms)
