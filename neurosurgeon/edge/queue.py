"""A queue of tasks on the edge at work: edge, uplink and cloud busy at once, and every task answered exactly once."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from torch import Tensor

from neurosurgeon.edge.cuts import (
    Choice,
    Chooser,
    QueueModel,
    QueueSettings,
    StageFactors,
    anew,
    choice,
    once_more,
    within,
)
from neurosurgeon.edge.records import QueuedTask, TaskResult
from neurosurgeon.edge.results import Known, Results, reason
from neurosurgeon.edge.task import doubt_speed
from neurosurgeon.engine.torch_engine import HalfResult, check_crossing, load_image, run_half, stand_in
from neurosurgeon.models.zoo import Network, input_size
from neurosurgeon.net.link_watch import LinkNow, LinkWatch
from neurosurgeon.net.session import OnCloudLoss
from neurosurgeon.net.stream import Answered, TaskStream
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import IDLE, Pipeline
from neurosurgeon.planner.hedge import Hedging, OnItsWay
from neurosurgeon.planner.plan import Candidate, SplitPlan
from neurosurgeon.predictor.correction import Corrections
from neurosurgeon.reports.queue_report import QueueReport
from neurosurgeon.utils.errors import ConnectError, NeurosurgeonError
from neurosurgeon.utils.timing import StageTimes, now_ms
from neurosurgeon.utils.units import s_to_ms

log = logging.getLogger(__name__)

POLL_S = 0.01  # how often the tensors are looked after
SMALL_ANSWER_BYTES = 8_192  # comes whole, or after a moment: a thousand classes have 4,000
IMAGES_AHEAD = 4  # tasks whose images are read or being read: one long read holds up no edge half
LOOK_MS = 100.0  # how often a long edge half is looked at: measurements come every second
LONG_HALF_MS = 250.0  # a shorter one is finished before the next measurement
FIRST_RUN_MS = 1_000.0  # the cloud, too, builds kernels for a cut that is new to it


class _BetterError(Exception):
    """What the edge computes is sooner done in the cloud after all: with another cut, or sent once more."""

    def __init__(self, now: LinkNow, chosen: Choice) -> None:
        self.now = now
        self.chosen = chosen


class _AnsweredError(Exception):
    """The cloud was first: what is left to compute nobody wants."""


class _Begun(NamedTuple):
    """A task whose edge half has run."""

    known: Known
    model: QueueModel
    edge_nodes: frozenset[int]
    half: HalfResult
    factors: StageFactors  # the corrections in what was predicted
    is_first: bool  # of its cut
    sent_ms: float
    losses: int = 0  # how often the cloud was lost with it, and it was sent again

    @property
    def task(self) -> QueuedTask:
        return self.known.task

    @property
    def candidate(self) -> Candidate:
        return self.known.chosen.candidate

    @property
    def patience_ms(self) -> float:
        """How long its answer may take, with all waits that are known."""
        predicted = self.known.chosen.predicted
        return predicted.transfer_ms + predicted.cloud_ms + FIRST_RUN_MS * self.is_first

    def again(self, now: LinkNow, chosen: Choice, rest_start_ms: float) -> _Begun:
        """Return the same, to be sent once more, after the edge has computed its rest for a while."""
        known, time_ms = self.known, now_ms()
        lost_ms, rest_ms = rest_start_ms - self.sent_ms, time_ms - rest_start_ms
        edge_ms = known.chosen.predicted.edge_ms + rest_ms
        predicted = chosen.predicted._replace(edge_ms=edge_ms, transfer_ms=lost_ms + chosen.predicted.transfer_ms)
        known = known._replace(
            now=now, chosen=chosen._replace(predicted=predicted), half_ms=known.half_ms + rest_ms, lost_ms=lost_ms
        )
        return self._replace(known=known, factors=self.model.factors, sent_ms=time_ms, losses=self.losses + 1)


def images_ahead(tasks: Iterable[QueuedTask]) -> Iterator[tuple[QueuedTask, Future[Tensor] | None]]:
    """Yield every task, and its image where it has one: a thread reads the next few while others are computed."""
    reader = ThreadPoolExecutor(1, "images")
    try:
        read: deque[tuple[QueuedTask, Future[Tensor] | None]] = deque()
        for task in tasks:
            image = reader.submit(load_image, task.image, input_size(task.model)) if task.image else None
            read.append((task, image))
            if len(read) > IMAGES_AHEAD:
                yield read.popleft()
        yield from read
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def receives_itself(settings: QueueSettings, models: Mapping[str, QueueModel]) -> bool:
    """Return whether the thread that computes edge halves should receive the answers, too: `TaskStream.is_served`.

    With one task in flight it waits for nothing else, and goes on sooner than one that must be woken up. But it cannot
    look after the tensors while it receives, so answers must be small.
    """
    return settings.in_flight == 1 and all(model.output_bytes <= SMALL_ANSWER_BYTES for model in models.values())


class QueueRun:
    """Works through tasks: this thread computes edge halves, a stream sends them and brings the answers.

    At most ``in_flight`` tasks are begun and without an answer: each holds a slot until its result is there. While this
    thread waits for one, it looks how the tensors move; the rest of a task that is stuck it computes itself, and the
    first answer counts. While it computes for long, it looks whether the cloud would be sooner after all. The answers
    it receives itself where the stream is served (`receives_itself`).
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
        self._results = Results(report, settings.deadline_ms, lambda: self._slots.put(None))
        self._corrections = Corrections.load() if settings.learns else Corrections()
        self._under_way: dict[int, _Begun] = {}  # tasks that the cloud has not answered, nor lost
        self._taken_over: set[int] = set()  # of them, those whose rest is computed here
        self._hedges = settings.hedges and settings.on_cloud_loss is OnCloudLoss.LOCAL
        self._hedging = Hedging()
        self._looked_ms = 0.0  # when this thread last looked for what is better done elsewhere
        self._pipeline, self._pipeline_ms = IDLE, 0.0  # what link and cloud were still busy with at that time
        self._lock = threading.Lock()
        # A slot comes back free, or with a task of a lost cloud.
        self._slots: SimpleQueue[_Begun | None] = SimpleQueue()
        self._stand_ins = {name: stand_in(model.network.graph.input.shape) for name, model in models.items()}
        self.makespan_ms = 0.0
        for _ in range(settings.in_flight):
            self._slots.put(None)

    def run(self, tasks: Sequence[QueuedTask], should_stop: Callable[[], bool] = lambda: False) -> list[TaskResult]:
        """Return the results of the tasks, in the order in which they came; stops early with what is in flight."""
        chooser = self._settings.chooser(tasks)
        with self._results:
            for task, image in images_ahead(tasks):
                self._wait_for_slot()
                if should_stop() or self._results.are_lost:
                    self._slots.put(None)
                    break
                self._begin(task, image, chooser)
            for _ in range(self._settings.in_flight):
                self._wait_for_slot()
            self.makespan_ms = self._results.elapsed_ms
        if self._settings.learns:
            self._corrections.save()
            for name, model in self._models.items():
                doubt_speed(self._settings.task(name), self._corrections.factor(model.keys.edge))
        return self._results.reported

    def _wait_for_slot(self) -> None:
        is_free = False
        while not is_free:
            lost: _Begun | None = None
            with suppress(Empty):
                lost = self._next_slot()
                is_free = lost is None
            if lost:
                self._finish_here(lost)
            elif stuck := self._look_for_stuck_task():
                self._take_over(stuck)

    def _next_slot(self) -> _Begun | None:
        """Wait a while for a slot; with it may come a task of a lost cloud.

        Raises: Empty: it is to be looked after the tensors.
        """
        if not self._stream.is_served:
            return self._slots.get(timeout=POLL_S if self._hedges and self._under_way else None)
        self._stream.serve(POLL_S if self._slots.empty() else 0.0)
        return self._slots.get_nowait()

    def _listen(self) -> None:
        """Take what the cloud has said, where nobody else does."""
        if self._stream.is_served:
            self._stream.serve(0.0)

    def _begin(self, task: QueuedTask, image: Future[Tensor] | None, chooser: Chooser) -> None:
        self._results.await_result(task)
        try:
            now = self._watch.now()
            self._report.show_state(now.link.rate_bytes_per_s, now.queue_ms)
            chosen = self._choose(chooser, now)
            tensor = image.result() if image else self._stand_ins[task.model]
            begun = self._run_edge_half(task, tensor, now, chosen)
        except Exception as exc:  # belongs to this task: its image, a network that does not take it, or a defect
            self._results.failed(task, exc)
            return
        if not begun.candidate.crossing_bytes:
            self._results.finish(begun.known, begun.half.tensors[0], where="edge")
            return
        self._send(begun)

    def _send(self, begun: _Begun) -> None:
        self._pipeline = self._pipeline_now().after(begun.candidate.busy.beyond_edge)
        if not self._under_way:  # the bytes of others are on a link that may be slow just now
            self._stream.pace_first_task(begun.known.now.link)
        with self._lock:
            self._under_way[begun.task.id] = begun
        take_answer = partial(self._take_answer, begun)
        try:
            request = begun.model.request(begun.edge_nodes)
            self._stream.submit(begun.task.id, request, begun.half.tensors, take_answer, begun.losses)
        except Exception as exc:  # a defect: the task must not be waited for
            with self._lock:
                self._under_way.pop(begun.task.id, None)
            self._results.finish(begun.known, error=reason(exc, begun.task))

    def _pipeline_now(self) -> Pipeline:
        """Return what link and cloud are still busy with, as predicted when each task was sent."""
        if not self._under_way:
            self._pipeline_ms = now_ms()
            return IDLE
        before_ms, self._pipeline_ms = self._pipeline_ms, now_ms()
        passed = self._pipeline._replace(edge_ms=self._pipeline_ms - before_ms)
        self._pipeline = passed.from_now()
        left_ms = max((way.left_ms for _, way in self._on_their_way()), default=0.0)
        return self._pipeline._replace(link_ms=max(self._pipeline.link_ms, left_ms))

    def _choose(self, chooser: Chooser, now: LinkNow) -> Choice:
        pipeline = self._pipeline_now()
        chosen = chooser.choose(lambda model: self._plan(model, now), pipeline)
        runs_here = self._settings.on_cloud_loss is OnCloudLoss.LOCAL and not self._stream.takes_tasks
        if runs_here:
            return choice(chosen.plan, -1, pipeline)
        return within(chosen, self._settings.deadline_ms, pipeline)

    def _plan(self, model: str, now: LinkNow) -> SplitPlan:
        with self._lock:
            return self._models[model].plan(now, self._corrections, self._settings)

    def _run_edge_half(
        self, task: QueuedTask, tensor: Tensor, now: LinkNow, chosen: Choice, dropped_ms: float = 0.0
    ) -> _Begun:
        """Compute what was chosen for the edge; ``dropped_ms``: for how long it had computed before it began anew."""
        model = self._models[task.model]
        factors = model.factors  # a look makes another plan
        edge_nodes = chosen.plan.edge_nodes(chosen.candidate)
        may_begin_anew = self._hedges and not dropped_ms and self._settings.objective is Objective.LATENCY
        is_looked_at = may_begin_anew and chosen.candidate.busy.edge_ms > LONG_HALF_MS
        better: tuple[LinkNow, Choice] | None = None
        start_ms = now_ms()
        between = partial(self._look_for_better, task, chosen, start_ms) if is_looked_at else None
        try:
            half = self._edge_half(model.network, edge_nodes, tensor, between)
        except _BetterError as exc:
            better = exc.now, exc.chosen
        if better:  # not in the handler, which keeps all that was computed so far
            log.info("task %d begins anew, with another cut: the link is another one now", task.id)
            return self._run_edge_half(task, tensor, *better, now_ms() - start_ms)
        done_ms = now_ms()
        is_first = model.is_first_run(edge_nodes)
        if self._settings.learns and not is_first:
            self._learn(model.keys.edge, chosen.candidate.busy.edge_ms / factors.edge, half.latency_ms)
        known = Known(task, now, chosen, dropped_ms + half.latency_ms, start_ms - dropped_ms, done_ms)
        return _Begun(known, model, edge_nodes, half, factors, is_first, done_ms)

    def _edge_half(
        self, network: Network, edge_nodes: frozenset[int], tensor: Tensor, between: Callable[[], None] | None
    ) -> HalfResult:
        if len(edge_nodes) == 1:  # the input alone: it crosses as it is
            return HalfResult((tensor,), 0.0)
        return run_half(network.split(edge_nodes).edge, [tensor], self._settings.device, between)

    def _look_for_better(self, task: QueuedTask, chosen: Choice, start_ms: float) -> None:
        """Look, now and then in a long edge half, whether to begin the task anew.

        Raises: _BetterError.
        """
        self._listen()
        if not self._is_time_to_look(start_ms):
            return
        now = self._watch.now()
        if better := anew(chosen, now_ms() - start_ms, self._plan(task.model, now), self._pipeline_now()):
            raise _BetterError(now, better)

    def _is_time_to_look(self, start_ms: float) -> bool:
        """Whether the last look was long enough before, and the cloud takes tasks."""
        if now_ms() - max(self._looked_ms, start_ms) < LOOK_MS or not self._stream.takes_tasks:
            return False
        self._looked_ms = now_ms()
        return True

    # ------------------------------------------------------------ tasks that are stuck

    def _on_their_way(self) -> list[tuple[_Begun, OnItsWay]]:
        """Look how far the tensors are; return every task that the cloud may still answer, the oldest first."""
        if not (self._hedges and self._under_way):
            return []
        crossing, time_ms = self._stream.crossing(), now_ms()
        left_bytes = crossing.left_bytes if crossing else {}
        waiting_bytes = max(left_bytes.values(), default=0)
        if crossing:
            rtt_ms = self._watch.now().link.rtt_ms
            self._hedging.saw(time_ms, crossing.acked_bytes, waiting_bytes, rtt_ms)
        if moved := self._hedging.newest():
            self._watch.saw_progress(*moved, waiting_bytes)
        with self._lock:
            under_way = list(self._under_way.items())
        return [
            (begun, self._hedging.way(time_ms, begun.sent_ms, begun.patience_ms, left_bytes.get(task, 0)))
            for task, begun in under_way
        ]

    def _look_for_stuck_task(self) -> _Begun | None:
        """Return the oldest task that is stuck, and is sooner finished here; from now on its loss is none."""
        if now_ms() - self._looked_ms < s_to_ms(POLL_S):
            return None
        self._looked_ms = now_ms()
        for begun, way in self._on_their_way():
            task = begun.task.id
            with self._lock:
                if task in self._taken_over or not self._hedging.pays(way, begun.known.chosen.rest_ms):
                    continue
                if task in self._under_way:  # else its answer has just come
                    self._taken_over.add(task)
                    return begun
        return None

    def _take_over(self, begun: _Begun) -> None:
        """Compute the rest of a task whose tensors are stuck; its answer may come all the same, and be first."""
        task = begun.task.id
        log.info("task %d is stuck on its way: the rest of it is computed here", task)
        if not self._stream.withdraw(task):
            with self._lock:
                self._under_way.pop(task, None)
        self._hedging.ended(was_first=self._finish_here(begun))

    # ------------------------------------------------------------ answers, on the thread that receives

    def _take_answer(self, begun: _Begun, answer: Answered | NeurosurgeonError) -> None:
        with self._lock:
            self._under_way.pop(begun.task.id, None)
            is_taken_over = begun.task.id in self._taken_over
        try:
            self._use_answer(begun, answer, is_taken_over=is_taken_over)
        except Exception as exc:  # a defect: the task must not be waited for
            self._results.finish(begun.known, error=reason(exc, begun.task))

    def _use_answer(self, begun: _Begun, answer: Answered | NeurosurgeonError, *, is_taken_over: bool) -> None:
        task = begun.task.id
        try:
            answered = self._checked(begun, answer)
        except NeurosurgeonError as exc:
            if is_taken_over:
                log.debug("task %d, whose rest is computed here, is no longer on its way: %s", task, exc)
            elif self._settings.on_cloud_loss is OnCloudLoss.LOCAL and (begun.losses or isinstance(exc, ConnectError)):
                log.warning("task %d is computed here: %s", task, exc)
                self._slots.put(begun)
            else:
                self._results.finish(begun.known, error=str(exc))
        else:
            self._take_in(begun, answered, is_late=is_taken_over)
            self._results.answered(begun.known, answered)

    def _checked(self, begun: _Begun, answer: Answered | NeurosurgeonError) -> Answered:
        if isinstance(answer, NeurosurgeonError):
            raise answer
        check_crossing([begun.model.network.graph.output], answer.result.specs)
        return answer

    def _take_in(self, begun: _Begun, answered: Answered, *, is_late: bool) -> None:
        """Let an answer teach what link and stages are like."""
        remote = answered.result
        self._watch.saw_transfer(remote.sent_bytes, remote.receive_ms)
        self._watch.saw_load(remote.load_queue_ms)
        is_alone = self._settings.in_flight == 1 and not is_late  # otherwise tensors also wait for each other
        if is_alone:
            self._watch.saw_exchange(remote.transfer_ms - remote.receive_ms, begun.model.output_bytes)
        if self._settings.learns and not begun.is_first:
            keys, factors = begun.model.keys, begun.factors
            self._learn(keys.cloud, begun.candidate.busy.cloud_ms / factors.cloud, remote.compute_ms)
            if is_alone:
                self._learn(keys.transfer, begun.candidate.stages.transfer_ms / factors.transfer, remote.transfer_ms)

    # ------------------------------------------------------------ answers of this side

    def _finish_here(self, begun: _Begun) -> bool:
        """Finish a task on this side; False where it has a result already."""
        known, start_ms = begun.known, now_ms()
        try:
            half = self._run_here(begun, start_ms)
        except _AnsweredError:
            return False
        except _BetterError as better:
            log.info("task %d is sent again: the cloud is back", begun.task.id)
            self._send(begun.again(better.now, better.chosen, start_ms))
            return False
        except Exception as exc:  # belongs to this task
            return self._results.finish(known, error=reason(exc, begun.task))
        waited_ms = known.lost_ms + start_ms - begun.sent_ms
        measured = StageTimes(known.half_ms + half.latency_ms, waited_ms, 0.0)
        return self._results.finish(known, half.tensors[0], where="edge", measured=measured)

    def _run_here(self, begun: _Begun, start_ms: float) -> HalfResult:
        """Run the rest of a task that is stuck, or was lost with the cloud."""
        # A network may work in place, while the tensors still go out from their own memory.
        tensors = [tensor.clone() for tensor in begun.half.tensors]
        cloud_half = begun.model.network.split(begun.edge_nodes).cloud
        between = partial(self._look_for_cloud, begun, start_ms) if self._hedges else None
        half = run_half(cloud_half, tensors, self._settings.device, between)
        self._listen()  # the answer of the cloud may have come first
        return half

    def _look_for_cloud(self, begun: _Begun, start_ms: float) -> None:
        """Look, while the rest of a task is computed here, whether that is still of use.

        Raises: _AnsweredError: the cloud was first. _BetterError: the task was lost with the cloud, which is back.
        """
        task = begun.task
        self._listen()
        if not self._results.are_awaited(task):
            raise _AnsweredError
        if task.id in self._taken_over or begun.losses or not self._is_time_to_look(start_ms):
            return
        now = self._watch.now()
        chosen, elapsed_ms = begun.known.chosen, now_ms() - start_ms
        if there := once_more(chosen, elapsed_ms, self._plan(task.model, now), self._pipeline_now()):
            raise _BetterError(now, there)

    def _learn(self, key: str, predicted_ms: float, measured_ms: float) -> None:
        with self._lock:
            self._corrections.learn(key, predicted_ms, measured_ms)
