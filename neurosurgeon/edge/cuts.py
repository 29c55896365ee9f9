"""The cut that each task of a queue gets: models ready on both sides, plans for the link of the moment, hysteresis."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.edge.task import StageKeys, predicted_stages, request_of
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.models.zoo import Network, load_network, model_graph
from neurosurgeon.net.link_watch import LinkNow
from neurosurgeon.net.messages import Prepare, Request
from neurosurgeon.net.session import EdgeSession, OnCloudLoss
from neurosurgeon.net.sockets import is_this_machine
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import IDLE, Pipeline, Schedule, choose_cuts, makespan_ms, order_of
from neurosurgeon.planner.hedge import Hedging, is_clearly_sooner
from neurosurgeon.planner.plan import Candidate, SplitPlan, plan_split
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.predictor.correction import MIN_SAMPLES, Corrections
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.predictor_utils import dataset_threads
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.timing import StageTimes, now_ms

MAX_PREDICTED = 2000  # tasks of a queue whose makespan is predicted: 0.2 to 0.4 ms each
HORIZON = 40  # tasks of a queue that are thought of together
RETHINK = 8  # tasks after which they are thought over, in 1 ms
MIN_GAIN = 0.05  # a cut is changed for no less: estimates move by some percent from second to second


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """How a queue is worked through."""

    weights: Mapping[str, WeightsSource]
    device: str = "cpu"
    threads: int | None = None  # None: as many as the edge's predictors were measured with
    predictor: str = "forest"
    edge_config: Path | None = None
    cloud_config: Path | None = None
    learns: bool = True
    objective: Objective = Objective.LATENCY
    schedule: Schedule = Schedule.FIFO
    in_flight: int = 4
    hears_load: bool = True  # False: plan as if the cloud were idle
    on_cloud_loss: OnCloudLoss = OnCloudLoss.LOCAL
    hedges: bool = True  # False: wait for the cloud, however long a task is stuck
    deadline_ms: float | None = None  # of each task
    shares_cores: bool = False  # edge and cloud compute on the same cores: see `share_cores`

    @property
    def hedges_tasks(self) -> bool:
        """Whether a task may go the other way while it is under way: from the cloud to the edge, or back."""
        return self.hedges and self.on_cloud_loss is OnCloudLoss.LOCAL

    @property
    def side_by_side(self) -> int:
        """How many tasks edge and cloud work on at once: where they share their cores, one waits for the other."""
        return 1 if self.shares_cores else self.in_flight

    def chooser(self, tasks: Sequence[QueuedTask]) -> Chooser:
        """Return what chooses the cuts of these tasks."""
        return Chooser(self.objective, [task.model for task in tasks], self.side_by_side)

    def task(self, model: str) -> TaskSettings:
        """Return these settings as those of a single task."""
        return TaskSettings(
            model=model,
            weights=self.weights.get(model, WeightsSource()),
            device=self.device,
            threads=self.threads,
            predictor=self.predictor,
            edge_config=self.edge_config,
            cloud_config=self.cloud_config,
        )


# ---------------------------------------------------------------- models, ready to be planned and run


class StageFactors(NamedTuple):
    """The corrections of the three stages with which a task was planned: what it teaches is beyond them."""

    edge: float
    transfer: float
    cloud: float


class QueueModel:
    """One model of the queue: its network, and what its layers take on both sides.

    A queue cuts behind any layer, in execution order, so that a cut has the same number in every plan; inside the
    blocks of a graph there may be better ones (`Strategy.DADS`), which only a single task looks for.
    """

    def __init__(self, network: Network, edge: LayerLatencies, cloud: LayerLatencies, keys: StageKeys) -> None:
        self.network = network
        self.keys = keys
        self.output_bytes = network.graph.output.size_bytes
        self._edge = edge
        self._cloud = cloud
        self._made_for: tuple[float, ...] = ()  # what the last plan was made for, rounded
        self._plan: SplitPlan
        self.factors = StageFactors(1.0, 1.0, 1.0)  # the corrections in it
        self._cuts_run: set[frozenset[int]] = set()
        self._requests: dict[frozenset[int], Request] = {}

    @property
    def origins(self) -> dict[str, str]:
        """Whose data the predictions of each side come from."""
        return {"edge": self._edge.origin, "cloud": self._cloud.origin}

    def plan(self, now: LinkNow, corrections: Corrections, settings: QueueSettings) -> SplitPlan:
        """Return the plan for the current link estimate; the last one, while its inputs are the same but for rounding.

        A plan takes 0.2 ms for LeNet and 16 ms for DenseNet-201.
        """
        rate_bytes_per_s, exchange_ms = now.link.rate_bytes_per_s, now.link.exchange_ms
        queue_ms = now.queue_ms if settings.hears_load else 0.0
        factors = StageFactors._make(map(corrections.factor, self.keys))
        rounded = (float(f"{rate_bytes_per_s:.3g}"), round(exchange_ms, 1), round(queue_ms))
        made_for = (*rounded, *(round(factor, 2) for factor in factors))
        if made_for != self._made_for:
            self._made_for, self.factors = made_for, factors
            self._plan = plan_split(
                self.network.graph,
                self._edge.scaled(factors.edge),
                self._cloud.scaled(factors.cloud),
                rate_bytes_per_s,
                exchange_ms,
                factors.transfer,
                queue_ms=queue_ms,
                objective=settings.objective,
                strategy=Strategy.NEUROSURGEON,
            )
        return self._plan

    def request(self, edge_nodes: frozenset[int]) -> Request:
        """Return the message that asks the cloud for its half of a cut."""
        known = self._requests.get(edge_nodes)
        if known is None:
            known = self._requests[edge_nodes] = request_of(self.network, edge_nodes)
        return known

    def is_first_run(self, edge_nodes: frozenset[int]) -> bool:
        """Return whether this cut runs for the first time: such a run also builds kernels, and teaches nothing."""
        is_first = edge_nodes not in self._cuts_run
        self._cuts_run.add(edge_nodes)
        return is_first


class Chooser:
    """Chooses the cuts of a queue of models, one task after the other.

    For latency a plan must have a candidate for every point, in order.
    """

    def __init__(self, objective: Objective, queue: Sequence[str], in_flight: int | None = None) -> None:
        self._objective = objective
        self._queue = queue
        self._in_flight = in_flight
        self._position = 0  # in the queue
        self._last: dict[str, int] = {}  # latency: the point of each model's last task
        self._ahead: list[int] = []  # throughput: candidates of the tasks since they were last thought over, and after

    def choose(self, plan_of: Callable[[str], SplitPlan], under_way: Pipeline = IDLE) -> Choice:
        """Return how to run the next task.

        For throughput, with the cut with which the tasks ahead are finished first. For latency, with that of the
        model's last task, unless another pays.

        Args: under_way: what link and cloud are still busy with.
        """
        position = self._position
        self._position += 1  # also where planning this task fails
        plan = plan_of(self._queue[position])
        if self._objective is Objective.THROUGHPUT:
            if position % RETHINK == 0 or not self._ahead:
                self._think_over(plan_of, position, under_way)
            index = min(self._ahead[position % RETHINK], len(plan.candidates) - 1)
            chosen = choice(plan, index, under_way)
        else:
            chosen = self._last_unless_another_pays(plan, under_way)
        return chosen

    def _think_over(self, plan_of: Callable[[str], SplitPlan], position: int, under_way: Pipeline) -> None:
        ahead = [plan_of(model).candidates for model in self._queue[position:][:HORIZON]]
        busy = {id(candidates): [candidate.busy for candidate in candidates] for candidates in ahead}
        options = [busy[id(candidates)] for candidates in ahead]
        known = zip(self._ahead[RETHINK:], options, strict=False)  # a plan may have a cut less than the one before
        start = [min(index, len(option) - 1) for index, option in known]
        self._ahead = choose_cuts(options, under_way, self._in_flight, start)

    def _last_unless_another_pays(self, plan: SplitPlan, under_way: Pipeline) -> Choice:
        model = plan.graph.model
        best = choice(plan, plan.best.point, IDLE) if under_way == IDLE else _fastest(plan, under_way)
        chosen = choice(plan, self._last.get(model, best.candidate.point), under_way)
        if _total_ms(best) < (1 - MIN_GAIN) * _total_ms(chosen):
            chosen = best
        self._last[model] = chosen.candidate.point
        return chosen


class QueuePlanner:
    """Plans tasks for the current link estimate and for what is in flight. Belongs to the main loop (`edge.queue`)."""

    def __init__(self, settings: QueueSettings, models: Mapping[str, QueueModel], corrections: Corrections) -> None:
        self._settings = settings
        self._models = models
        self._corrections = corrections
        self._pipeline, self._pipeline_ms = IDLE, 0.0  # what link and cloud were busy with at that time
        self.hedging = Hedging()

    def plan(self, model: str, now: LinkNow) -> SplitPlan:
        """Return the plan of a model."""
        return self._models[model].plan(now, self._corrections, self._settings)

    def choose(self, chooser: Chooser, now: LinkNow, pipeline: Pipeline, *, takes_tasks: bool) -> Choice:
        """Return how to run the next task.

        Args: takes_tasks: whether the link does; without it, a task that may run on the edge alone does so.
        """
        chosen = chooser.choose(lambda model: self.plan(model, now), pipeline)
        if self._settings.on_cloud_loss is OnCloudLoss.LOCAL and not takes_tasks:
            return choice(chosen.plan, -1, pipeline)
        return cut_for_deadline(chosen, self._settings.deadline_ms, pipeline)

    def pipeline_now(self, left_ms: float | None) -> Pipeline:
        """Return what link and cloud are still busy with, as predicted when each task was sent.

        Args: left_ms: for how long the link is seen to be busy at least; None: nothing is in flight.
        """
        before_ms, self._pipeline_ms = self._pipeline_ms, now_ms()
        if left_ms is None:
            return IDLE
        self._pipeline = self._pipeline._replace(edge_ms=self._pipeline_ms - before_ms).from_now()
        return self._pipeline._replace(link_ms=max(self._pipeline.link_ms, left_ms))

    def count_sent(self, candidate: Candidate, pipeline: Pipeline) -> None:
        """Add a task that is sent now to what link and cloud are busy with."""
        self._pipeline = pipeline.after(candidate.busy.beyond_edge)


class Choice(NamedTuple):
    """A cut for one task."""

    plan: SplitPlan
    candidate: Candidate
    predicted: StageTimes  # with the waits for what is under way

    @property
    def rest_ms(self) -> float:
        """What the edge takes for what would be the cloud's half."""
        return self.plan.candidates[-1].busy.edge_ms - self.candidate.busy.edge_ms


def choice(plan: SplitPlan, index: int, under_way: Pipeline) -> Choice:
    """Return what a candidate means for a task that begins now."""
    candidate = plan.candidates[index]
    return Choice(plan, candidate, under_way.with_waits(candidate.stages, candidate.busy))


def cut_for_deadline(chosen: Choice, deadline_ms: float | None, under_way: Pipeline) -> Choice:
    """Return what was chosen if it meets the deadline, else the fastest cut, which may still miss it."""
    if deadline_ms is None or chosen.predicted.total_ms <= deadline_ms:
        return chosen
    return _fastest(chosen.plan, under_way)


def replan_whole_task(chosen: Choice, elapsed_ms: float, plan: SplitPlan, under_way: Pipeline) -> Choice | None:
    """Return another cut for a task that the edge has computed for ``elapsed_ms``, or None.

    Starting over with it must now be clearly faster than going on. A link that was bad when a long edge partition began
    may have recovered long before its end.
    """
    as_chosen = choice(plan, chosen.candidate.point, under_way).predicted
    left_ms = as_chosen.total_ms - min(elapsed_ms, as_chosen.edge_ms)
    better = _fastest(plan, under_way)
    if not is_clearly_sooner(better.predicted.total_ms, left_ms):
        return None
    return better._replace(predicted=better.predicted._replace(edge_ms=elapsed_ms + better.predicted.edge_ms))


def plan_resend(chosen: Choice, elapsed_ms: float, plan: SplitPlan, under_way: Pipeline) -> Choice | None:
    """Return how to send a task again whose rest the edge has computed for ``elapsed_ms``, or None.

    Sending it must now be clearly faster than going on. The prediction begins when it is sent: its edge partition has
    run.
    """
    candidate = plan.candidates[chosen.candidate.point]
    predicted = under_way.with_waits(candidate.stages.beyond_edge, candidate.busy.beyond_edge)
    is_sooner = is_clearly_sooner(predicted.total_ms, chosen.rest_ms - elapsed_ms)
    return Choice(plan, candidate, predicted) if is_sooner else None


def _fastest(plan: SplitPlan, under_way: Pipeline) -> Choice:
    return min(_choices(plan, under_way), key=_total_ms)


def _choices(plan: SplitPlan, under_way: Pipeline) -> list[Choice]:
    return [choice(plan, index, under_way) for index in range(len(plan.candidates))]


def _total_ms(choice: Choice) -> float:
    return choice.predicted.total_ms


def prepare_models(
    names: Iterable[str], settings: QueueSettings, session: EdgeSession, find_link: Callable[[], LinkEstimate]
) -> dict[str, QueueModel]:
    """Return every model of the queue, ready on both sides, with the same weights.

    Args:   find_link: may wait for a measurement; asked when the first network is loaded.
    Raises: WeightsError, NetworkError, PlanningError.
    """
    models: dict[str, QueueModel] = {}
    for name in tqdm(sorted(set(names)), desc="models", unit="model", leave=False, disable=None):
        task = settings.task(name)
        graph = model_graph(name)
        session.ask_to_prepare(Prepare(name, pack_nodes(graph, graph.edge_nodes(0)), graph.digest))
        network = load_network(name, task.weights, task.device)  # while the cloud does the same
        session.wait_until_ready(network.weights_digest)
        edge, cloud, keys = predicted_stages(task, session, find_link(), is_warm=True)
        if settings.in_flight > settings.side_by_side:  # stages take longer beside each other
            keys = StageKeys._make(f"side by side {key}" for key in keys)
        models[name] = QueueModel(network, edge, cloud, keys)
    return models


def share_cores(host: str, cloud: Mapping[str, object], settings: QueueSettings) -> bool:
    """Return whether edge and cloud are one machine, and compute with more threads than that has cores.

    Args: cloud: what it says of itself.
    """
    cloud_threads = cloud.get("threads")
    if not settings.device == cloud.get("device") == "cpu" or not isinstance(cloud_threads, int):
        return False
    edge_threads = settings.threads or dataset_threads("edge", "cpu")
    return edge_threads + cloud_threads > (os.cpu_count() or 1) and is_this_machine(host)


class Forecast:
    """The order and the makespan of a queue, as they follow from what is known before its first task.

    Where edge and cloud share their cores, the makespan is that of one task after the other: the cores have the same
    work to do, whoever waits. What stages take side by side is no base for it, so its own error is learnt in its place.
    """

    def __init__(
        self,
        tasks: Sequence[QueuedTask],
        models: Mapping[str, QueueModel],
        link: LinkEstimate,
        settings: QueueSettings,
    ) -> None:
        self._tasks = tasks
        self._settings = settings
        corrections = Corrections.load() if settings.learns else Corrections()
        self._key: str | None = None
        if settings.in_flight > settings.side_by_side:
            clouds = ", ".join(sorted(model.keys.cloud for model in models.values()))
            self._key = f"makespan {settings.objective} {settings.in_flight} {clouds}"
        self._factor = corrections.factor(self._key) if self._key else 1.0
        now = LinkNow(link, is_stale=False, queue_ms=0.0)
        learnt = Corrections() if self._key else corrections
        self._plans = {name: model.plan(now, learnt, settings) for name, model in models.items()}

    def in_order(self, schedule: Schedule) -> list[QueuedTask]:
        """Return the tasks in the order of a schedule."""
        if schedule is Schedule.FIFO:
            return list(self._tasks)
        return [self._tasks[index] for index in order_of(schedule, self._busy_as_given)]

    @cached_property
    def makespans_ms(self) -> dict[str, float]:
        """The makespan of every schedule; none of a queue longer than `MAX_PREDICTED`."""
        if len(self._tasks) > MAX_PREDICTED:
            return {}
        in_johnsons_order = self._busy_times(self.in_order(Schedule.JOHNSON))
        busy = {Schedule.FIFO: self._busy_as_given, Schedule.JOHNSON: in_johnsons_order}
        side_by_side = self._settings.side_by_side
        return {str(schedule): self._factor * makespan_ms(times, side_by_side) for schedule, times in busy.items()}

    def learn(self, makespan_ms: float) -> None:
        """Record what the makespan was, where this is a kind of queue whose stages teach nothing about it."""
        if self._settings.learns and self._key and self.makespans_ms:
            predicted_ms = self.makespans_ms[self._settings.schedule] / self._factor
            corrections = Corrections.load()
            for _ in range(MIN_SAMPLES):  # the sum of many tasks is no single sample
                corrections.learn(self._key, predicted_ms, makespan_ms)
            corrections.save()

    @cached_property
    def _busy_as_given(self) -> list[StageTimes]:
        if len(self._tasks) > MAX_PREDICTED:  # the order must not take long
            return [self._plans[task.model].best.busy for task in self._tasks]
        return self._busy_times(self._tasks)

    def _busy_times(self, tasks: Sequence[QueuedTask]) -> list[StageTimes]:
        """Return how long each task is predicted to keep the stages busy, in this order."""
        chooser, pipeline, busy = self._settings.chooser(tasks), IDLE, []
        for _ in tasks:
            busy.append(chooser.choose(self._plans.__getitem__, pipeline.from_now()).candidate.busy)
            pipeline = pipeline.after(busy[-1], self._settings.side_by_side)
        return busy
