"""A queue of tasks on the edge: edge, uplink and cloud work at once, and every task has exactly one result.

Theory of operation. Two threads carry the tasks.

- The main loop (the thread that calls `QueueRun.run`) owns every task's record, plans, and runs partitions: the edge's,
  and the rest of LOCAL tasks. It alone calls `on_event`, and executes the commands.
- The link (`edge.link_thread.TaskStream`) owns the socket: it sends, receives and reconnects. It puts the outcome of
  each task, a reply or the error in its place, into a queue, from which the main loop takes it.

Besides, one thread reads images ahead (`edge.inputs`), one measures the link (`net.link_watch`), and one makes and
reports results (`edge.results`).

A task is in one of five states, and its first outcome counts (`edge.task_states`). At most ``in_flight`` tasks are in a
state that is not final. The main loop does, in this order: take outcomes; compute the rest of a LOCAL task; begin the
next task, if fewer than ``in_flight`` are unfinished; else wait for an outcome, and check transfer progress every
`POLL_S`. A frame of a stream is taken when its task can begin. If there is none yet, the main loop waits for an outcome
or for the next frame, which `wake` announces.

A long partition runs as blocks. Between two of them the main loop takes outcomes, and plans again every `REPLAN_MS`: if
that is clearly faster by now, an edge partition starts over with another cut, and a lost task is sent again. Once the
cloud has replied, the computation of the rest stops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from neurosurgeon.edge.cuts import QueueModel, QueuePlanner
from neurosurgeon.edge.in_flight import InFlightTask
from neurosurgeon.edge.inputs import ReadyTask, inputs_ahead
from neurosurgeon.edge.link_actions import LinkReply
from neurosurgeon.edge.link_thread import TaskStream
from neurosurgeon.edge.records import QueuedTask, QueueObserver, QueueStarted, TaskPlanned, TaskResult
from neurosurgeon.edge.results import Results, reason
from neurosurgeon.edge.settings import QueueSettings
from neurosurgeon.edge.task import check_reply, request_of
from neurosurgeon.edge.task_states import (
    FINAL,
    Command,
    EdgePartitionDone,
    Event,
    Failure,
    ProgressCheck,
    Refused,
    Replied,
    ResendPlanned,
    RestDone,
    State,
    TaskRecord,
    Withdrawn,
    on_event,
)
from neurosurgeon.engine.base import PartitionResult, Side
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.link_watch import LinkWatch
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import Pipeline
from neurosurgeon.planner.queue import Chooser, plan_resend, replan_whole_task
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.timing import StageTimes, now_ms

log = logging.getLogger(__name__)

POLL_S = 0.01  # between two checks of transfer progress
REPLAN_MS = 100.0  # between two plans while a partition runs: measurements come every second
LONG_PARTITION_MS = 250.0  # a shorter edge partition ends before the next measurement

Outcome = LinkReply | NeurosurgeonError
END = object()  # of the tasks


class QueueRun:
    """Runs the tasks of a queue; see the top of this file. Owned by the main loop; the link puts into `_outcomes`."""

    def __init__(
        self,
        settings: QueueSettings,
        models: Mapping[str, QueueModel],
        link: TaskStream,
        watch: LinkWatch,
        observe: QueueObserver,
        *,
        keeps_results: bool = True,
    ) -> None:
        self._settings = settings
        self._models = models
        self._link = link
        self._watch = watch
        self._observe = observe
        self.results = Results(observe, settings.deadline_ms, keeps=keeps_results)
        self.planner = QueuePlanner(settings, models)
        self._tasks: dict[int, InFlightTask] = {}  # without a result, or still to be replied to; the oldest first
        self._outcomes: SimpleQueue[tuple[InFlightTask, Outcome] | None] = SimpleQueue()  # None: `wake` was called

    def run(self, tasks: Sequence[QueuedTask], should_stop: Callable[[], bool] = lambda: False) -> list[TaskResult]:
        """Return the results of the tasks, in the order of their ends. May block for as long as all tasks take.

        Args:   should_stop: called before each task begins; if true, none begins, and those in flight are finished.
        Raises: OSError: the observer's output is closed.
        """
        self._observe(QueueStarted(tasks))
        ready = inputs_ahead(tasks, {name: model.inputs for name, model in self._models.items()})
        self.run_all(ready, [task.model for task in tasks], should_stop)
        return self.results.reported

    def wake(self) -> None:
        """Let the main loop ask for the next frame at once. Called on any thread."""
        self._outcomes.put(None)

    def run_all(
        self, ready: Iterator[ReadyTask | None], models: Iterable[str], should_stop: Callable[[], bool]
    ) -> None:
        """Run tasks until they end. May block for as long as they come.

        Args:   ready: asked for a task when it can begin; None: there is none yet, see `wake`.
                models: the model of each task. should_stop: as for `run`; without a task called every `POLL_S`, too.
        Raises: OSError: the observer's output is closed.
        """
        chooser = Chooser(self._settings.objective, models, self._settings.side_by_side)
        with self.results:
            while True:
                self._wait_for_results(at_most=self._settings.in_flight - 1)
                if should_stop() or self.results.are_lost:
                    break
                task: Any = None if self.results.are_behind(self._settings.in_flight) else next(ready, END)
                if task is END:
                    break
                if task is None:
                    self._wait_for_outcome(POLL_S)
                else:
                    self._begin(task[0], task[1], chooser)
            self._wait_for_results(at_most=0)
        self.planner.save_corrections()

    def _wait_for_results(self, at_most: int) -> None:
        """Return once at most so many tasks are without a result, and none of them is LOCAL."""
        self._take_outcomes()
        while True:
            unfinished = [task for task in self._tasks.values() if task.record.state not in FINAL]
            local = next((task for task in unfinished if task.record.state is State.LOCAL), None)
            if local:
                self._finish_locally(local)
            elif len(unfinished) <= at_most:
                return
            else:
                self._wait_for_outcome(POLL_S if self._settings.hedges_tasks else None)

    def _wait_for_outcome(self, timeout_s: float | None) -> None:
        """Handle the next outcomes; without any, check the progress of transfers. Blocks until then, or `wake`."""
        try:
            outcome = self._outcomes.get(timeout=timeout_s)
        except Empty:
            if self._settings.hedges_tasks and self._awaited():
                self._check_progress()
            return
        if outcome:
            self._handle(*outcome)
        self._take_outcomes()

    def _take_outcomes(self) -> None:
        """Handle all outcomes that the link has returned. Does not block."""
        while not self._outcomes.empty():
            if outcome := self._outcomes.get():
                self._handle(*outcome)

    # ------------------------------------------------------------ events and commands

    def _handle(self, task: InFlightTask, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, LinkReply):
                check_reply(task.model.graph, task.edge_nodes, outcome.result.arrays)
                self._update_estimates(task, outcome)
        except NeurosurgeonError as exc:
            outcome = exc
        except Exception as exc:  # an internal error: without an event the task would be waited for
            self._fail(task, Failure(exc))
            return
        if isinstance(outcome, LinkReply):
            self._apply(task, Replied(), partial(self.results.replied, task, outcome))
            return
        self._fail(task, Refused(outcome))
        if task.record.state is State.LOCAL and not task.record.is_hedged:
            log.warning("task %d is computed on the edge: %s", task.id, outcome)

    def _fail(self, task: InFlightTask, event: Refused | Failure) -> None:
        error = reason(event.error, task.queued)
        self._apply(task, event, partial(self.results.finish, task, error=error))

    def _apply(self, task: InFlightTask, event: Event, report: Callable[[], None] = lambda: None) -> None:
        """Apply an event to a task, and execute the commands.

        Args: report: reports the result that the event brings; called if it is the first.
        """
        task.record, commands = on_event(task.record, event, now_ms())
        for command in commands:
            if command is Command.SEND:
                self._send(task)
            elif command is Command.WITHDRAW and not self._link.withdraw(task.id):
                self._apply(task, Withdrawn())
            elif command is Command.REPORT:
                report()
                task.arrays = ()
        if task.record.state in FINAL and not task.record.awaits_reply:
            self._tasks.pop(task.id, None)

    def _send(self, task: InFlightTask) -> None:
        self.planner.count_sent(task.candidate, self._pipeline_now(but=task))
        if not self._awaited(but=task):  # a transfer in flight may be slow just now, and must not be paced
            self._link.pace_first_task(task.now.link)

        def put(outcome: Outcome) -> None:
            self._outcomes.put((task, outcome))

        try:
            request = request_of(task.model.network.ref, task.edge_nodes)
            self._link.submit(task.id, request, task.arrays, put, task.record.losses)
        except Exception as exc:  # an internal error: without an event the task would be waited for
            self._fail(task, Failure(exc))

    # ------------------------------------------------------------ the edge partition

    def _begin(self, queued: QueuedTask, read_inputs: Callable[[], Sequence[Array]], chooser: Chooser) -> None:
        try:
            now = self._watch.now()
            self._observe(TaskPlanned(now.link.rate_bytes_per_s, now.queue_ms))
            chosen = self.planner.choose(chooser, now, self._pipeline_now(), takes_tasks=self._link.takes_tasks)
        except Exception as exc:  # an internal error
            self.results.failed(queued, exc)
            return
        model = self._models[queued.model]
        record = TaskRecord(self._settings.on_cloud_loss is OnCloudLoss.LOCAL)
        task = self._tasks[queued.id] = InFlightTask(queued, model, record, now, chosen, model.factors)
        try:
            self._run_edge_partition(task, read_inputs())
        except Exception as exc:  # of this task alone: its image, a network that does not take it, or internal
            self._apply(task, Failure(exc), partial(self.results.failed, queued, exc))
            return
        done = EdgePartitionDone(task.candidate.boundary_bytes > 0, task.chosen.rest_ms, task.timeout_ms)
        self._apply(task, done, partial(self.results.finish, task, task.made, where="edge"))

    def _run_edge_partition(self, task: InFlightTask, arrays: Sequence[Array]) -> None:
        """Compute the edge partition; if re-planning meanwhile finds a clearly faster cut, that of the new cut."""
        start_ms = task.planned_ms = now_ms()
        is_long = task.candidate.busy.edge_ms > LONG_PARTITION_MS
        may_replan = self._settings.objective is Objective.LATENCY

        def keep_going() -> bool:
            self._take_outcomes()
            return not (may_replan and self._may_replan(task) and self._change_cut(task, now_ms() - start_ms))

        result = self._edge_result(task, arrays, keep_going if is_long else None)
        dropped_ms = 0.0
        while result is None:  # once
            log.info("task %d starts over with another cut: the link estimate has changed", task.id)
            dropped_ms = now_ms() - start_ms
            result = self._edge_result(task, arrays, None)
        task.arrays, task.made = task.model.graph.split(task.edge_nodes, result.arrays)
        task.is_first_run = task.model.is_first_run(task.edge_nodes)
        if not task.is_first_run:
            predicted_ms = task.candidate.busy.edge_ms / task.factors.edge
            self.planner.learn(task.model.keys.edge, predicted_ms, result.compute_ms)
        task.edge_ms, task.start_ms, task.done_ms = dropped_ms + result.compute_ms, start_ms, now_ms()

    def _edge_result(
        self, task: InFlightTask, arrays: Sequence[Array], keep_going: Callable[[], bool] | None
    ) -> PartitionResult | None:
        makes_outputs = task.model.graph.outputs_on(task.edge_nodes, edge=True)
        if len(task.edge_nodes) == 1 and not makes_outputs:  # the inputs alone, which are sent as they are
            return PartitionResult(tuple(arrays), 0.0)
        # A network may work in place, and all tasks share the example.
        return task.model.partition(task.edge_nodes, Side.EDGE).run([array.copy("K") for array in arrays], keep_going)

    def _may_replan(self, task: InFlightTask) -> bool:
        """Return whether a task that is being computed may be planned again now; true once every `REPLAN_MS`."""
        time_ms = now_ms()
        is_due = time_ms - task.planned_ms >= REPLAN_MS
        if not (is_due and self._settings.hedges_tasks and self._link.takes_tasks):
            return False
        task.planned_ms = time_ms
        return True

    def _change_cut(self, task: InFlightTask, elapsed_ms: float) -> bool:
        """Take another cut for a task, if starting over with it is clearly faster by now; return whether it is."""
        now = self._watch.now()
        plan = self.planner.plan(task.queued.model, now)
        better = replan_whole_task(task.chosen, elapsed_ms, plan, self._pipeline_now())
        if better:
            task.change_cut(now, better)
        return better is not None

    # ------------------------------------------------------------ tensors in flight

    def _awaited(self, but: InFlightTask | None = None) -> list[InFlightTask]:
        """Return the tasks for which the link owes an outcome, the oldest first."""
        return [task for task in self._tasks.values() if task.record.awaits_reply and task is not but]

    def _pipeline_now(self, but: InFlightTask | None = None) -> Pipeline:
        """Return the remaining busy times of link and cloud; one task may be left out."""
        awaited = self._awaited(but)
        if not awaited:
            return self.planner.pipeline_now(None)
        left_ms = 0.0
        if self._settings.hedges_tasks:
            left_bytes, hedging, time_ms = self._record_progress(), self.planner.hedging, now_ms()
            records = [(task.record, left_bytes.get(task.id, 0)) for task in awaited]
            left_ms = max(
                hedging.progress_of(time_ms, record.sent_ms, record.timeout_ms, left).left_ms
                for record, left in records
            )
        return self.planner.pipeline_now(left_ms)

    def _record_progress(self) -> Mapping[int, int]:
        """Record the transfer progress; return the bytes of each task, and before it, that are not acknowledged."""
        progress, hedging = self._link.progress(), self.planner.hedging
        left_bytes = progress.left_bytes if progress else {}
        waiting_bytes = max(left_bytes.values(), default=0)
        if progress:
            hedging.record_progress(now_ms(), progress.acked_bytes, waiting_bytes, self._watch.now().link.rtt_ms)
        if moved := hedging.recent_transfer():
            self._watch.record_progress(*moved, waiting_bytes)
        return left_bytes

    def _check_progress(self) -> None:
        """Hedge the oldest task whose transfer has stalled, if any; later errors of its request are ignored."""
        left_bytes = self._record_progress()
        for task in self._awaited():
            was_sent = task.record.state is State.SENT
            self._apply(task, ProgressCheck(self.planner.hedging, left_bytes.get(task.id, 0)))
            if was_sent and task.record.state is State.LOCAL:
                log.info("task %d is stalled: the rest of it is computed on the edge", task.id)
                return

    def _update_estimates(self, task: InFlightTask, reply: LinkReply) -> None:
        """Update the estimates of the link, the cloud and the stages by the durations of a reply."""
        remote, model = reply.result, task.model
        self._watch.record_transfer(remote.sent_bytes, remote.receive_ms)
        self._watch.record_load(remote.load_queue_ms)
        is_alone = self._settings.in_flight == 1 and not task.record.is_hedged  # else tensors wait for each other
        if is_alone:
            self._watch.record_exchange(remote.transfer_ms - remote.receive_ms, model.graph.outputs_bytes)
        if not task.is_first_run:
            keys, factors, candidate = model.keys, task.factors, task.candidate
            self.planner.learn(keys.cloud, candidate.busy.cloud_ms / factors.cloud, remote.compute_ms)
            if is_alone:
                predicted_ms = candidate.stages.transfer_ms / factors.transfer
                self.planner.learn(keys.transfer, predicted_ms, remote.transfer_ms)

    # ------------------------------------------------------------ the rest of a task, on the edge

    def _finish_locally(self, task: InFlightTask) -> None:
        """Compute the rest of a LOCAL task, until the cloud has replied or the task is sent again."""
        start_ms = task.planned_ms = now_ms()

        def keep_going() -> bool:
            self._take_outcomes()
            if task.record.may_be_resent and self._may_replan(task):
                self._resend_if_faster(task, start_ms)
            return task.record.state is State.LOCAL

        try:
            # A network may work in place, while the arrays are still being sent from their own memory.
            arrays = [array.copy("K") for array in task.arrays]
            result = task.model.partition(task.edge_nodes, Side.CLOUD).run(arrays, keep_going)
        except Exception as exc:  # of this task alone
            self._fail(task, Failure(exc))
            return
        self._take_outcomes()  # the reply may have come first
        was_first = result is not None and task.record.state is State.LOCAL
        if result:
            waited_ms = task.lost_ms + start_ms - task.record.sent_ms
            measured = StageTimes(task.edge_ms + result.compute_ms, waited_ms, 0.0)
            finish = partial(self.results.finish, task, task.made, result.arrays, where="edge", measured=measured)
            self._apply(task, RestDone(), finish)
        if task.record.is_hedged:
            self.planner.hedging.record_outcome(was_first=was_first)

    def _resend_if_faster(self, task: InFlightTask, rest_start_ms: float) -> None:
        """Send a lost task again, if that is clearly faster by now than to compute the rest of it on the edge."""
        now = self._watch.now()
        plan = self.planner.plan(task.queued.model, now)
        rest_ms = now_ms() - rest_start_ms
        chosen = plan_resend(task.chosen, rest_ms, plan, self._pipeline_now())
        if chosen is None:
            return
        log.info("task %d is sent again: the cloud is reconnected", task.id)
        task.edge_ms += rest_ms
        task.lost_ms = rest_start_ms - task.record.sent_ms
        predicted = chosen.predicted._replace(
            edge_ms=task.chosen.predicted.edge_ms + rest_ms,
            transfer_ms=task.lost_ms + chosen.predicted.transfer_ms,
        )
        task.change_cut(now, chosen._replace(predicted=predicted))
        self._apply(task, ResendPlanned(task.timeout_ms))
