"""The models of a queue, ready on both sides, and their plans for the current link estimate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from neurosurgeon.edge.inputs import NetworkInputs, inputs_of
from neurosurgeon.edge.labels import check_labels
from neurosurgeon.edge.records import Progress, QueuedTask, QueueObserver
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.edge.stages import StageKeys, cloud_latencies, edge_latencies, stage_keys
from neurosurgeon.engine.base import Engine, Network, Partition, Side
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.net.link_watch import LinkNow
from neurosurgeon.net.messages import Prepare
from neurosurgeon.net.session import EdgeSession, OnCloudLoss
from neurosurgeon.net.sockets import is_this_machine
from neurosurgeon.planner.flow_shop import IDLE, Pipeline, Schedule, makespan_ms, order_of
from neurosurgeon.planner.hedge import Hedging
from neurosurgeon.planner.plan import Candidate, SplitPlan, plan_split
from neurosurgeon.planner.queue import Choice, Chooser, choice, cut_for_deadline
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.predictor.correction import MIN_SAMPLES, Corrections
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.store import dataset_threads
from neurosurgeon.utils.link import LinkEstimate
from neurosurgeon.utils.timing import StageTimes, now_ms

MAX_PREDICTED = 2000  # tasks of a queue whose makespan is predicted: 0.2 to 0.4 ms each


class StageFactors(NamedTuple):
    """The corrections of the three stages with which a task was planned; its own correction is relative to them."""

    edge: float
    transfer: float
    cloud: float


class QueueModel:
    """A model of the queue: its network, its partitions that were used, and the latencies of its layers on both sides.

    A queue cuts after any layer, in execution order, so that a cut has the same number in every plan. Inside the
    blocks of a graph there may be better cuts (`Strategy.DADS`), which only a single task considers. Belongs to the
    main loop (`edge.queue`).
    """

    def __init__(
        self,
        network: Network,
        edge: LayerLatencies,
        cloud: LayerLatencies,
        keys: StageKeys,
        inputs: NetworkInputs,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.labels = labels or network.ref.labels  # of its classes; None: unknown
        self.keys = keys
        self.inputs = inputs
        self.network = network
        self._edge = edge
        self._cloud = cloud
        self._planned_for: tuple[float, ...] = ()  # the rounded inputs of the last plan
        self._plan: SplitPlan
        self.factors = StageFactors(1.0, 1.0, 1.0)  # the corrections in the last plan
        self._partitions: dict[tuple[frozenset[int], Side], Partition] = {}  # some KB each; at most one a layer
        self._cuts_run: set[frozenset[int]] = set()

    @property
    def graph(self) -> LayerGraph:
        """The graph of its network."""
        return self.network.ref.graph

    @property
    def origins(self) -> dict[str, str]:
        """The machine whose data the predictions of each side use."""
        return {"edge": self._edge.origin, "cloud": self._cloud.origin}

    def plan(self, now: LinkNow, corrections: Corrections, settings: QueueSettings) -> SplitPlan:
        """Return the plan for the current link estimate; the last one, while its inputs are the same but for rounding.

        Right after a network has run, a plan of LeNet takes 0.4 ms, 8 % of its task (`tests.benchmark.gap`).
        """
        rate_bytes_per_s, exchange_ms = now.link.rate_bytes_per_s, now.link.exchange_ms
        queue_ms = now.queue_ms if settings.uses_load else 0.0
        factors = StageFactors._make(map(corrections.factor, self.keys))
        rounded = (float(f"{rate_bytes_per_s:.3g}"), round(exchange_ms, 1), round(queue_ms))
        planned_for = (*rounded, *(round(factor, 2) for factor in factors))
        if planned_for != self._planned_for:
            self._planned_for, self.factors = planned_for, factors
            self._plan = plan_split(
                self.graph,
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

    def partition(self, edge_nodes: frozenset[int], side: Side) -> Partition:
        """Return a partition of a cut. Raises: PartitionError."""
        known = self._partitions.get((edge_nodes, side))
        if known is None:
            known = self._partitions[edge_nodes, side] = self.network.partition(edge_nodes, side)
        return known

    def is_first_run(self, edge_nodes: frozenset[int]) -> bool:
        """Return whether this cut runs for the first time: such a run also builds kernels, and corrects nothing."""
        is_first = edge_nodes not in self._cuts_run
        self._cuts_run.add(edge_nodes)
        return is_first


class QueuePlanner:
    """Plans tasks for the current link estimate and the tasks in flight. Belongs to the main loop (`edge.queue`)."""

    def __init__(self, settings: QueueSettings, models: Mapping[str, QueueModel]) -> None:
        self._settings = settings
        self._models = models
        self._corrections = settings.corrections()
        self._pipeline, self._pipeline_ms = IDLE, 0.0  # the remaining busy times of link and cloud, and when they held
        self.hedging = Hedging()

    def plan(self, model: str, now: LinkNow) -> SplitPlan:
        """Return the plan of a model."""
        return self._models[model].plan(now, self._corrections, self._settings)

    def choose(self, chooser: Chooser, now: LinkNow, pipeline: Pipeline, *, takes_tasks: bool) -> Choice:
        """Return how to run the next task.

        Args: takes_tasks: whether the link does; else a task that may run on the edge alone does so.
        """
        chosen = chooser.choose(lambda model: self.plan(model, now), pipeline)
        if self._settings.on_cloud_loss is OnCloudLoss.LOCAL and not takes_tasks:
            return choice(chosen.plan, -1, pipeline)
        return cut_for_deadline(chosen, self._settings.deadline_ms, pipeline)

    def pipeline_now(self, left_ms: float | None) -> Pipeline:
        """Return the remaining busy times of link and cloud, as predicted when each task was sent.

        Args: left_ms: the remaining time of the transfers in flight, a lower bound; None: nothing is in flight.
        """
        before_ms, self._pipeline_ms = self._pipeline_ms, now_ms()
        if left_ms is None:
            return IDLE
        self._pipeline = self._pipeline._replace(edge_ms=self._pipeline_ms - before_ms).from_now()
        return self._pipeline._replace(link_ms=max(self._pipeline.link_ms, left_ms))

    def count_sent(self, candidate: Candidate, pipeline: Pipeline) -> None:
        """Add a task that is sent now to the busy times of link and cloud."""
        self._pipeline = pipeline.after(candidate.busy.beyond_edge)

    def learn(self, key: str, predicted_ms: float, measured_ms: float) -> None:
        """Correct the predictions of a stage, unless the settings forbid it; ``predicted_ms`` is uncorrected."""
        if self._settings.learns:
            self._corrections.learn(key, predicted_ms, measured_ms)

    def save_corrections(self) -> None:
        """Keep the corrections for later runs."""
        if self._settings.learns:
            self._corrections.save()

    def check_speed(self, engine: Engine) -> None:
        """Have this machine's speed measured again at the next start if the corrections contradict it."""
        if self._settings.learns and self._settings.predictor != "measured":
            for model in self._models.values():
                engine.check_speed(self._corrections.factor(model.keys.edge), engine.threads)


def prepare_models(
    names: Iterable[str],
    settings: QueueSettings,
    engine: Engine,
    session: EdgeSession,
    find_link: Callable[[], LinkEstimate],
    observe: QueueObserver,
) -> dict[str, QueueModel]:
    """Return every model of the queue, ready on both sides with the same weights. May block for seconds.

    Args:   find_link: returns the link estimate; may block for a measurement. Called after the first network is loaded.
    Raises: WeightsError, NetworkError, PlanningError.
    """
    models: dict[str, QueueModel] = {}
    names = sorted(names)
    for name in names:
        observe(Progress("models", len(models), len(names)))
        task = settings.task(name)
        graph = engine.graph(name)
        check_labels(settings.labels, graph)
        session.ask_to_prepare(Prepare(name, pack_nodes(graph, graph.edge_nodes(0)), graph.digest))
        network = engine.open(name, task.weights)  # while the cloud does the same
        session.wait_until_ready(network.ref.weights_digest)
        edge, cloud = edge_latencies(task, engine, graph), cloud_latencies(task, session, graph)
        keys = stage_keys(task, session, find_link(), edge, cloud, is_warm=True)
        if settings.in_flight > settings.side_by_side:  # stages take longer beside each other
            keys = StageKeys._make(f"side by side {key}" for key in keys)
        models[name] = QueueModel(network, edge, cloud, keys, inputs_of(engine, name), settings.labels)
    observe(Progress("models", len(names), len(names)))
    return models


def share_cores(host: str, cloud: Mapping[str, object], settings: QueueSettings) -> bool:
    """Return whether edge and cloud are one machine, and compute with more threads than that has cores.

    Args: cloud: the capabilities of its hello.
    """
    cloud_threads = cloud.get("threads")
    if not settings.device == cloud.get("device") == "cpu" or not isinstance(cloud_threads, int):
        return False
    edge_threads = settings.threads or dataset_threads("edge", "cpu")
    return edge_threads + cloud_threads > (os.cpu_count() or 1) and is_this_machine(host)


class Forecast:
    """The order and the makespan of a queue, predicted before its first task.

    If edge and cloud share their cores, the makespan is that of one task after the other: the cores have the same work
    in any order. The latencies of stages that run side by side do not add up to it, so the makespan has its own
    correction.
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
        corrections = settings.corrections()
        self._key: str | None = None
        if settings.in_flight > settings.side_by_side:
            clouds = ", ".join(sorted(model.keys.cloud for model in models.values()))
            self._key = f"makespan {settings.objective} {settings.in_flight} {clouds}"
        self._factor = corrections.factor(self._key) if self._key else 1.0
        now = LinkNow(link, is_stale=False, queue_ms=0.0)
        of_stages = Corrections() if self._key else corrections
        self._plans = {name: model.plan(now, of_stages, settings) for name, model in models.items()}

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
        """Correct the prediction by the measured makespan, if it has its own correction."""
        if self._settings.learns and self._key and self.makespans_ms:
            predicted_ms = self.makespans_ms[self._settings.schedule] / self._factor
            corrections = Corrections.load()
            for _ in range(MIN_SAMPLES):  # the sum of many tasks counts as several samples
                corrections.learn(self._key, predicted_ms, makespan_ms)
            corrections.save()

    @cached_property
    def _busy_as_given(self) -> list[StageTimes]:
        if len(self._tasks) > MAX_PREDICTED:  # the order must not take long
            return [self._plans[task.model].best.busy for task in self._tasks]
        return self._busy_times(self._tasks)

    def _busy_times(self, tasks: Sequence[QueuedTask]) -> list[StageTimes]:
        """Return how long each task is predicted to keep the stages busy, in this order."""
        settings, pipeline, busy = self._settings, IDLE, []
        chooser = Chooser(settings.objective, [task.model for task in tasks], settings.side_by_side)
        for _ in tasks:
            busy.append(chooser.choose(self._plans.__getitem__, pipeline.from_now()).candidate.busy)
            pipeline = pipeline.after(busy[-1], settings.side_by_side)
        return busy
