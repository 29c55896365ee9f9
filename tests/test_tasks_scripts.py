"""The queue scripts as users type them: the contract's lines, every result, and failures during a queue."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openpyxl import load_workbook

import tasks_edge_api
from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.edge.inputs import load_image
from neurosurgeon.models.names import ZOO
from tests.networks import load_network, random_input, run_whole

TASK_KEYS = {
    "id",
    "model",
    "partition_point",
    "bandwidth_mb_per_s",
    "bandwidth_age_s",
    "predicted",
    "measured",
    "output_digest",
    "top1",
    "label",
    "retries",
    "where",
}
HANG_S = 120.0


def run_json(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> dict[str, Any]:
    """Run a queue in this process and return the one object on its stdout."""
    assert tasks_edge_api.main([*arguments, "--json"]) == code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def top_class(model: str, image: Path | None = None) -> int:
    tensor = load_image(image) if image else random_input()
    return int(run_whole(load_network(model), tensor).argmax())


# ---------------------------------------------------------------- the contract's lines


def test_a_queue_prints_the_contract_lines(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_edge_api.main([*address, "--tasks", "3", "--seed", "5", "--in-flight", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = re.fullmatch(r"tasks list info : \['\w+', '\w+', '\w+'\]", lines[0])
    assert listed
    assert lines[1] == "===================== start inference tasks ===================== "
    models = re.findall(r"'(\w+)'", lines[0])
    starts = [index for index, line in enumerate(lines) if line.startswith("get bandwidth value : ")]
    assert len(starts) == 3
    for start, model in zip(starts, models, strict=True):
        assert re.match(r"get bandwidth value : \d+\.\d+(e\+\d+)? MB/s", lines[start])
        assert lines[start + 1] == f"get model type: {model} "
        assert re.fullmatch(r"best latency : \d+\.\d\d ms , best partition point : \d+ - .+", lines[start + 2])
        assert any(line.startswith(f"{model} 在边缘端设备上推理完成 - ") for line in lines[start:])
    assert lines.count("================= DNN Collaborative Inference Finished. ===================") == 3


def test_the_default_queue_is_forty_random_tasks(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    document = run_json(capsys, [*address, "--seed", "1"])
    tasks, summary = document["tasks"], document["summary"]
    assert sorted(task["id"] for task in tasks) == list(range(1, 41))
    assert {task["model"] for task in tasks} == set(ZOO)
    assert all(set(task) >= TASK_KEYS and task["error"] is None for task in tasks)
    assert set(summary["models"]) == set(ZOO)
    assert summary["objective"] == "latency"
    assert summary["schedule"] == "fifo"
    assert set(summary["predicted_makespan_ms"]) == {"fifo", "johnson"}
    for model in ZOO:
        assert {task["top1"] for task in tasks if task["model"] == model} == {top_class(model)}


@pytest.mark.parametrize(
    "flags",
    [
        ["--in-flight", "1"],
        ["--in-flight", "8", "--objective", "throughput", "--schedule", "johnson"],
        ["--bandwidth", "0.01", "--rtt", "200"],
        ["--predictor", "linear", "--no-load-feedback", "--no-correction"],
    ],
)
def test_a_queue_answers_every_task_with_any_flags(
    flags: list[str], address: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, [*address, "--tasks", "10", "--seed", "2", *flags])
    assert sorted(task["id"] for task in document["tasks"]) == list(range(1, 11))
    assert all(task["error"] is None for task in document["tasks"])
    if "0.01" in flags:
        assert {task["where"] for task in document["tasks"]} == {"edge"}


def test_tables_and_plot_are_written(address: list[str], tmp_path: Path) -> None:
    files = [tmp_path / "queue.xlsx", tmp_path / "queue.png"]
    flags = ["--excel", str(files[0]), "--plot", str(files[1])]
    assert tasks_edge_api.main([*address, "--tasks", "4", "-t", "le_net", *flags]) == 0
    assert load_workbook(files[0])["tasks"].max_row == 5
    assert files[1].read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- where tasks come from


def test_a_task_file_with_an_unreadable_image_among_others(
    address: list[str], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "tasks.txt").write_text(f"le_net {photo}\n\n# a comment\nle_net broken.jpg\nmobilenet\n")
    document = run_json(capsys, [*address, "--task-file", str(tmp_path / "tasks.txt")], code=1)
    by_id = {task["id"]: task for task in document["tasks"]}
    assert by_id[1]["top1"] == top_class("le_net", photo)
    assert "broken.jpg" in by_id[2]["error"]
    assert by_id[3]["top1"] == top_class("mobile_net")
    assert document["summary"]["models"]["le_net"]["failed"] == 1


def test_every_image_of_a_directory_is_a_task(
    address: list[str], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = run_json(capsys, [*address, "--input-dir", str(photo.parent), "-t", "le_net", "alex_net"])
    assert [task["model"] for task in sorted(document["tasks"], key=lambda task: task["id"])] == ["le_net", "alex_net"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "tasks.txt"),
        ("le_net\n" * 16 + "res_net\n", "line 17"),
        ("le_net\nmobile_net@99999\n", "line 2"),
        ("# nothing\n", "tasks.txt"),
    ],
)
def test_a_bad_task_file_is_one_line(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks.txt").write_text(content)
    assert tasks_edge_api.main(["--task-file", str(tmp_path / "tasks.txt")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [["--in-flight", "0"], ["--tasks", "-1"], ["--tasks", "3", "--input-dir", "."]]
    + [["--objective", "fun"], ["--monitor-interval", "0"], ["--schedule", "lifo"]],
)
def test_bad_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        tasks_edge_api.main(flags)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_edge_api.main(["-t", "res_net"]) == 2
    error = capsys.readouterr().err
    assert "unknown model 'res_net'" in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- failures during a queue


@pytest.fixture
def own_cloud() -> Iterator[ServiceProcess]:
    """A cloud for one test, which may be stopped."""
    with ServiceProcess(["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0"], services=2) as process:
        yield process


class Edge:
    """A queue as a process of its own; its finished tasks can be waited for."""

    def __init__(self, ports: list[int], *flags: str) -> None:
        command = [sys.executable, "tasks_edge_api.py", "-p", str(ports[0]), "--monitor-port", str(ports[1]), *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        self.lines: list[str] = []
        self._finished = threading.Semaphore(0)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("task "):
                self._finished.release()

    def wait_for_tasks(self, count: int) -> None:
        for _ in range(count):
            assert self._finished.acquire(timeout=HANG_S)

    def end(self) -> tuple[int, str]:
        """Return exit code and stderr."""
        assert self.process.stderr
        error = self.process.stderr.read()
        code = self.process.wait(HANG_S)
        self._reader.join(HANG_S)
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.stderr.close()
        return code, error

    def answered(self) -> list[int]:
        return sorted(int(line.split()[1]) for line in self.lines if re.match(r"task \d+ of \d+ : ", line))


def test_a_restarted_cloud_loses_no_task(own_cloud: ServiceProcess) -> None:
    edge = Edge(own_cloud.ports, "--tasks", "30", "--seed", "3", "-t", "alex_net", "vgg_net", "--bandwidth", "1000")
    edge.wait_for_tasks(5)
    own_cloud.process.kill()
    own_cloud.process.wait()
    again = ["tasks_cloud_api.py", "-p", str(own_cloud.ports[0]), "--monitor-port", "0"]
    with ServiceProcess(again, services=2):
        code, error = edge.end()
    assert code == 0, error
    assert edge.answered() == list(range(1, 31))


def test_a_queue_runs_without_a_bandwidth_service(address: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*address[:2], "--monitor-port", "1", "--bandwidth", "100", "--monitor-interval", "0.05"]
    document = run_json(capsys, [*flags, "--tasks", "20", "--seed", "1"])
    assert all(task["error"] is None for task in document["tasks"])


def test_ctrl_c_finishes_the_tasks_in_flight(own_cloud: ServiceProcess) -> None:
    edge = Edge(own_cloud.ports, "--tasks", "5000", "--seed", "3", "-t", "alex_net")
    edge.wait_for_tasks(5)
    edge.process.send_signal(signal.SIGINT)
    code, error = edge.end()
    assert code == 130, error
    assert "finishing the tasks in flight" in error
    assert "Traceback" not in error
    assert any(line.startswith("measured makespan") for line in edge.lines)
    assert len(edge.answered()) < 5000


def test_two_edges_with_equal_task_ids_get_their_results(
    cloud: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Edge(cloud.ports, "--tasks", "12", "-t", "alex_net", "--bandwidth", "1000")
    flags = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1]), "--bandwidth", "1000"]
    document = run_json(capsys, [*flags, "--tasks", "12", "-t", "mobile_net"])
    assert {task["top1"] for task in document["tasks"]} == {top_class("mobile_net")}
    code, error = other.end()
    assert code == 0, error
    classes = {re.search(r"top class (\d+)", line)[1] for line in other.lines if "top class" in line}  # type: ignore[index]
    assert classes == {str(top_class("alex_net"))}


def test_an_unreachable_cloud_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_edge_api.main(["-p", "1", "--tasks", "1"]) == 3
    assert capsys.readouterr().err.count("\n") == 1
