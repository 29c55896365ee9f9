"""The printed output of a queue: a block of the contract's lines for each task, a progress bar, a final table."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from neurosurgeon.edge.records import (
    EdgeComputed,
    Finished,
    Prepared,
    Progress,
    QueuedTask,
    QueueEvent,
    QueueStarted,
    Replied,
    Sent,
    TaskDone,
    TaskPlanned,
    TaskResult,
)
from neurosurgeon.reports.summary import ALL, GroupSummary, QueueSummary, cuts_text
from neurosurgeon.reports.text import RULE, EdgeReport, ProgressBar, bandwidth_line, cut_lines, origin_lines
from neurosurgeon.utils.logs import printable
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s

START = "===================== start inference tasks ===================== "  # ends in a blank, as in the contract


def task_block(result: TaskResult, count: int) -> str:
    """Return all lines of one of ``count`` tasks, each with its line break."""
    lines = io.StringIO()
    report = EdgeReport(lines)
    if result.error is None:
        _say_finished(report, result, count)
    else:
        report.say(f"task {result.task.id} of {count} failed : {printable(result.error)}")
    return lines.getvalue()


def _say_finished(report: EdgeReport, result: TaskResult, count: int) -> None:
    model = result.task.model
    stale = ", stale" if result.rate_is_stale else ""
    report.say(f"{bandwidth_line(result.rate_bytes_per_s)} (age {result.rate_age_s:.1f} s{stale})")
    report.say(f"get model type: {model} ")  # ends in a blank, as in the contract
    cut = (result.graph, result.point, result.layer, result.edge_nodes, result.boundary)
    for line in cut_lines(*cut, result.predicted.total_ms):
        report.say(line)
    if 0 < result.best_total_ms < result.predicted.total_ms:  # another cut is better for the whole queue
        report.say(f"best latency of this task alone : {result.best_total_ms:.2f} ms")
    report.say(RULE)
    if result.uses_cloud:
        report(Prepared())
    report(EdgeComputed(model, result.measured.edge_ms))
    if result.uses_cloud:
        report(Sent())
        report(Replied(model, result.measured))
    report.say(_answer_line(result, count))
    report(Finished())


def _answer_line(result: TaskResult, count: int) -> str:
    parts = [] if result.top1 is None else [f"top class {result.label or result.top1}"]
    parts.append(f"answered by {result.where}")
    if result.retries:
        parts.append(f"retries {result.retries}")
    if result.deadline_ms is not None:
        met, effort = "met" if result.is_in_time else "missed", "" if result.is_in_reach else " (no cut makes it)"
        parts.append(f"deadline {result.deadline_ms:g} ms {met}{effort}")
    return f"task {result.task.id} of {count} : {' , '.join(parts)}"


class QueueReport:
    """An observer of a queue: its lines, on stdout, or on stderr if stdout is kept for JSON, and a bar on a terminal.

    A context: the bar ends with it. Any thread may call it; tqdm's lock keeps each block in one piece.

    Args: on_start: called before the first task.
    """

    def __init__(self, stream: TextIO | None = None, on_start: Callable[[], None] = lambda: None) -> None:
        self._stream = stream or sys.stdout
        self._on_start = on_start
        self._exit = ExitStack()
        self._models = ProgressBar("model")

    def __enter__(self) -> QueueReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._exit.close()

    def __call__(self, event: QueueEvent) -> None:
        match event:
            case Progress():
                self._models.show(event)
            case QueueStarted(tasks):
                self._start(tasks)
            case TaskPlanned(rate_bytes_per_s, queue_ms):
                self._show_state(rate_bytes_per_s, queue_ms)
            case TaskDone(result):
                self._task_done(result)

    def _start(self, tasks: Sequence[QueuedTask]) -> None:
        self._count = len(tasks)
        self._bar = self._exit.enter_context(
            tqdm(total=self._count, desc="queue", unit="task", dynamic_ncols=True, disable=None)
        )
        if not self._bar.disable:
            self._exit.enter_context(logging_redirect_tqdm())  # log lines would tear the bar, too
        self._write(f"tasks list info : {[task.model for task in tasks]}\n{START}\n")
        self._on_start()

    def _task_done(self, result: TaskResult) -> None:
        block = task_block(result, self._count)
        with tqdm.get_lock():
            self._write(block)
            self._bar.update()

    def _show_state(self, rate_bytes_per_s: float, cloud_queue_ms: float | None) -> None:
        """Show the rate of the uplink beside the bar, and how long tasks wait in the cloud."""
        if self._bar.disable:
            return
        state = f"{bytes_per_s_to_mb_per_s(rate_bytes_per_s):.4g} MB/s"
        if cloud_queue_ms is not None:
            state += f", cloud queue {cloud_queue_ms:.1f} ms"
        with tqdm.get_lock():
            self._bar.set_postfix_str(state)

    def _write(self, text: str) -> None:
        with tqdm.external_write_mode(file=self._stream):
            self._stream.write(text)
            self._stream.flush()


# ---------------------------------------------------------------- the table at the end


def print_summary(summary: QueueSummary, stream: TextIO | None = None) -> None:
    """Print a line for each model and one for all, then the makespan: predicted for each schedule, and measured."""
    lines = [
        f"{'':<49}{'measured, median ms':>40}{'p95':>10}{'predicted':>10}{'measured':>11}",
        f"{'model':<10}{'tasks':>6}{'failed':>7}{'edge/split/cloud':>18}{'retries':>8}"
        f"{'edge':>10}{'transfer':>10}{'cloud':>10}{'total':>10}{'total':>10}"
        f"{'total':>10}{'/predicted':>11}{'tasks/s':>9}  cuts (point:tasks)",
        *(_group_line(name, group) for name, group in summary.groups().items()),
        *_makespan_lines(summary),
        *origin_lines(summary.predicted_from),
    ]
    print("\n".join(lines), file=stream or sys.stdout, flush=True)


def _group_line(name: str, group: GroupSummary) -> str:
    cuts = "" if name == ALL else cuts_text(group.cuts)  # points of different networks cannot be compared
    places = "/".join(str(count) for count in group.where.values())
    medians = "".join(f"{_number(value):>10}" for value in group.measured_median.values())
    return (
        f"{name:<10}{group.tasks:>6}{group.failed:>7}{places:>18}{group.retries:>8}"
        f"{medians}{_number(group.measured_p95['total_ms']):>10}{_number(group.predicted_total_median_ms):>10}"
        f"{_number(group.measured_to_predicted_median):>11}{_number(group.tasks_per_s):>9}  {cuts}"
    ).rstrip()


def _makespan_lines(summary: QueueSummary) -> list[str]:
    lines = [
        f"predicted makespan, {schedule:<8} : {predicted_ms:.2f} ms"
        for schedule, predicted_ms in summary.predicted_makespan_ms.items()
    ]
    done = f"{summary.overall.finished} of {summary.overall.tasks} tasks , {summary.overall.tasks_per_s:.2f} tasks/s"
    how = f"objective {summary.objective} , schedule {summary.schedule}"
    return [*lines, f"measured makespan            : {summary.makespan_ms:.2f} ms , {done} , {how}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
