"""What became of a queue: who counts in which statistic, and documents that any JSON reader and Excel take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import load_workbook

from neurosurgeon.edge.records import QueuedTask, TaskResult
from neurosurgeon.reports.excel import save_tables
from neurosurgeon.reports.summary import QueueSummary, cuts_text, queue_document, queue_sheets, summarise
from neurosurgeon.utils.logs import printable
from neurosurgeon.utils.timing import STAGE_NAMES, StageTimes
from tests.edge.samples import failed, finished, queue_of
from tests.networks import model_graph

TASK_KEYS = [
    "id", "model", "image", "partition_point", "partition_layer", "edge_nodes", "crossing", "bandwidth_mb_per_s",
    "bandwidth_age_s", "bandwidth_is_stale", "predicted", "measured", "elapsed_ms", "spans_ms", "output_digest",
    "top1", "label", "retries", "where", "deadline_ms", "deadline_in_reach", "deadline_met", "error",
]  # fmt: skip


def summary_of(results: list[TaskResult], makespan_ms: float = 2_000.0, **predicted_ms: float) -> QueueSummary:
    return summarise(
        results,
        makespan_ms=makespan_ms,
        objective="latency",
        schedule="fifo",
        predicted_makespan_ms=predicted_ms,
    )


def read_strictly(document: dict[str, Any]) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(json.dumps(document), parse_constant=refuse)


# ---------------------------------------------------------------- statistics


def test_models_stand_in_the_order_of_the_queue_and_all_is_their_sum() -> None:
    summary = summary_of(queue_of(40))
    groups = list(summary.models.values())
    assert list(summary.groups()) == [*summary.models, "all"]
    assert list(summary.models) == list(dict.fromkeys(result.task.model for result in queue_of(40)))
    for count in ("tasks", "failed", "finished", "retries"):
        assert getattr(summary.overall, count) == sum(getattr(group, count) for group in groups)
    assert summary.overall.tasks_per_s == pytest.approx(sum(group.tasks_per_s for group in groups))
    assert summary.overall.where == {
        place: sum(group.where[place] for group in groups) for place in ("edge", "split", "cloud")
    }


def test_failed_tasks_are_counted_and_stay_out_of_the_statistics() -> None:
    good = [finished(1), finished(2, point=0, where="cloud", retries=1)]
    bad = TaskResult(QueuedTask(3, "le_net"), layers=12, measured=StageTimes(1e6, 0, 0), retries=2, error="gone")
    summary, without = summary_of([*good, bad]).overall, summary_of(good).overall
    assert (summary.tasks, summary.failed, summary.finished, summary.retries) == (3, 1, 2, 3)
    assert summary.cuts == {0: 1, 3: 1}
    assert summary.where == {"edge": 0, "split": 1, "cloud": 1}
    assert summary.tasks_per_s == 1.0
    assert (summary.measured_median, summary.measured_p95) == (without.measured_median, without.measured_p95)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40))
def test_percentiles_are_numpys_over_the_measured_totals(times_ms: list[float]) -> None:
    results = [
        finished(number, measured=StageTimes(0.0, 0.0, time_ms), predicted=StageTimes(0.0, 0.0, 2 * time_ms))
        for number, time_ms in enumerate(times_ms, start=1)
    ]
    group = summary_of(results).overall
    assert group.measured_median["total_ms"] == pytest.approx(float(np.median(times_ms)))
    assert group.measured_p95["cloud_ms"] == pytest.approx(float(np.percentile(times_ms, 95)))
    assert group.predicted_total_median_ms == pytest.approx(2 * float(np.median(times_ms)))
    assert group.measured_to_predicted_median == pytest.approx(0.5)


def test_what_stayed_on_the_edge_spent_nothing_elsewhere() -> None:
    alone = finished(2, measured=StageTimes(9.0, 0.0, 0.0), where="edge", point=12)
    group = summary_of([finished(1), alone, alone]).overall
    assert group.measured_median == {"edge_ms": 9.0, "transfer_ms": 0.0, "cloud_ms": 0.0, "total_ms": 9.0}


@pytest.mark.parametrize("results", [[], [failed(1), failed(2, "vgg_net")]])
@pytest.mark.parametrize("makespan_ms", [0.0, 100.0])
def test_a_queue_of_which_nothing_finished_has_no_statistics(results: list[TaskResult], makespan_ms: float) -> None:
    summary = summary_of(results, makespan_ms)
    assert summary.overall.finished == 0
    assert summary.overall.tasks_per_s == 0.0
    assert set(summary.overall.measured_median.values()) == {None}
    assert summary.overall.predicted_total_median_ms is summary.overall.measured_to_predicted_median is None
    assert read_strictly(queue_document(results, summary))["summary"]["all"]["tasks"] == len(results)


# ---------------------------------------------------------------- JSON


def test_a_document_says_all_of_a_task() -> None:
    graph = model_graph("le_net")
    result = finished(7, image=Path("photos/cat.jpg"), label="cat", graph=graph, rate_is_stale=True, retries=1)
    (task,) = queue_document([result], summary_of([result]))["tasks"]
    assert list(task) == TASK_KEYS
    assert task == {
        "id": 7,
        "model": "le_net",
        "image": "photos/cat.jpg",
        "partition_point": 3,
        "partition_layer": "features.2 (maxpool)",
        "edge_nodes": [0, 1, 2, 3],
        "crossing": [{"name": "features.2", "shape": [1, 6, 112, 112], "dtype": "float32", "bytes": 301056}],
        "bandwidth_mb_per_s": 12.5,
        "bandwidth_age_s": 0.42,
        "bandwidth_is_stale": True,
        "predicted": {"edge_ms": 2.0, "transfer_ms": 3.0, "cloud_ms": 5.0, "total_ms": 10.0},
        "measured": {"edge_ms": 2.5, "transfer_ms": 3.5, "cloud_ms": 6.0, "total_ms": 12.0},
        "elapsed_ms": 0.0,
        "spans_ms": {"edge": [0.0, 2.5], "transfer": [2.5, 6.0], "cloud": [6.0, 12.0]},
        "output_digest": "ab" * 32,
        "top1": 123,
        "label": "cat",
        "retries": 1,
        "where": "split",
        "deadline_ms": None,
        "deadline_in_reach": None,
        "deadline_met": None,
        "error": None,
    }


def test_what_a_failed_task_never_had_is_null() -> None:
    (task,) = queue_document([failed(3)], summary_of([failed(3)]))["tasks"]
    assert {key for key, value in task.items() if value is not None} == {"id", "model", "spans_ms", "retries", "error"}
    assert list(task) == TASK_KEYS


def test_a_summary_document_has_models_all_and_the_queue() -> None:
    results = queue_of(40)
    document = queue_document(results, summary_of(results, 800.0, fifo=900.0, johnson=700.0))["summary"]
    assert {key: document[key] for key in ("makespan_ms", "tasks_per_s", "objective", "schedule")} == {
        "makespan_ms": 800.0,
        "tasks_per_s": 38 / 0.8,
        "objective": "latency",
        "schedule": "fifo",
    }
    assert document["predicted_makespan_ms"] == {"fifo": 900.0, "johnson": 700.0}
    assert all(list(group) == list(document["all"]) for group in document["models"].values())
    assert list(document["all"]["measured_p95"]) == list(STAGE_NAMES)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_document_is_strict_json_whatever_the_numbers(odd: float) -> None:
    result = finished(1, rate_age_s=odd, predicted=StageTimes(odd, 0.0, 1.0))
    document = queue_document([result, failed(2)], summary_of([result, failed(2)], odd, fifo=odd))
    assert read_strictly(document) == document
    assert document["tasks"][0]["predicted"]["edge_ms"] is None


# ---------------------------------------------------------------- Excel


def test_sheets_are_saved_and_read_back(tmp_path: Path) -> None:
    results = queue_of(40)
    save_tables(tmp_path / "queue.xlsx", queue_sheets(results, summary_of(results, 800.0, fifo=900.0, johnson=700.0)))
    book = load_workbook(tmp_path / "queue.xlsx")
    tasks, summary = (list(book[name].iter_rows(values_only=True)) for name in ("tasks", "summary"))
    assert len(tasks) == 41
    assert [row[0] for row in summary] == ["model", *dict.fromkeys(result.task.model for result in results), "all"]
    whole = dict(zip(summary[0], summary[-1], strict=True))
    assert (whole["makespan_ms"], whole["predicted_johnson_makespan_ms"], whole["failed"]) == (800, 700, 2)


def test_every_row_of_a_sheet_has_the_same_flat_columns() -> None:
    results = [failed(1), finished(2), failed(3, "vgg_net")]
    for rows in queue_sheets(results, summary_of(results, fifo=1.0)).values():
        assert all(list(row) == list(rows[0]) for row in rows)
        assert not any(isinstance(value, dict | list) for row in rows for value in row.values())


def test_a_row_has_the_nodes_of_a_graph_and_the_names_of_what_crosses() -> None:
    results = [finished(1, "resnet18", point=point, graph=model_graph("resnet18"), layers=49) for point in (9, 49)]
    inside, whole = queue_sheets(results, summary_of(results))["tasks"]
    assert (inside["edge_nodes"], inside["crossing"]) == (10, "layer1.0.relu#2, layer1.1.conv1")
    assert (whole["edge_nodes"], whole["crossing"]) == (len(model_graph("resnet18").nodes), "")


def test_a_name_that_excel_refuses_is_saved_without_its_control_characters(tmp_path: Path) -> None:
    results = [finished(1, image=Path("a\x07b\udcff.jpg"))]
    save_tables(tmp_path / "queue.xlsx", queue_sheets(results, summary_of(results)))
    assert (
        load_workbook(tmp_path / "queue.xlsx")["tasks"]["C2"].value
        == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}.jpg"
    )


def test_texts_for_people() -> None:
    assert cuts_text({0: 5, 12: 3}) == "0:5 12:3"
    assert cuts_text({}) == ""
    assert printable("猫 cat.jpg") == "猫 cat.jpg"
    assert len(printable("a\nb\x1b[2J").splitlines()) == 1
