"""A queue of tasks on the edge: each planned for the link of the moment, and edge, uplink and cloud busy at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from deployment import Candidate, SplitPlan, plan_split
from edge_task import StageKeys, Task, cloud_latencies, edge_latencies, request_of, stage_keys
from models.cuts import pack_nodes
from models.zoo import Network, WeightsSource, input_size, load_network, model_graph
from net.bandwidth import LinkEstimate
from net.link_watch import LinkNow, LinkWatch
from net.messages import Prepare
from net.session import EdgeSession, OnCloudLoss
from net.stream import Answered, TaskStream
from predictor.chain_search import Objective
from predictor.correction import Corrections
from predictor.flow_shop import IDLE, Pipeline, Schedule, choose_cuts, makespan_ms, order_of
from predictor.latencies import LayerLatencies
from predictor.strategies import Strategy
from utils.errors import ConnectError, NeurosurgeonError
from utils.images import read_image
from utils.inference_utils import HalfResult, check_crossing, image_input, random_input, run_half
from utils.queue_report import QueueReport
from utils.queue_tasks import QueuedTask, Span, TaskResult
from utils.report import output_digest
from utils.timing import StageTimes, now_ms

log = logging.getLogger(__name__)

QUEUE_DIGITS, FACTOR_DIGITS = 0, 2  # a plan is made anew for changes of a ms, or a percent
RATE_DIGITS, EXCHANGE_DIGITS = 3, 1  # of the link: a few per mille, and a tenth of a ms
MAX_PREDICTED = 2000  # tasks of a queue whose makespan is predicted: some 0.1 ms each
HORIZON = 40  # tasks of a queue that are thought of together
RETHINK = 8  # tasks after which they are thought over, in 2 ms; the first time takes 10
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
    deadline_ms: float | None = None  # of each task

    def chooser(self, tasks: Sequence[QueuedTask]) -> Chooser:
        """Return what chooses the cuts of these tasks."""
        return Chooser(self.objective, [task.model for task in tasks], self.in_flight)

    def task(self, model: str) -> Task:
        """Return these settings as those of a single task."""
        return Task(
            model=model,
            weights=self.weights.get(model, WeightsSource()),
            device=self.device,
            threads=self.threads,
            predictor=self.predictor,
            edge_config=self.edge_config,
            cloud_config=self.cloud_config,
        )


# ---------------------------------------------------------------- models, ready to be planned and run


class QueueModel:
    """One model of the queue: its network, and what its layers take on both sides.

    A queue cuts behind any layer, in execution order, so that a cut has the same number in every plan; inside the
    blocks of a graph there may be better ones (`Strategy.DADS`), which only a single task looks for.
    """

    def __init__(self, network: Network, edge: LayerLatencies, cloud: LayerLatencies, keys: StageKeys) -> None:
        self.network = network
        self.keys = keys
        self._edge = edge
        self._cloud = cloud
        self._known: tuple[object, ...] | None = None  # what the last plan was made of
        self._plan: SplitPlan
        self._cuts_run: set[frozenset[int]] = set()

    def plan(self, now: LinkNow, corrections: Corrections, settings: QueueSettings) -> SplitPlan:
        """Return the plan for the link of the moment; while nothing changes, the same one."""
        queue_ms = round(now.queue_ms, QUEUE_DIGITS) if settings.hears_load else 0.0
        edge, transfer, cloud = (round(corrections.factor(key), FACTOR_DIGITS) for key in self.keys)
        rate_bytes_per_s = float(f"{now.link.rate_bytes_per_s:.{RATE_DIGITS}g}")
        exchange_ms = round(now.link.exchange_ms, EXCHANGE_DIGITS)
        known = (rate_bytes_per_s, exchange_ms, queue_ms, edge, transfer, cloud)
        if known != self._known:
            self._known = known
            self._plan = plan_split(
                self.network.graph,
                self._edge.scaled(edge),
                self._cloud.scaled(cloud),
                rate_bytes_per_s,
                exchange_ms,
                transfer,
                queue_ms=queue_ms,
                objective=settings.objective,
                strategy=Strategy.NEUROSURGEON,
            )
        return self._plan

    def is_first_run(self, edge_nodes: frozenset[int]) -> bool:
        """Return whether this cut runs for the first time: such a run also builds kernels, and teaches nothing."""
        is_first = edge_nodes not in self._cuts_run
        self._cuts_run.add(edge_nodes)
        return is_first


class Chooser:
    """Chooses the cuts of a queue of models, one task after the other."""

    def __init__(self, objective: Objective, queue: Sequence[str], in_flight: int | None = None) -> None:
        self._objective = objective
        self._queue = queue
        self._in_flight = in_flight
        self._position = 0  # in the queue
        self._last: dict[str, Candidate] = {}  # latency: of each model
        self._ahead: list[int] = []  # throughput: candidates of the tasks since they were last thought over, and after

    def choose(self, plan_of: Callable[[str], SplitPlan], under_way: Pipeline = IDLE) -> Choice:
        """Return how to run the next task.

        For throughput, with the cut with which the tasks ahead are finished first. For latency, with that of the
        model's last task, unless another pays.

        Args: under_way: what link and cloud are still busy with.
        """
        plan = plan_of(self._queue[self._position])
        if self._objective is Objective.THROUGHPUT:
            if self._position % RETHINK == 0:
                self._think_over(plan_of, under_way)
            index = min(self._ahead[self._position % RETHINK], len(plan.candidates) - 1)
        else:
            index = self._last_unless_another_pays(plan, under_way)
        self._position += 1
        return choice(plan, index, under_way)

    def _think_over(self, plan_of: Callable[[str], SplitPlan], under_way: Pipeline) -> None:
        ahead = [plan_of(model).candidates for model in self._queue[self._position :][:HORIZON]]
        busy = {id(candidates): [candidate.busy for candidate in candidates] for candidates in ahead}
        options = [busy[id(candidates)] for candidates in ahead]
        known = zip(self._ahead[RETHINK:], options, strict=False)  # a plan may have a cut less than the one before
        start = [min(index, len(option) - 1) for index, option in known]
        self._ahead = choose_cuts(options, under_way, self._in_flight, start)

    def _last_unless_another_pays(self, plan: SplitPlan, under_way: Pipeline) -> int:
        indices = range(len(plan.candidates))
        totals_ms = [choice(plan, index, under_way).predicted.total_ms for index in indices]
        best = min(indices, key=totals_ms.__getitem__)
        last = self._last.get(plan.graph.model)
        same = (index for index in indices if last and plan.candidates[index].is_same_cut(last))
        index = next((index for index in same if totals_ms[best] >= (1 - MIN_GAIN) * totals_ms[index]), best)
        self._last[plan.graph.model] = plan.candidates[index]
        return index


class Choice(NamedTuple):
    """A cut for one task."""

    plan: SplitPlan
    candidate: Candidate
    predicted: StageTimes  # with the waits for what is under way


def choice(plan: SplitPlan, index: int, under_way: Pipeline) -> Choice:
    """Return what a candidate means for a task that begins now."""
    candidate = plan.candidates[index]
    return Choice(plan, candidate, under_way.with_waits(candidate.stages, candidate.busy))


def within(chosen: Choice, deadline_ms: float | None, under_way: Pipeline) -> Choice:
    """Return what was chosen where it makes the deadline, else the fastest cut: in time, or the best effort."""
    if deadline_ms is None or chosen.predicted.total_ms <= deadline_ms:
        return chosen
    choices = [choice(chosen.plan, point, under_way) for point in range(len(chosen.plan.candidates))]
    return min(choices, key=lambda other: other.predicted.total_ms)


def prepare_models(
    names: Iterable[str], settings: QueueSettings, session: EdgeSession, link: LinkEstimate
) -> dict[str, QueueModel]:
    """Return every model of the queue, ready on both sides, with the same weights.

    Raises: WeightsError, NetworkError, PlanningError.
    """
    models: dict[str, QueueModel] = {}
    for name in tqdm(sorted(set(names)), desc="models", unit="model", leave=False, disable=None):
        task = settings.task(name)
        graph = model_graph(name)
        session.ask_to_prepare(Prepare(name, pack_nodes(graph, graph.edge_nodes(0)), graph.digest))
        network = load_network(name, task.weights, task.device)  # while the cloud does the same
        session.wait_until_ready(network.weights_digest)
        edge, cloud = edge_latencies(task, network.graph), cloud_latencies(task, session, network.graph)
        models[name] = QueueModel(network, edge, cloud, stage_keys(task, session, link, is_warm=True))
    return models


def in_order(
    tasks: Sequence[QueuedTask], models: Mapping[str, QueueModel], link: LinkEstimate, settings: QueueSettings
) -> tuple[list[QueuedTask], dict[str, float]]:
    """Return the tasks in the order of the schedule, and the makespan (ms) that is predicted of every schedule.

    Of a queue longer than `MAX_PREDICTED` none is predicted: it would begin late, and end unlike all predictions.
    """
    now, nothing_learnt = LinkNow(link, is_stale=False, queue_ms=0.0), Corrections()
    plans = {name: model.plan(now, nothing_learnt, settings) for name, model in models.items()}
    is_long = len(tasks) > MAX_PREDICTED
    busy = [plans[task.model].best.busy for task in tasks] if is_long else _busy_times(tasks, plans, settings)
    orders = {schedule: [tasks[index] for index in order_of(schedule, busy)] for schedule in Schedule}
    predicted = {
        str(schedule): makespan_ms(_busy_times(ordered, plans, settings), settings.in_flight)
        for schedule, ordered in orders.items()
        if not is_long
    }
    return orders[settings.schedule], predicted


def _busy_times(
    tasks: Sequence[QueuedTask], plans: Mapping[str, SplitPlan], settings: QueueSettings
) -> list[StageTimes]:
    """Return how long each task is predicted to keep the stages busy, in this order."""
    chooser, pipeline, busy = settings.chooser(tasks), IDLE, []
    for _ in tasks:
        busy.append(chooser.choose(plans.__getitem__, pipeline.from_now()).candidate.busy)
        pipeline = pipeline.after(busy[-1], settings.in_flight)
    return busy


# ---------------------------------------------------------------- the queue at work


@dataclass(frozen=True, slots=True)
class _Begun:
    """A task whose edge half has run."""

    model: QueueModel
    candidate: Candidate
    edge_nodes: frozenset[int]
    half: HalfResult
    known: TaskResult  # all that is known so far
    teaches: bool


class QueueRun:
    """Works through tasks: this thread computes edge halves, a stream sends them and brings the answers.

    At most ``in_flight`` tasks are begun and without an answer: each holds a slot until its result is there.
    """

    def __init__(
        self,
        settings: QueueSettings,
        models: Mapping[str, QueueModel],
        stream: TaskStream,
        watch: LinkWatch,
        report: QueueReport,
    ) -> None:
        self._settings = settings
        self._models = models
        self._stream = stream
        self._watch = watch
        self._report = report
        self._corrections = Corrections.load() if settings.learns else Corrections()
        self._under_way: set[int] = set()  # tasks without an answer
        self._pipeline, self._pipeline_ms = IDLE, 0.0  # what link and cloud were still busy with at that time
        self._lock = threading.Lock()
        self._results: list[TaskResult] = []
        self._slots: SimpleQueue[_Begun | None] = (
            SimpleQueue()
        )  # a slot comes back free, or with a task of a lost cloud
        self._finished: SimpleQueue[tuple[TaskResult, Tensor | None] | None] = SimpleQueue()
        self._random_inputs = {name: random_input(model.network.graph.input.shape) for name, model in models.items()}
        self.makespan_ms = 0.0
        self._start_ms = now_ms()
        for _ in range(settings.in_flight):
            self._slots.put(None)

    def run(self, tasks: Sequence[QueuedTask], should_stop: Callable[[], bool] = lambda: False) -> list[TaskResult]:
        """Return the results of the tasks, in the order in which they came; stops early with what is in flight."""
        self._start_ms = now_ms()
        chooser = self._settings.chooser(tasks)
        reporter = threading.Thread(target=self._report_all, name="reporter", daemon=True)
        reporter.start()
        for task in tasks:
            self._wait_for_slot()
            if should_stop():
                self._slots.put(None)
                break
            self._begin(task, chooser)
        for _ in range(self._settings.in_flight):
            self._wait_for_slot()
        self.makespan_ms = now_ms() - self._start_ms
        self._finished.put(None)
        reporter.join()
        if self._settings.learns:
            self._corrections.save()
        return self._results

    def _wait_for_slot(self) -> None:
        while begun := self._slots.get():
            self._run_here(begun)

    def _begin(self, task: QueuedTask, chooser: Chooser) -> None:
        try:
            now = self._watch.now()
            self._report.show_state(now.link.rate_bytes_per_s, now.queue_ms)
            chosen = self._choose(chooser, now)
            tensor = self._random_inputs[task.model]
            if task.image:
                tensor = image_input(read_image(task.image, input_size(task.model)))
            begun = self._run_edge_half(task, tensor, now, chosen)
        except NeurosurgeonError as exc:
            self._finish(TaskResult(task, error=str(exc)))
            return
        if not begun.candidate.crossing_bytes:
            self._finish(replace(begun.known, where="edge"), begun.half.tensors[0])
            return
        self._pipeline = self._pipeline_now().after(replace(begun.candidate.busy, edge_ms=0.0))
        self._under_way.add(task.id)
        request = request_of(begun.model.network, begun.edge_nodes)
        answer = self._stream.submit(task.id, request, begun.half.tensors)
        answer.add_done_callback(partial(self._take_answer, begun))

    def _pipeline_now(self) -> Pipeline:
        """Return what link and cloud are still busy with, as predicted when each task was sent."""
        before_ms, self._pipeline_ms = self._pipeline_ms, now_ms()
        passed = self._pipeline._replace(edge_ms=self._pipeline_ms - before_ms)
        self._pipeline = passed.from_now() if self._under_way else IDLE
        return self._pipeline

    def _choose(self, chooser: Chooser, now: LinkNow) -> Choice:
        pipeline = self._pipeline_now()
        with self._lock:
            chosen = chooser.choose(
                lambda model: self._models[model].plan(now, self._corrections, self._settings), pipeline
            )
        runs_here = self._settings.on_cloud_loss is OnCloudLoss.LOCAL and not self._stream.takes_tasks
        if runs_here:
            return choice(chosen.plan, -1, pipeline)
        return within(chosen, self._settings.deadline_ms, pipeline)

    def _run_edge_half(self, task: QueuedTask, tensor: Tensor, now: LinkNow, chosen: Choice) -> _Begun:
        model, (plan, candidate, predicted) = self._models[task.model], chosen
        edge_nodes = plan.edge_nodes(candidate)
        teaches = self._settings.learns and not model.is_first_run(edge_nodes)
        start_ms = now_ms()
        half = run_half(model.network.split(edge_nodes).edge, [tensor], self._settings.device)
        known = TaskResult(
            task,
            point=candidate.point,
            layer=candidate.layer,
            layers=len(plan.graph.layers),
            rate_bytes_per_s=now.link.rate_bytes_per_s,
            rate_age_s=now.link.age_s,
            rate_is_stale=now.is_stale,
            best_total_ms=plan.best.stages.total_ms,
            predicted=predicted,
            deadline_ms=self._settings.deadline_ms,
            measured=StageTimes(half.latency_ms, 0.0, 0.0),
            spans=(self._span(start_ms, now_ms()),),
        )
        if teaches:
            self._learn(model.keys.edge, candidate.busy.edge_ms, half.latency_ms)
        return _Begun(model, candidate, edge_nodes, half, known, teaches)

    # ------------------------------------------------------------ answers, on the stream's threads

    def _take_answer(self, begun: _Begun, answer: Future[Answered]) -> None:
        try:
            result, output = self._answered_there(begun, answer.result())
        except NeurosurgeonError as exc:
            if isinstance(exc, ConnectError) and self._settings.on_cloud_loss is OnCloudLoss.LOCAL:
                log.warning("task %d is computed here: %s", begun.known.task.id, exc)
                self._slots.put(begun)
            else:
                self._finish(replace(begun.known, error=str(exc)))
        else:
            self._finish(result, output)

    def _answered_there(self, begun: _Begun, answered: Answered) -> tuple[TaskResult, Tensor]:
        remote = answered.result
        check_crossing([begun.model.network.graph.output], remote.tensors)
        self._watch.saw_transfer(remote.sent_bytes, remote.receive_ms)
        self._watch.saw_load(remote.load_queue_ms)
        if self._settings.in_flight == 1:  # otherwise tensors also wait for each other
            output_bytes = begun.model.network.graph.output.size_bytes
            self._watch.saw_exchange(remote.transfer_ms - remote.receive_ms, output_bytes)
        if begun.teaches:
            self._learn(begun.model.keys.cloud, begun.candidate.busy.cloud_ms, remote.compute_ms)
            if self._settings.in_flight == 1:  # otherwise tensors also wait for each other
                self._learn(begun.model.keys.transfer, begun.candidate.stages.transfer_ms, remote.transfer_ms)
        known, done_ms = begun.known, answered.answered_ms
        result = replace(
            known,
            measured=StageTimes(known.measured.edge_ms, remote.transfer_ms, remote.cloud_ms),
            spans=(
                *known.spans,
                self._span(answered.sent_ms, answered.sent_ms + remote.transfer_ms),
                self._span(done_ms - remote.compute_ms, done_ms),
            ),
            retries=answered.retries,
            where="split" if begun.candidate.point else "cloud",
        )
        return result, remote.tensors[0]

    # ------------------------------------------------------------ answers of this side

    def _run_here(self, begun: _Begun) -> None:
        """Run the rest of a task that the cloud was lost with."""
        half = run_half(begun.model.network.split(begun.edge_nodes).cloud, begun.half.tensors, self._settings.device)
        edge_ms = begun.known.measured.edge_ms + half.latency_ms
        self._finish(replace(begun.known, where="edge", measured=StageTimes(edge_ms, 0.0, 0.0)), half.tensors[0])

    # ------------------------------------------------------------ bookkeeping

    def _finish(self, result: TaskResult, output: Tensor | None = None) -> None:
        self._under_way.discard(result.task.id)
        if result.spans:
            result = replace(result, elapsed_ms=now_ms() - self._start_ms - result.spans[0].start_ms)
        self._slots.put(None)  # first: the next task need not wait for lines to be printed
        self._finished.put((result, output))

    def _report_all(self) -> None:
        while finished := self._finished.get():
            result, output = finished
            if output is not None:
                result = replace(result, output_digest=output_digest(output), top1=int(output.argmax()))
            self._results.append(result)
            self._report.task_done(result)

    def _learn(self, key: str, predicted_ms: float, measured_ms: float) -> None:
        with self._lock:
            self._corrections.learn(key, predicted_ms / self._corrections.factor(key), measured_ms)

    def _span(self, start_ms: float, end_ms: float) -> Span:
        return Span(start_ms - self._start_ms, end_ms - self._start_ms)
