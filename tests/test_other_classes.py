"""A network known by name with ten classes, trained by the user: both sides get its checkpoint, and the edge labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import edge_api
import neurosurgeon as ns
import tasks_edge_api
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.models.weights import seeded_state
from neurosurgeon.utils.errors import UsageError
from tests.networks import skeleton

NAMES = [f"kind {index}" for index in range(10)]
FLAGS = ["--bandwidth", "5", "--rtt", "1", "--threads", "1", "--no-correction", "--json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "ten.pth"
    torch.save({"model": seeded_state("trained", skeleton("le_net#10")), "epoch": 9}, path)
    return path


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "names.txt"
    path.write_text("\n".join(NAMES))
    return path


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[ServiceProcess]:
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0", "--threads", "1", "--models", "le_net"]
    with ServiceProcess([*command, "--weights", f"le_net={checkpoint}"], services=2) as cloud:
        yield cloud


def ports(served: ServiceProcess) -> list[str]:
    return ["-p", str(served.ports[0]), "--monitor-port", str(served.ports[1])]


def test_the_edge_finds_the_number_in_the_file(
    served: ServiceProcess, checkpoint: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-t", "lenet", "--weights", str(checkpoint), "--labels", str(labels), "--point", "3", "--verify"]
    assert edge_api.main([*ports(served), *given, *FLAGS]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["model"] == "le_net#10"
    assert document["output"]["shape"] == [1, 10]
    assert all(best["label"] == NAMES[best["index"]] for best in document["output"]["top5"])
    assert "top-5 classes:" in shown.err
    assert "mean nothing" not in shown.err


def test_a_queue_shows_the_labels(
    served: ServiceProcess, checkpoint: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-t", "le_net", "--tasks", "2", "--weights", f"le_net={checkpoint}", "--labels", str(labels)]
    assert tasks_edge_api.main([*ports(served), *given, *FLAGS]) == 0
    shown = capsys.readouterr()
    tasks = json.loads(shown.out)["tasks"]
    assert [task["model"] for task in tasks] == ["le_net#10"] * 2
    assert {task["label"] for task in tasks} == {NAMES[tasks[0]["top1"]]}
    assert f"top class {NAMES[tasks[0]['top1']]}" in shown.err


def test_a_program_gets_the_labels(served: ServiceProcess, checkpoint: Path) -> None:
    edge = ns.Edge(port=served.ports[0], monitor_port=served.ports[1], threads=1, labels=NAMES)
    outcome = edge.run("le_net", rate_mb_per_s=5, rtt_ms=1, weights=checkpoint, point=2)
    assert outcome.guesses[0].label == NAMES[outcome.guesses[0].index]
    few = ns.Edge(port=served.ports[0], monitor_port=served.ports[1], threads=1, labels=NAMES[:9])
    with pytest.raises(UsageError, match="le_net#10 has 10 classes, and there are 9 labels"):
        few.run("le_net", rate_mb_per_s=5, rtt_ms=1, weights=checkpoint)


@pytest.mark.parametrize("classes", ["7", "1000"])
def test_a_flag_that_contradicts_the_file_is_refused(
    checkpoint: Path, classes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-t", "le_net", "--weights", str(checkpoint), "--classes", classes, *FLAGS]
    assert edge_api.main(given) == UsageError.exit_code
    shown = capsys.readouterr().err
    assert "10" in shown
    assert classes in shown
