"""What became of a queue of tasks: statistics over its results, and the documents that carry both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurosurgeon.edge.records import TaskResult
from neurosurgeon.planner.plan import tensor_documents
from neurosurgeon.utils.logs import printable
from neurosurgeon.utils.timing import STAGE_NAMES
from neurosurgeon.utils.units import bytes_per_s_to_mb_per_s, ms_to_s

PLACES = ("edge", "split", "cloud")  # where a task's layers ran
ALL = "all"  # the name of the line over all models; no model has it
TAIL_PERCENTILE = 95
SPAN_NAMES = ("edge", "transfer", "cloud")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What became of some tasks. Only the finished ones count in all that follows ``failed``.

    Measured stages are over all finished tasks: one that stayed on the edge spent 0 ms on transfer and cloud.
    Percentiles interpolate linearly between the two nearest samples (numpy's default). None: nothing finished.
    """

    tasks: int
    failed: int
    cuts: Mapping[int, int]  # partition point -> how often
    where: Mapping[str, int]  # "edge", "split", "cloud" -> how often
    retries: int  # of failed tasks, too
    measured_median: Mapping[str, float | None]  # the names of STAGE_NAMES, ms
    measured_p95: Mapping[str, float | None]
    predicted_total_median_ms: float | None
    measured_to_predicted_median: float | None  # of the totals, task by task; 1: predictions are right
    tasks_per_s: float

    @property
    def finished(self) -> int:
        """How many have an answer."""
        return self.tasks - self.failed


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """What became of a whole queue."""

    models: Mapping[str, GroupSummary]  # in the order in which they first appear
    overall: GroupSummary
    makespan_ms: float  # from the start of the first task to the end of the last
    objective: str
    schedule: str
    predicted_makespan_ms: Mapping[str, float]  # schedule -> ms; empty where none was predicted
    predicted_from: Mapping[str, str]  # side -> whose data its predictions come from

    def groups(self) -> dict[str, GroupSummary]:
        """Return the summary of each model, and the one over all last."""
        return {**self.models, ALL: self.overall}


def summarise(
    results: Sequence[TaskResult],
    *,
    makespan_ms: float,
    objective: str,
    schedule: str,
    predicted_makespan_ms: Mapping[str, float] | None = None,
    predicted_from: Mapping[str, str] | None = None,
) -> QueueSummary:
    """Return the statistics of a queue, per model and over all; it may have no finished task."""
    models = dict.fromkeys(result.task.model for result in results)
    groups = {model: [result for result in results if result.task.model == model] for model in models}
    return QueueSummary(
        models={model: _summarise_group(group, makespan_ms) for model, group in groups.items()},
        overall=_summarise_group(results, makespan_ms),
        makespan_ms=makespan_ms,
        objective=objective,
        schedule=schedule,
        predicted_makespan_ms=dict(predicted_makespan_ms or {}),
        predicted_from=dict(predicted_from or {}),
    )


def _summarise_group(results: Sequence[TaskResult], makespan_ms: float) -> GroupSummary:
    finished = [result for result in results if result.is_finished]
    places = Counter(result.where for result in finished)
    ratios = [_total_ratio(result) for result in finished if result.predicted.total_ms > 0]
    return GroupSummary(
        tasks=len(results),
        failed=len(results) - len(finished),
        cuts=dict(sorted(Counter(result.point for result in finished).items())),
        where={place: places[place] for place in PLACES},
        retries=sum(result.retries for result in results),
        measured_median={name: _percentile(_measured(finished, name), 50) for name in STAGE_NAMES},
        measured_p95={name: _percentile(_measured(finished, name), TAIL_PERCENTILE) for name in STAGE_NAMES},
        predicted_total_median_ms=_percentile([result.predicted.total_ms for result in finished], 50),
        measured_to_predicted_median=_percentile(ratios, 50),
        tasks_per_s=len(finished) / ms_to_s(makespan_ms) if makespan_ms > 0 else 0.0,
    )


def _measured(results: Sequence[TaskResult], name: str) -> list[float]:
    return [getattr(result.measured, name) for result in results]


def _total_ratio(result: TaskResult) -> float:
    return result.measured.total_ms / result.predicted.total_ms


def _percentile(samples: Sequence[float], percent: float) -> float | None:
    numbers = [sample for sample in samples if math.isfinite(sample)]
    return float(np.percentile(numbers, percent)) if numbers else None


# ---------------------------------------------------------------- JSON


def queue_document(results: Sequence[TaskResult], summary: QueueSummary) -> Json:
    """Return a queue as the JSON interface has it. What a failed task never had, and what is no number, is null."""
    document: Json = _strict(
        {"tasks": [_task_document(result) for result in results], "summary": _summary_document(summary)}
    )
    return document


def _task_document(result: TaskResult) -> Json:
    task = result.task
    knows_rate = result.rate_bytes_per_s > 0
    return {
        "id": task.id,
        "model": task.model,
        "image": None if task.image is None else str(task.image),
        "partition_point": result.point if result.is_planned else None,
        "partition_layer": result.layer if result.is_planned else None,
        "edge_nodes": sorted(result.edge_nodes) if result.is_planned else None,
        "crossing": tensor_documents(result.boundary) if result.is_planned else None,
        "bandwidth_mb_per_s": bytes_per_s_to_mb_per_s(result.rate_bytes_per_s) if knows_rate else None,
        "bandwidth_age_s": result.rate_age_s if knows_rate else None,
        "bandwidth_is_stale": result.rate_is_stale if knows_rate else None,
        "predicted": result.predicted.as_dict() if result.is_planned else None,
        "measured": result.measured.as_dict() if result.is_finished else None,
        "elapsed_ms": result.elapsed_ms if result.is_finished else None,
        "spans_ms": {name: list(span) for name, span in zip(SPAN_NAMES, result.spans, strict=False)},
        "output_digest": result.output_digest or None,
        "top1": result.top1,
        "label": result.label,
        "retries": result.retries,
        "where": result.where if result.is_finished else None,
        "deadline_ms": result.deadline_ms,
        "deadline_in_reach": result.is_in_reach if result.deadline_ms and result.is_planned else None,
        "deadline_met": result.is_in_time if result.deadline_ms else None,
        "error": result.error,
    }


def _summary_document(summary: QueueSummary) -> Json:
    return {
        "models": {model: _group_document(group) for model, group in summary.models.items()},
        ALL: _group_document(summary.overall),
        "makespan_ms": summary.makespan_ms,
        "tasks_per_s": summary.overall.tasks_per_s,
        "objective": summary.objective,
        "schedule": summary.schedule,
        "predicted_makespan_ms": dict(summary.predicted_makespan_ms),
        "predicted_from": dict(summary.predicted_from),
    }


def _group_document(group: GroupSummary) -> Json:
    return {
        "tasks": group.tasks,
        "failed": group.failed,
        "cuts": {str(point): count for point, count in group.cuts.items()},
        "where": dict(group.where),
        "retries": group.retries,
        "measured_median": dict(group.measured_median),
        "measured_p95": dict(group.measured_p95),
        "predicted_total_median_ms": group.predicted_total_median_ms,
        "measured_to_predicted_median": group.measured_to_predicted_median,
        "tasks_per_s": group.tasks_per_s,
    }


def _strict(value: Any) -> Any:
    """Return the value with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- Excel


def queue_sheets(results: Sequence[TaskResult], summary: QueueSummary) -> dict[str, list[Json]]:
    """Return the sheets of an Excel file: a row for each task; a row for each model, and one for all."""
    return {
        "tasks": [_strict(_task_row(result)) for result in results],
        "summary": [_strict(_group_row(name, group, summary)) for name, group in summary.groups().items()],
    }


def _task_row(result: TaskResult) -> Json:
    row = _task_document(result)
    empty = dict.fromkeys(STAGE_NAMES)
    for kind in ("predicted", "measured"):
        row |= {f"{kind}_{name}": value for name, value in (row.pop(kind) or empty).items()}
    if result.is_planned:
        row["edge_nodes"] = len(row["edge_nodes"])
        row["crossing"] = ", ".join(tensor["name"] for tensor in row["crossing"])
    spans = row.pop("spans_ms")
    for name in SPAN_NAMES:
        row[f"{name}_start_ms"], row[f"{name}_end_ms"] = spans.get(name, (None, None))
    return {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}


def _group_row(name: str, group: GroupSummary, summary: QueueSummary) -> Json:
    """Return a row; what belongs to the queue as a whole stands in the row over all."""
    row: Json = {"model": name, "tasks": group.tasks, "failed": group.failed, "retries": group.retries}
    row |= {f"on_{place}": count for place, count in group.where.items()}
    row["cuts"] = cuts_text(group.cuts)
    for kind, stages in (("median", group.measured_median), ("p95", group.measured_p95)):
        row |= {f"{kind}_{stage}": value for stage, value in stages.items()}
    row["predicted_total_median_ms"] = group.predicted_total_median_ms
    row["measured_to_predicted_median"] = group.measured_to_predicted_median
    row["tasks_per_s"] = group.tasks_per_s
    whole: Json = {
        "makespan_ms": summary.makespan_ms,
        "objective": summary.objective,
        "schedule": summary.schedule,
        **{f"predicted_{schedule}_makespan_ms": ms for schedule, ms in summary.predicted_makespan_ms.items()},
    }
    return row | (whole if name == ALL else dict.fromkeys(whole))


def cuts_text(cuts: Mapping[int, int]) -> str:
    """Return partition points and how often each was chosen: ``0:5 12:3``."""
    return " ".join(f"{point}:{count}" for point, count in cuts.items())
