"""The output of a stream: a line for each frame, and the last line."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest

from neurosurgeon.edge.records import Frame, QueuedTask, StreamStarted, TaskDone, TaskResult
from neurosurgeon.reports.stream_report import StreamReport, frame_line
from tests.reports.test_queue_report import Terminal

PIXELS = np.zeros((4, 6, 3), np.uint8)


def result(number: int = 5, time_s: float | None = 0.2, **fields: Any) -> TaskResult:
    task = QueuedTask(2, "le_net", frame=Frame(number, time_s, PIXELS, 0.0))
    return TaskResult(task, **{"age_ms": 31.25, "top1": 7, "where": "cloud", **fields})


def test_the_line_of_a_frame() -> None:
    assert frame_line(result()) == "frame 5 (0.200 s) : top class 7 , answered by cloud , age 31.2 ms"
    assert frame_line(result(time_s=None, top1=None)) == "frame 5 : answered by cloud , age 31.2 ms"
    assert frame_line(result(error="no image")) == "frame 5 (0.200 s) failed : no image"


def report_of(*results: TaskResult, **how: Any) -> list[str]:
    out = io.StringIO()
    with StreamReport(out, **how) as report:
        network: Any = None
        report(StreamStarted(network))
        for each in results:
            report(TaskDone(each, None))
    report.summary(len(results), sum(not each.is_finished for each in results), 3, 2000.0)
    return out.getvalue().splitlines()


def test_the_last_line_has_rate_ages_and_dropped_frames() -> None:
    results = [result(age_ms=float(age), where=where) for age, where in ((10, "edge"), (20, "split"), (30, "cloud"))]
    *lines, last = report_of(*results, result(error="no image"))
    assert len(lines) == 4
    assert last == (
        "stream : 4 frames , 1 failed , dropped 3 , 2.00 frames/s , age p50 20.0 ms p95 29.0 ms , "
        "edge/split/cloud 1/1/1"
    )


def test_a_stream_without_a_result_has_a_last_line() -> None:
    assert report_of(shows_frames=False) == [
        "stream : 0 frames , 0 failed , dropped 3 , 0.00 frames/s , age - , edge/split/cloud 0/0/0"
    ]


def test_a_terminal_has_a_bar_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report_of(result(), shows_frames=False)
    assert "age p50 31.2 ms p95 31.2 ms, dropped 3" in terminal.getvalue()
