"""The results of a queue's tasks, which a thread of its own makes and reports to the observer.

That is deferred to a thread because it would delay the next task.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple

from neurosurgeon.edge.link_thread import Answered
from neurosurgeon.edge.outcome import output_digest, top_class
from neurosurgeon.edge.records import QueuedTask, QueueObserver, Span, TaskDone, TaskPlanned, TaskResult
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.link_watch import LinkNow
from neurosurgeon.planner.queue import Choice
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import StageTimes, now_ms

log = logging.getLogger(__name__)


class PlannedTask(NamedTuple):
    """A task with its cut, and the times of its edge partition once that has run; no tensors."""

    task: QueuedTask
    now: LinkNow
    chosen: Choice
    edge_ms: float = 0.0
    start_ms: float = 0.0  # when its edge partition began (`now_ms`)
    done_ms: float = 0.0  # and when it had run
    lost_ms: float = 0.0  # for which it waited for a cloud that was lost with it


class _Finished(NamedTuple):
    """A task whose result is to be made."""

    task: QueuedTask
    make: Callable[[], TaskResult]
    output: Array | None
    done_ms: float


class Results:
    """The results of a queue; use it in a ``with`` block, at whose end all have been reported.

    Every task is to be finished once; the caller keeps count (`edge.task_states`).
    """

    def __init__(self, observe: QueueObserver, deadline_ms: float | None) -> None:
        self._observe = observe
        self._deadline_ms = deadline_ms
        self._finished: SimpleQueue[_Finished | None] = SimpleQueue()  # None: there are no more
        self._error: Exception | None = None  # of the reporter
        self._reporter = threading.Thread(target=self._report_all, name="reporter", daemon=True)
        self._start_ms = now_ms()
        self.reported: list[TaskResult] = []  # in the order in which they came

    def __enter__(self) -> Results:
        self._start_ms = now_ms()
        self._reporter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._finished.put(None)
        if kind:
            return
        self._reporter.join()
        if self._error:
            raise self._error

    @property
    def elapsed_ms(self) -> float:
        """Since the queue started."""
        return now_ms() - self._start_ms

    @property
    def are_lost(self) -> bool:
        """Whether no result can be reported any more."""
        return self._error is not None

    def show_link(self, now: LinkNow) -> None:
        """Report the link estimate and the load of the cloud for which a task is planned."""
        self._observe(TaskPlanned(now.link.rate_bytes_per_s, now.queue_ms))

    # ------------------------------------------------------------ ways to finish a task

    def failed(self, task: QueuedTask, exc: Exception) -> None:
        """Finish a task that ended with an error before it was planned."""
        result = TaskResult(task, error=reason(exc, task))
        self._finished.put(_Finished(task, lambda: result, None, now_ms()))

    def finish(self, planned: PlannedTask, output: Array | None = None, **fields: Any) -> None:
        """Finish a task whose edge partition has run.

        Args: fields: further fields of its result.
        """
        make = partial(self._planned, planned, **fields)
        self._finished.put(_Finished(planned.task, make, output, now_ms()))

    def answered(self, planned: PlannedTask, answered: Answered) -> None:
        """Finish a task that the cloud has answered."""
        make = partial(self._answered_there, planned, answered)
        self._finished.put(_Finished(planned.task, make, answered.result.arrays[0], answered.answered_ms))

    # ------------------------------------------------------------ results, on the reporter's thread

    def _report_all(self) -> None:
        try:
            self._report_each()
        except Exception as exc:  # belongs to the thread that runs the queue: its output may be closed
            self._error = exc

    def _report_each(self) -> None:
        while finished := self._finished.get():
            try:
                result = self._whole(finished)
                self._observe(TaskDone(result, finished.output if result.is_finished else None))
            except OSError:  # the output is closed
                raise
            except Exception as exc:  # belongs to this task; the others have results of their own
                result = TaskResult(finished.task, error=reason(exc, finished.task))
            self.reported.append(result)

    def _whole(self, finished: _Finished) -> TaskResult:
        result, output, done_ms = finished.make(), finished.output, finished.done_ms
        if result.spans:
            result = replace(result, elapsed_ms=done_ms - self._start_ms - result.spans[0].start_ms)
        if output is not None:
            result = replace(result, output_digest=output_digest(output), top1=top_class(output))
        return result

    def _planned(self, planned: PlannedTask, **fields: Any) -> TaskResult:
        """Return the result, so far, of a task whose edge partition has run, with further fields."""
        now, (plan, candidate, predicted) = planned.now, planned.chosen
        result = TaskResult(
            planned.task,
            point=candidate.point,
            layer=candidate.layer,
            layers=len(plan.graph.layers),
            graph=plan.graph,
            rate_bytes_per_s=now.link.rate_bytes_per_s,
            rate_age_s=now.link.age_s,
            rate_is_stale=now.is_stale,
            best_total_ms=plan.best.stages.total_ms,
            predicted=predicted,
            deadline_ms=self._deadline_ms,
            measured=StageTimes(planned.edge_ms, 0.0, 0.0),
            spans=(self._span(planned.start_ms, planned.done_ms),),
        )
        return replace(result, **fields)

    def _answered_there(self, planned: PlannedTask, answered: Answered) -> TaskResult:
        result, remote, done_ms = self._planned(planned), answered.result, answered.answered_ms
        return replace(
            result,
            measured=StageTimes(planned.edge_ms, planned.lost_ms + remote.transfer_ms, remote.cloud_ms),
            spans=(
                *result.spans,
                self._span(answered.sent_ms, answered.sent_ms + remote.transfer_ms),
                self._span(done_ms - remote.compute_ms, done_ms),
            ),
            retries=answered.retries,
            where="split" if planned.chosen.candidate.point else "cloud",
        )

    def _span(self, start_ms: float, end_ms: float) -> Span:
        return Span(start_ms - self._start_ms, end_ms - self._start_ms)


def reason(exc: Exception, task: QueuedTask) -> str:
    """Return why a task failed, for its line; an exception that is none of ours is logged with its traceback."""
    if isinstance(exc, NeurosurgeonError):
        return str(exc)
    name = f"task {task.id} ({task.model})"
    return str(internal_error(log, exc, f"{name} failed", task=str(task.id), model=task.model))
