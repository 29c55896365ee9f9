"""A queue of tasks on the edge: edge, uplink and cloud work at once, and every task is answered exactly once.

Theory of operation. Two threads carry the tasks.

- The main loop (the thread that calls `QueueRun.run`) owns every task's record, plans, and runs partitions: the edge's,
  and the rest of tasks that come back. It alone calls `on_event`, and executes the commands.
- The link (`edge.link_thread.TaskStream`) owns the socket: it sends, receives and reconnects. It puts what it returns
  for a task, a reply or the error in its place, into a queue of outcomes, from which the main loop takes it.

Beside them a thread reads images ahead, one measures the link (`net.link_watch`), and one makes and prints results
(`edge.results`).

A task is in one of five states, and its first answer counts (`edge.task_states`). At most ``in_flight`` tasks are in a
state that is not final. The main loop does, in this order: take outcomes; compute the rest of a task that is LOCAL;
begin the next task, if fewer than ``in_flight`` are unfinished; else wait for an outcome, and check transfer progress
every `POLL_S`.

A partition that takes long runs as blocks. Between two of them the main loop takes outcomes, and plans again every
`REPLAN_MS`: an edge partition is left for another cut, the rest of a lost task for the cloud, where that is clearly
faster by now; the rest of a task that the cloud has answered is dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import numpy as np

from neurosurgeon.edge.cuts import QueueModel, QueuePlanner, StageFactors, chooser_of
from neurosurgeon.edge.inputs import load_image
from neurosurgeon.edge.link_thread import Answered, TaskStream
from neurosurgeon.edge.records import QueuedTask, QueueObserver, QueueStarted, TaskResult
from neurosurgeon.edge.results import PlannedTask, Results, reason
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.edge.task import check_reply
from neurosurgeon.edge.task_states import (
    FINAL,
    Broke,
    CloudBack,
    Command,
    Event,
    NotSent,
    PartDone,
    Progress,
    Refused,
    Replied,
    RestDone,
    State,
    TaskRecord,
    on_event,
)
from neurosurgeon.engine.base import Engine, PartitionResult, Side
from neurosurgeon.graph.spec import Array, synthetic_input
from neurosurgeon.net.link_watch import LinkWatch
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Pipeline
from neurosurgeon.planner.plan import Candidate
from neurosurgeon.planner.queue import Chooser, plan_resend, replan_whole_task
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.timing import StageTimes, now_ms

log = logging.getLogger(__name__)

POLL_S = 0.01  # between two checks of transfer progress
IMAGES_AHEAD = 4  # tasks whose images are read or being read: a long read blocks no edge partition
REPLAN_MS = 100.0  # between two plans while a partition runs: measurements come every second
LONG_PARTITION_MS = 250.0  # a shorter edge partition ends before the next measurement
FIRST_RUN_MS = 1_000.0  # the cloud, too, builds kernels for a cut that is new to it

Outcome = Answered | NeurosurgeonError


@dataclass(slots=True, eq=False)
class InFlightTask:
    """A task that has a cut. Belongs to the main loop."""

    planned: PlannedTask
    model: QueueModel
    factors: StageFactors  # the corrections in what was predicted
    record: TaskRecord
    arrays: tuple[Array, ...] = ()  # the outputs of the edge partition
    is_first: bool = False  # of its cut

    @property
    def id(self) -> int:
        return self.planned.task.id

    @property
    def candidate(self) -> Candidate:
        return self.planned.chosen.candidate

    @property
    def edge_nodes(self) -> frozenset[int]:
        return self.planned.chosen.plan.edge_nodes(self.candidate)

    @property
    def timeout_ms(self) -> float:
        """How long its reply may take, with all waits that are known."""
        predicted = self.planned.chosen.predicted
        return predicted.transfer_ms + predicted.cloud_ms + FIRST_RUN_MS * self.is_first


class _Interval:
    """Returns once every `REPLAN_MS` that it is time to plan again."""

    def __init__(self) -> None:
        self._start_ms = now_ms()

    def is_over(self) -> bool:
        if now_ms() - self._start_ms < REPLAN_MS:
            return False
        self._start_ms = now_ms()
        return True


def images_ahead(
    tasks: Iterable[QueuedTask], models: Mapping[str, QueueModel]
) -> Iterator[tuple[QueuedTask, Callable[[], Array]]]:
    """Yield every task, and a function that returns its input; a thread reads the next few images ahead."""
    reader = ThreadPoolExecutor(1, "images")
    try:
        synthetic = {name: synthetic_input(model.graph.input) for name, model in models.items()}
        ready: deque[tuple[QueuedTask, Callable[[], Array]]] = deque()
        for task in tasks:
            if task.image:
                size = models[task.model].graph.input.shape[-1]
                ready.append((task, reader.submit(load_image, task.image, size).result))
            else:
                array = synthetic[task.model] if task.array is None else task.array
                ready.append((task, partial(np.asarray, array)))
            if len(ready) > IMAGES_AHEAD:
                yield ready.popleft()
        yield from ready
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


class QueueRun:
    """Works through tasks; see the head of this file. The main loop owns all of it; the link puts into `_outcomes`."""

    def __init__(
        self,
        settings: QueueSettings,
        models: Mapping[str, QueueModel],
        link: TaskStream,
        watch: LinkWatch,
        observe: QueueObserver,
    ) -> None:
        self._settings = settings
        self._models = models
        self._link = link
        self._watch = watch
        self._observe = observe
        self._results = Results(observe, settings.deadline_ms)
        self._corrections = Corrections.load() if settings.learns else Corrections()
        self._planner = QueuePlanner(settings, models, self._corrections)
        self._tasks: dict[int, InFlightTask] = {}  # without a result, or still to be replied to; the oldest first
        self._outcomes: SimpleQueue[tuple[InFlightTask, Outcome]] = SimpleQueue()
        self.makespan_ms = 0.0

    def run(self, tasks: Sequence[QueuedTask], should_stop: Callable[[], bool] = lambda: False) -> list[TaskResult]:
        """Return the results of the tasks, in the order in which they came; stops early with what is in flight."""
        chooser = chooser_of(tasks, self._settings)
        self._observe(QueueStarted(tasks))
        with self._results:
            for task, read_input in images_ahead(tasks, self._models):
                self._wait_for_results(at_most=self._settings.in_flight - 1)
                if should_stop() or self._results.are_lost:
                    break
                self._begin(task, read_input, chooser)
            self._wait_for_results(at_most=0)
            self.makespan_ms = self._results.elapsed_ms
        if self._settings.learns:
            self._corrections.save()
        return self._results.reported

    def check_speed(self, engine: Engine) -> None:
        """Have this machine's speed measured again if the tasks contradict its predictions."""
        if self._settings.learns and self._settings.predictor != "measured":
            for model in self._models.values():
                engine.check_speed(self._corrections.factor(model.keys.edge), engine.threads)

    def _wait_for_results(self, at_most: int) -> None:
        """Return when at most so many tasks are without a result, and the rest of none is to be computed here."""
        self._take_outcomes()
        while True:
            unfinished = [task for task in self._tasks.values() if task.record.state not in FINAL]
            local = next((task for task in unfinished if task.record.state is State.LOCAL), None)
            if local:
                self._finish_here(local)
            elif len(unfinished) <= at_most:
                return
            else:
                self._wait_for_outcome()

    def _wait_for_outcome(self) -> None:
        hedges = self._settings.hedges_tasks
        try:
            self._handle(*self._outcomes.get(timeout=POLL_S if hedges else None))
        except Empty:
            self._check_progress()
        else:
            self._take_outcomes()

    def _take_outcomes(self) -> None:
        """Handle all that the link has returned."""
        while not self._outcomes.empty():
            self._handle(*self._outcomes.get())

    # ------------------------------------------------------------ events and commands

    def _handle(self, task: InFlightTask, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, Answered):
                check_reply([task.model.graph.output], outcome.result.arrays)
                self._update_estimates(task, outcome)
        except NeurosurgeonError as exc:
            outcome = exc
        except Exception as exc:  # an internal error: the task must not be waited for
            self._fail(task, Broke(exc))
            return
        if isinstance(outcome, Answered):
            self._apply(task, Replied(), partial(self._results.answered, task.planned, outcome))
            return
        self._fail(task, Refused(outcome))
        if task.record.state is State.LOCAL and not task.record.is_hedged:
            log.warning("task %d is computed here: %s", task.id, outcome)

    def _fail(self, task: InFlightTask, event: Refused | Broke) -> None:
        error = reason(event.error, task.planned.task)
        self._apply(task, event, partial(self._results.finish, task.planned, error=error))

    def _apply(self, task: InFlightTask, event: Event, report: Callable[[], None] = lambda: None) -> None:
        """Let an event change the state of a task, and execute what follows.

        Args: report: reports the result that comes with the event.
        """
        task.record, commands = on_event(task.record, event, now_ms())
        for command in commands:
            if command is Command.SEND:
                self._send(task)
            elif command is Command.WITHDRAW and not self._link.withdraw(task.id):
                self._apply(task, NotSent())
            elif command is Command.REPORT:
                report()
        if task.record.state in FINAL and not task.record.awaits_reply:
            self._tasks.pop(task.id, None)

    def _send(self, task: InFlightTask) -> None:
        others = self._awaited(but=task)
        self._planner.count_sent(task.candidate, self._pipeline_now(others))
        if not others:  # the bytes of others are on a link that may be slow just now
            self._link.pace_first_task(task.planned.now.link)

        def put(outcome: Outcome) -> None:
            self._outcomes.put((task, outcome))

        try:
            request = task.model.request(task.edge_nodes)
            self._link.submit(task.id, request, task.arrays, put, task.record.losses)
        except Exception as exc:  # an internal error: the task must not be waited for
            self._fail(task, Broke(exc))

    # ------------------------------------------------------------ the edge partition

    def _begin(self, queued: QueuedTask, read_input: Callable[[], Array], chooser: Chooser) -> None:
        try:
            now = self._watch.now()
            self._results.show_link(now)
            chosen = self._planner.choose(
                chooser, now, self._pipeline_now(self._awaited()), takes_tasks=self._link.takes_tasks
            )
        except Exception as exc:  # an internal error
            self._results.failed(queued, exc)
            return
        model = self._models[queued.model]
        record = TaskRecord(self._settings.on_cloud_loss is OnCloudLoss.LOCAL)
        task = self._tasks[queued.id] = InFlightTask(PlannedTask(queued, now, chosen), model, model.factors, record)
        try:
            self._run_edge_partition(task, read_input())
        except Exception as exc:  # belongs to this task: its image, a network that does not take it, or internal
            self._apply(task, Broke(exc), partial(self._results.failed, queued, exc))
            return
        done = PartDone(task.candidate.boundary_bytes > 0, task.planned.chosen.rest_ms, task.timeout_ms)
        self._apply(task, done, partial(self._results.finish, task.planned, task.arrays[0], where="edge"))

    def _run_edge_partition(self, task: InFlightTask, array: Array) -> None:
        """Compute the edge partition; of another cut, if re-planning meanwhile finds one that is clearly faster."""
        start_ms, look = now_ms(), _Interval()
        is_long = task.candidate.busy.edge_ms > LONG_PARTITION_MS
        may_replan = self._settings.hedges_tasks and self._settings.objective is Objective.LATENCY
        better: list[PlannedTask] = []

        def keep_going() -> bool:
            self._take_outcomes()
            if may_replan and self._link.takes_tasks and look.is_over():
                if found := self._find_better(task, now_ms() - start_ms):
                    better.append(found)
            return not better

        result = self._edge_result(task, array, keep_going if is_long else None)
        dropped_ms = 0.0
        while result is None:  # once
            log.info("task %d starts again with another cut: the link estimate has changed", task.id)
            dropped_ms = now_ms() - start_ms
            task.planned, task.factors = better[0], task.model.factors
            result = self._edge_result(task, array, None)
        task.arrays = result.arrays
        task.is_first = task.model.is_first_run(task.edge_nodes)
        if self._settings.learns and not task.is_first:
            self._corrections.learn(
                task.model.keys.edge, task.candidate.busy.edge_ms / task.factors.edge, result.compute_ms
            )
        task.planned = task.planned._replace(
            edge_ms=dropped_ms + result.compute_ms, start_ms=start_ms, done_ms=now_ms()
        )

    def _edge_result(
        self, task: InFlightTask, array: Array, keep_going: Callable[[], bool] | None
    ) -> PartitionResult | None:
        if len(task.edge_nodes) == 1:  # the input alone, which is sent as it is
            return PartitionResult((array,), 0.0)
        # A network may work in place; the synthetic input belongs to all tasks.
        return task.model.partition(task.edge_nodes, Side.EDGE).run([array.copy("K")], keep_going)

    def _find_better(self, task: InFlightTask, elapsed_ms: float) -> PlannedTask | None:
        """Return the task with another cut, if starting over with that is clearly faster by now."""
        now, planned = self._watch.now(), task.planned
        plan = self._planner.plan(planned.task.model, now)
        chosen = replan_whole_task(planned.chosen, elapsed_ms, plan, self._pipeline_now(self._awaited()))
        return planned._replace(now=now, chosen=chosen) if chosen else None

    # ------------------------------------------------------------ tensors in flight

    def _awaited(self, but: InFlightTask | None = None) -> list[InFlightTask]:
        """Return the tasks that the link owes an outcome, the oldest first."""
        return [task for task in self._tasks.values() if task.record.awaits_reply and task is not but]

    def _pipeline_now(self, awaited: Sequence[InFlightTask]) -> Pipeline:
        """Return for how long link and cloud are still busy."""
        if not awaited:
            return self._planner.pipeline_now(None)
        left_ms = 0.0
        if self._settings.hedges_tasks:
            left_bytes, hedging, time_ms = self._watch_transfers(), self._planner.hedging, now_ms()
            records = [(task.record, left_bytes.get(task.id, 0)) for task in awaited]
            ways = [hedging.progress_of(time_ms, record.sent_ms, record.timeout_ms, left) for record, left in records]
            left_ms = max(way.left_ms for way in ways)
        return self._planner.pipeline_now(left_ms)

    def _watch_transfers(self) -> Mapping[int, int]:
        """Record how far the tensors are; return how many bytes are left until each task's last one is acknowledged."""
        crossing, hedging = self._link.crossing(), self._planner.hedging
        left_bytes = crossing.left_bytes if crossing else {}
        waiting_bytes = max(left_bytes.values(), default=0)
        if crossing:
            hedging.record_progress(now_ms(), crossing.acked_bytes, waiting_bytes, self._watch.now().link.rtt_ms)
        if moved := hedging.recent_transfer():
            self._watch.record_progress(*moved, waiting_bytes)
        return left_bytes

    def _check_progress(self) -> None:
        """Take over the oldest task that is stalled, and is finished sooner here; its loss is none from now on."""
        left_bytes = self._watch_transfers()
        for task in self._awaited():
            was_sent = task.record.state is State.SENT
            self._apply(task, Progress(self._planner.hedging, left_bytes.get(task.id, 0)))
            if was_sent and task.record.state is State.LOCAL:
                log.info("task %d is stalled: the rest of it is computed here", task.id)
                return

    def _update_estimates(self, task: InFlightTask, answered: Answered) -> None:
        """Let a reply correct what is known of the link, the cloud and the stages."""
        remote, model = answered.result, task.model
        self._watch.record_transfer(remote.sent_bytes, remote.receive_ms)
        self._watch.record_load(remote.load_queue_ms)
        is_alone = self._settings.in_flight == 1 and not task.record.is_hedged  # else tensors wait for each other
        if is_alone:
            self._watch.record_exchange(remote.transfer_ms - remote.receive_ms, model.graph.output.size_bytes)
        if self._settings.learns and not task.is_first:
            keys, factors, candidate = model.keys, task.factors, task.candidate
            self._corrections.learn(keys.cloud, candidate.busy.cloud_ms / factors.cloud, remote.compute_ms)
            if is_alone:
                predicted_ms = candidate.stages.transfer_ms / factors.transfer
                self._corrections.learn(keys.transfer, predicted_ms, remote.transfer_ms)

    # ------------------------------------------------------------ the rest of a task, on this side

    def _finish_here(self, task: InFlightTask) -> None:
        """Compute the rest of a task that is stalled or lost, unless the cloud is sooner after all."""
        start_ms, look = now_ms(), _Interval()

        def keep_going() -> bool:
            self._take_outcomes()
            may_resend = self._settings.hedges_tasks and task.record.may_be_sent_again
            if may_resend and self._link.takes_tasks and look.is_over():
                self._look_for_cloud(task, start_ms)
            return task.record.state is State.LOCAL

        try:
            # A network may work in place, while the arrays are still being sent from their own memory.
            arrays = [array.copy("K") for array in task.arrays]
            result = task.model.partition(task.edge_nodes, Side.CLOUD).run(arrays, keep_going)
        except Exception as exc:  # belongs to this task
            self._fail(task, Broke(exc))
            return
        self._take_outcomes()  # the reply may have come first
        is_first = result is not None and task.record.state is State.LOCAL
        if result:
            waited_ms = task.planned.lost_ms + start_ms - task.record.sent_ms
            measured = StageTimes(task.planned.edge_ms + result.compute_ms, waited_ms, 0.0)
            finish = partial(self._results.finish, task.planned, result.arrays[0], where="edge", measured=measured)
            self._apply(task, RestDone(), finish)
        if task.record.is_hedged:
            self._planner.hedging.record_outcome(was_first=is_first)

    def _look_for_cloud(self, task: InFlightTask, rest_start_ms: float) -> None:
        """Send a lost task again, if that is clearly faster by now than to compute the rest of it here."""
        now, planned = self._watch.now(), task.planned
        plan = self._planner.plan(planned.task.model, now)
        time_ms = now_ms()
        pipeline = self._pipeline_now(self._awaited())
        chosen = plan_resend(planned.chosen, time_ms - rest_start_ms, plan, pipeline)
        if chosen is None:
            return
        log.info("task %d is sent again: the cloud is reconnected", task.id)
        lost_ms, rest_ms = rest_start_ms - task.record.sent_ms, time_ms - rest_start_ms
        predicted = chosen.predicted._replace(
            edge_ms=planned.chosen.predicted.edge_ms + rest_ms,
            transfer_ms=lost_ms + chosen.predicted.transfer_ms,
        )
        task.planned = planned._replace(
            now=now, chosen=chosen._replace(predicted=predicted), edge_ms=planned.edge_ms + rest_ms, lost_ms=lost_ms
        )
        task.factors = task.model.factors
        self._apply(task, CloudBack(task.timeout_ms))
