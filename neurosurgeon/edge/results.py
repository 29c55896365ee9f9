"""The results of a queue's tasks, made and reported on a thread of their own: that must not delay the next task."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple

from neurosurgeon.edge.in_flight import InFlightTask
from neurosurgeon.edge.link_actions import LinkReply
from neurosurgeon.edge.outcome import main_output, outputs_digest, top_class, top_guesses
from neurosurgeon.edge.records import QueuedTask, QueueObserver, Span, TaskDone, TaskResult
from neurosurgeon.graph.spec import Arrays
from neurosurgeon.graph.trees import put_together
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.logs import internal_error
from neurosurgeon.utils.timing import StageTimes, now_ms

log = logging.getLogger(__name__)


class _Finished(NamedTuple):
    """A task whose result the reporter is to make."""

    task: QueuedTask
    make: Callable[[], TaskResult]
    outputs: Arrays | None  # of the network, in the order of its graph
    template: Any  # of its outputs
    labels: Sequence[str] | None  # of its classes
    done_ms: float


class Results:
    """The results of a queue; use it in a ``with`` block, at whose end all have been reported.

    The methods are called on the main loop's thread, and do not block. Each task is finished once, which the caller
    ensures (`edge.task_states`).

    Args:   observe: called with the event of each result, on the reporter's thread.
            keeps: keep the results in `reported`; a stream has no end, and its results would fill the memory.
    """

    def __init__(self, observe: QueueObserver, deadline_ms: float | None, *, keeps: bool = True) -> None:
        self.observe = observe
        self._deadline_ms = deadline_ms
        self._keeps = keeps
        self._finished: SimpleQueue[_Finished | None] = SimpleQueue()  # None: the end
        self._error: Exception | None = None  # of the reporter
        self._reporter = threading.Thread(target=self._report_all, name="reporter", daemon=True)
        self._start_ms = now_ms()
        self.reported: list[TaskResult] = []  # in the order of their ends; the reporter appends
        self.count = self.failed_count = 0  # of the reported ones
        self.makespan_ms = 0.0

    def __enter__(self) -> Results:
        self._start_ms = now_ms()
        self._reporter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.makespan_ms = now_ms() - self._start_ms
        self._finished.put(None)
        if kind:
            return
        self._reporter.join()
        if self._error:
            raise self._error

    @property
    def are_lost(self) -> bool:
        """Whether no result can be reported any more."""
        return self._error is not None

    def are_behind(self, limit: int) -> bool:
        """Return whether more than ``limit`` results of a stream wait to be reported, with their frames."""
        return not self._keeps and self._finished.qsize() > limit

    # ------------------------------------------------------------ ways to finish a task

    def failed(self, task: QueuedTask, exc: Exception) -> None:
        """Finish a task that failed before its edge partition had run."""
        result = TaskResult(task, error=reason(exc, task))
        self._finished.put(_Finished(task, lambda: result, None, None, None, now_ms()))

    def finish(self, task: InFlightTask, on_edge: Arrays | None = None, in_cloud: Arrays = (), **fields: Any) -> None:
        """Finish a task whose edge partition has run.

        Args:   on_edge, in_cloud: the outputs that each partition has made; None: an error.
                fields: further fields of its result.
        """
        make = partial(self._result_of, task, **fields)
        self._put(task, make, on_edge, in_cloud, now_ms())

    def replied(self, task: InFlightTask, reply: LinkReply) -> None:
        """Finish a task with the reply of the cloud."""
        make = partial(self._result_of_reply, task, reply)
        self._put(task, make, task.made, reply.result.arrays, reply.replied_ms)

    def _put(
        self,
        task: InFlightTask,
        make: Callable[[], TaskResult],
        on_edge: Arrays | None,
        in_cloud: Arrays,
        done_ms: float,
    ) -> None:
        graph = task.model.graph
        outputs = None if on_edge is None else graph.assemble(task.edge_nodes, on_edge, in_cloud)
        self._finished.put(_Finished(task.queued, make, outputs, graph.output_template, task.model.labels, done_ms))

    # ------------------------------------------------------------ results, on the reporter's thread

    def _report_all(self) -> None:
        try:
            while finished := self._finished.get():
                self._report(finished)
        except Exception as exc:  # raised on the main loop's thread: the output may be closed
            self._error = exc

    def _report(self, finished: _Finished) -> None:
        try:
            result, outputs = finished.make(), finished.outputs
            if result.spans:
                result = replace(result, elapsed_ms=finished.done_ms - self._start_ms - result.spans[0].start_ms)
            output = None
            if outputs is not None:
                best = top_guesses(main_output(outputs), finished.labels, 1)
                label = best[0].label if best else None
                result = replace(result, output_digest=outputs_digest(outputs), top1=top_class(outputs), label=label)
                output = put_together(finished.template, outputs)
            if finished.task.frame:
                result = replace(result, age_ms=finished.done_ms - finished.task.frame.read_ms)
            self.observe(TaskDone(result, output if result.is_finished else None))
        except OSError:  # the output is closed
            raise
        except Exception as exc:  # of this task alone; the others have results of their own
            result = TaskResult(finished.task, error=reason(exc, finished.task))
        self.count += 1
        self.failed_count += not result.is_finished
        if self._keeps:
            self.reported.append(result)

    def _result_of(self, task: InFlightTask, **fields: Any) -> TaskResult:
        """Return the result, so far, of a task whose edge partition has run, with further fields."""
        now, (plan, candidate, predicted) = task.now, task.chosen
        result = TaskResult(
            task.queued,
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
            measured=StageTimes(task.edge_ms, 0.0, 0.0),
            spans=(self._span(task.start_ms, task.done_ms),),
        )
        return replace(result, **fields)

    def _result_of_reply(self, task: InFlightTask, reply: LinkReply) -> TaskResult:
        remote, done_ms = reply.result, reply.replied_ms
        return self._result_of(
            task,
            measured=StageTimes(task.edge_ms, task.lost_ms + remote.transfer_ms, remote.cloud_ms),
            spans=(
                self._span(task.start_ms, task.done_ms),
                self._span(reply.sent_ms, reply.sent_ms + remote.transfer_ms),
                self._span(done_ms - remote.compute_ms, done_ms),
            ),
            retries=reply.retries,
            where="split" if task.candidate.point else "cloud",
        )

    def _span(self, start_ms: float, end_ms: float) -> Span:
        return Span(start_ms - self._start_ms, end_ms - self._start_ms)


def reason(exc: Exception, task: QueuedTask) -> str:
    """Return why a task failed, for its line; an unexpected exception is logged with its traceback."""
    if isinstance(exc, NeurosurgeonError):
        return str(exc)
    name = f"task {task.id} ({task.model})"
    return str(internal_error(log, exc, f"{name} failed", task=str(task.id), model=task.model))
