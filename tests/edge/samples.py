"""Made-up results of a queue, for the tests of reports."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from neurosurgeon.edge.inputs import draw_tasks
from neurosurgeon.edge.records import QueuedTask, Span, TaskResult
from neurosurgeon.models.names import ZOO
from neurosurgeon.utils.timing import StageTimes


def finished(task_id: int = 1, model: str = "le_net", image: Path | None = None, **fields: Any) -> TaskResult:
    """Return a task cut in two after layer 3, predicted 10 ms and measured 12 ms; fields override it."""
    known: dict[str, Any] = {
        "point": 3,
        "layer": "features.2 (maxpool)",
        "layers": 12,
        "rate_bytes_per_s": 12.5e6,
        "rate_age_s": 0.42,
        "best_total_ms": 10.0,
        "predicted": StageTimes(2.0, 3.0, 5.0),
        "measured": StageTimes(2.5, 3.5, 6.0),
        "spans": (Span(0.0, 2.5), Span(2.5, 6.0), Span(6.0, 12.0)),
        "output_digest": "ab" * 32,
        "top1": 123,
    }
    return TaskResult(QueuedTask(task_id, model, image), **{**known, **fields})


def failed(task_id: int = 1, model: str = "le_net", error: str = "the cloud is gone") -> TaskResult:
    """Return a task that failed before it was planned."""
    return TaskResult(QueuedTask(task_id, model), error=error)


def queue_of(count: int) -> list[TaskResult]:
    """Return a queue on a link whose rate drops to a tenth halfway; every 20th task fails."""
    draw = random.Random(1)
    free_ms = [0.0, 0.0, 0.0]
    results = []
    for task in draw_tasks(count, 1, list(ZOO)):
        is_slow = task.id > count // 2
        layers = ZOO[task.model].layers
        point = layers if is_slow and task.id % 3 else draw.choice([0, layers // 3])
        times = [draw.uniform(5.0, 30.0), draw.uniform(40.0, 80.0) if is_slow else draw.uniform(3.0, 8.0), 12.0]
        spans: list[Span] = []
        ready_ms = 0.0
        for lane, time_ms in enumerate(times[:1] if point == layers else times):
            start_ms = max(ready_ms, free_ms[lane])
            ready_ms = free_ms[lane] = start_ms + time_ms
            spans.append(Span(start_ms, ready_ms))
        stages = StageTimes(*(span.end_ms - span.start_ms for span in spans), *[0.0] * (3 - len(spans)))
        where = "edge" if point == layers else "split" if point else "cloud"
        result = finished(
            task.id, task.model, point=point, layers=layers, measured=stages, spans=tuple(spans), where=where,
            rate_bytes_per_s=draw.uniform(0.9, 1.1) * (1e6 if is_slow else 10e6),
        )  # fmt: skip
        results.append(failed(task.id, task.model) if task.id % 20 == 0 else result)
    return results
