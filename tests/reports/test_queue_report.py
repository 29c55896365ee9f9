"""The output of a queue: the contract's lines letter by letter, whole blocks of lines, an unbroken progress bar."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from neurosurgeon.edge.records import QueuedTask, QueueStarted, TaskDone, TaskPlanned, TaskResult
from neurosurgeon.reports.queue_report import QueueReport, print_summary, task_block
from neurosurgeon.reports.summary import summarise
from neurosurgeon.reports.text import FINISHED, RULE
from neurosurgeon.utils.timing import StageTimes
from tests.edge.samples import failed, finished, queue_of
from tests.networks import model_graph

POINTS = {  # of resnet18: partition point -> transferred tensors
    0: ["x , 1x3x224x224 uint8 , 150.5 KB"],
    6: ["maxpool , 1x64x56x56 float32 , 802.8 KB", "layer1.0.conv2 , 1x64x56x56 float32 , 802.8 KB"],
    49: [],
}


class Terminal(io.StringIO):
    """A terminal that keeps everything that was written to it."""

    def isatty(self) -> bool:
        return True


# ---------------------------------------------------------------- the lines of a task


def test_the_lines_of_a_task_are_those_of_the_contract() -> None:
    result = finished(
        7,
        point=0,
        layer="None",
        where="cloud",
        rate_bytes_per_s=7152.80666553514e6,
        predicted=StageTimes(0.0, 0.77, 88.0),
        measured=StageTimes(0.072, 0.129, 34.621),
    )
    assert task_block(result, 40) == (
        "get bandwidth value : 7152.80666553514 MB/s (age 0.4 s)\n"
        "get model type: le_net \n"
        "best latency : 88.77 ms , best partition point : 0 - None\n"
        "best latency of this task alone : 10.00 ms\n"
        f"{RULE}\n"
        "short message , model type has been sent successfully\n"
        "short message , partition strategy has been sent successfully\n"
        "le_net 在边缘端设备上推理完成 - 0.072 ms\n"
        "get yes , edge output has been sent successfully\n"
        "le_net 传输完成 - 0.129 ms\n"
        "le_net 在云端设备上推理完成 - 34.621 ms\n"
        "task 7 of 40 : top class 123 , answered by cloud\n"
        f"{FINISHED}\n"
    )


@pytest.mark.parametrize(("point", "boundary"), POINTS.items())
def test_cut_of_a_graph_has_its_nodes_and_boundary_tensors(point: int, boundary: list[str]) -> None:
    graph = model_graph("resnet18")
    result = finished(1, "resnet18", point=point, layers=len(graph.layers), graph=graph)
    lines = task_block(result, 1).splitlines()
    nodes = len(graph.edge_nodes(point))
    assert lines[2] == f"best latency : 10.00 ms , edge nodes : {nodes} of {len(graph.nodes)}"
    assert lines[3 : lines.index(RULE)] == [f"transferred tensor : {tensor}" for tensor in boundary]


def test_cut_of_a_chain_has_the_contract_line() -> None:
    lines = task_block(finished(1, graph=model_graph("le_net")), 1).splitlines()
    assert lines[2] == "best latency : 10.00 ms , best partition point : 3 - features.2 (maxpool)"


def test_task_on_the_edge_has_no_lines_of_sending() -> None:
    block = task_block(finished(1, where="edge", measured=StageTimes(9.0, 0.0, 0.0)), 1)
    assert "在边缘端设备上推理完成 - 9.000 ms" in block
    assert not any(word in block for word in ("sent", "传输完成", "云端"))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (finished(1, rate_age_s=3.94, rate_is_stale=True), "MB/s (age 3.9 s, stale)\n"),
        (finished(1, retries=2), "answered by split , retries 2\n"),
        (finished(1, top1=None), "task 1 of 1 : answered by split\n"),
        (finished(1, label="cat"), "task 1 of 1 : top class cat , answered by split\n"),
    ],
)
def test_task_shows_stale_rate_retries_and_class(result: TaskResult, said: str) -> None:
    assert said in task_block(result, 1)


@pytest.mark.parametrize("alone_ms", [0.0, 10.0])
def test_best_cut_alone_is_shown_only_if_it_differs(alone_ms: float) -> None:
    assert "alone" not in task_block(finished(1, best_total_ms=alone_ms), 1)


def test_a_failed_task_is_one_line() -> None:
    assert task_block(failed(7), 40) == "task 7 of 40 failed : the cloud is gone\n"
    assert task_block(failed(7, error="two\nlines"), 40).count("\n") == 1


# ---------------------------------------------------------------- a whole queue


def test_a_queue_starts_with_its_models_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    with QueueReport() as report:
        report(QueueStarted([QueuedTask(1, "le_net"), QueuedTask(2, "mobile_net"), QueuedTask(3, "le_net")]))
    captured = capsys.readouterr()
    assert captured.out == (
        "tasks list info : ['le_net', 'mobile_net', 'le_net']\n"
        "===================== start inference tasks ===================== \n"
    )
    assert captured.err == ""


def test_blocks_of_many_threads_stay_whole() -> None:
    results = queue_of(200)
    stream = io.StringIO()
    with QueueReport(stream) as report, ThreadPoolExecutor(8) as pool:
        report(QueueStarted([result.task for result in results]))
        stream.truncate(0)
        stream.seek(0)
        list(pool.map(report, [TaskDone(result, None) for result in results]))
    text = stream.getvalue()
    for result in results:
        block = task_block(result, 200)
        assert block in text
        text = text.replace(block, "", 1)
    assert text == ""


def test_lines_go_to_the_given_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with QueueReport(sys.stderr) as report:
        report(QueueStarted([QueuedTask(1, "le_net")]))
        report(TaskDone(finished(1), None))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(FINISHED + "\n")


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with QueueReport(io.StringIO()) as report:
        report(QueueStarted([QueuedTask(1, "le_net")]))
        report(TaskPlanned(12.5e6, 3.0))
        report(TaskDone(finished(1), None))
    assert capsys.readouterr().err == ""


@contextlib.contextmanager
def in_terminal() -> Iterator[Terminal]:
    """Redirect stdout and stderr to one terminal. Not a fixture, as pytest sets both again before the test."""
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        yield terminal


def test_a_bar_shows_progress_rate_and_load() -> None:
    tasks = [QueuedTask(1, "le_net"), QueuedTask(2, "le_net")]
    with in_terminal() as terminal, QueueReport() as report:
        report(QueueStarted(tasks))
        report(TaskDone(finished(1), None))
        report(TaskPlanned(12.5e6, 3.0))
    shown = terminal.getvalue()
    assert "queue" in shown
    assert "1/2" in shown
    assert "12.5 MB/s, cloud queue 3.0 ms" in shown


def test_bar_is_cleared_before_a_block() -> None:
    with in_terminal() as terminal, QueueReport() as report:
        report(QueueStarted([QueuedTask(1, "le_net")]))
        report(TaskDone(finished(1), None))
    before = terminal.getvalue().partition("get bandwidth value")[0]
    assert before.endswith("\r")
    assert not before.split("\r")[-2].strip()


def test_log_lines_do_not_break_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_terminal() as terminal:
        handler = logging.StreamHandler(terminal)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        monkeypatch.setattr(logging.root, "handlers", [handler])
        with QueueReport() as report:
            report(QueueStarted([QueuedTask(1, "le_net")]))
            logging.getLogger("net").warning("the link is slow")
        assert logging.root.handlers == [handler]
    assert "\rWARNING the link is slow\n" in terminal.getvalue()


# ---------------------------------------------------------------- the table


def printed(results: list[TaskResult], capsys: pytest.CaptureFixture[str], **predicted_ms: float) -> list[str]:
    summary = summarise(
        results, makespan_ms=800.0, objective="makespan", schedule="johnson", predicted_makespan_ms=predicted_ms
    )
    print_summary(summary)
    return capsys.readouterr().out.splitlines()


def test_the_table_has_a_line_for_each_model_and_one_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    results = [finished(1), finished(2), finished(3, "vgg_net", where="edge", point=53, retries=1), failed(4)]
    lines = printed(results, capsys, fifo=900.0, johnson=700.0)
    rows = {line.split()[0]: line.split() for line in lines[2:5]}
    assert rows["le_net"] == [
        "le_net", "3", "1", "0/2/0", "0", "2.50", "3.50", "6.00", "12.00", "12.00", "10.00", "1.20", "2.50", "3:2",
    ]  # fmt: skip
    assert rows["vgg_net"][3:5] == ["1/0/0", "1"]
    assert rows["all"][1:4] == ["4", "1", "1/2/0"]
    assert rows["vgg_net"][-1] == "53:1"
    assert ":" not in rows["all"][-1]  # points of different networks are not counted together
    assert lines[5:] == [
        "predicted makespan, fifo     : 900.00 ms",
        "predicted makespan, johnson  : 700.00 ms",
        "measured makespan            : 800.00 ms , 3 of 4 tasks , 3.75 tasks/s"
        " , objective makespan , schedule johnson",
    ]


@pytest.mark.parametrize("results", [[], [failed(1)]])
def test_table_without_results_has_dashes(results: list[TaskResult], capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(results, capsys)
    assert lines[-2].split()[0] == "all"
    assert "-" in lines[-2].split()
    assert lines[-1].startswith("measured makespan")


def test_table_goes_to_the_given_stream(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise([finished(1)], makespan_ms=1.0, objective="latency", schedule="fifo")
    print_summary(summary, sys.stderr)
    print(json.dumps({}))
    captured = capsys.readouterr()
    assert captured.out == "{}\n"
    assert "measured makespan" in captured.err


def test_deadline_is_shown_with_the_result() -> None:
    blocks = [
        task_block(finished(deadline_ms=deadline_ms, elapsed_ms=12.0), 1) for deadline_ms in (None, 20.0, 11.0, 5.0)
    ]
    assert "deadline" not in blocks[0]
    assert "deadline 20 ms met\n" in blocks[1]
    assert "deadline 11 ms missed\n" in blocks[2]
    assert "deadline 5 ms missed (no cut makes it)\n" in blocks[3]
