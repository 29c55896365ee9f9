"""A user's own residual network in a file, served and split over loopback; and how two sides may differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_api
import tasks_edge_api
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.edge.task import request_of
from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.names import Catalogue
from neurosurgeon.net.session import EdgeSession
from tests.equality import assert_equal
from tests.networks import Network, random_input, run, run_whole, split

MODEL_FILE = '''
"""A user's own network."""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(x + self.second(y))


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class Wilful(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def mine():
    return Mine()
'''


def write(directory: Path, text: str = MODEL_FILE) -> Path:
    """Write a model file; the two sides may have files of one name in different directories."""
    directory.mkdir(exist_ok=True)
    file = directory / "my_nets.py"
    file.write_text(text)
    return file


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def served(model_file: Path) -> Iterator[list[str]]:
    """A cloud with the model file; the flags of its edges."""
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0", "--threads", "1", "--model-file", str(model_file)]
    with ServiceProcess(command, services=2) as cloud:
        yield ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1]), "--threads", "1"]


@pytest.fixture
def network(model_file: Path) -> Network:
    """The edge's own."""
    return TorchEngine(Catalogue([model_file])).open("my_nets:mine")


def random_cut(graph: LayerGraph, draw: random.Random) -> frozenset[int]:
    """Return random nodes, with all nodes that they read."""
    edge_nodes = {0}
    for node in graph.nodes[1:]:
        if set(node.inputs) <= edge_nodes and draw.random() < 0.8:
            edge_nodes.add(node.index)
    return frozenset(edge_nodes)


def test_any_cut_over_the_wire_gives_the_output_of_the_whole(served: list[str], network: Network) -> None:
    image, draw = random_input(), random.Random(1)
    whole = run_whole(network, image)
    most = 0
    with EdgeSession.open("127.0.0.1", int(served[1])) as session:
        for _ in range(30):
            cut = random_cut(network.graph, draw)
            if len(cut) == len(network.graph.nodes):
                continue
            request = request_of(network.ref, cut)
            session.ask_to_prepare(request.preparation)
            session.wait_until_ready(network.ref.weights_digest)
            boundary = run(split(network, cut).edge, [image]).arrays
            most = max(most, len(boundary))
            (output,) = session.infer(request, boundary).arrays
            assert_equal(output, whole, same_setup=True, what=sorted(cut))
    assert most >= 2


def run_json(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    """Run an edge in this process and return the one object on its stdout."""
    assert edge_api.main([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize("point", [0, 1, 3, 5, 8])
def test_edge_script_splits_an_own_network_at_any_point(
    point: int, served: list[str], model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-t", "my_nets:mine", "--model-file", str(model_file), "--point", str(point), "--verify", *served]
    result = run_json(capsys, arguments)
    assert result["max_abs_diff"] == 0.0
    assert result["partition_point"] == point
    assert result["edge_nodes"] == list(range(point + 1))
    assert result["sent_bytes"] > sum(tensor["bytes"] for tensor in result["crossing"]) > 0
    assert len(result["output"]["top5"]) == 4


def test_the_script_finds_a_cut_and_lists_the_boundary_tensors(
    served: list[str], model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-t", "mine", "--model-file", str(model_file), *served, "--strategy", "cloud-only"]
    assert edge_api.main(arguments) == 0
    out = capsys.readouterr().out
    assert "edge nodes : 1 of " in out
    assert "transferred tensor : x , 1x3x224x224 uint8 , " in out
    assert "best partition point" not in out


def test_a_queue_runs_an_own_network(served: list[str], model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = ["-t", "my_nets:mine", "le_net", "--tasks", "6", "--seed", "1"]
    arguments = ["--model-file", str(model_file), *queue, *served, "--json"]
    assert tasks_edge_api.main(arguments) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert {task["error"] for task in tasks} == {None}
    assert {task["model"] for task in tasks} == {"my_nets:mine", "le_net"}


# ---------------------------------------------------------------- how two sides may differ


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run an edge that ends with exit code 2 and one line, and has sent no tensor; return the line."""
    assert edge_api.main(arguments) == 2
    captured = capsys.readouterr()
    assert "has been sent" not in captured.out
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if "error: " in line]  # the cloud's log may come after it
    assert len(lines) == captured.err.count("error: ") == 1
    return lines[0]


def test_a_cloud_without_the_file_names_the_flag(
    address: list[str], model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, ["-t", "my_nets:mine", "--model-file", str(model_file), *address])
    assert "unknown model 'my_nets:mine'" in line
    assert "--model-file" in line


CHANGES: dict[str, Callable[[str], str]] = {
    "structure": lambda text: text.replace("x + self.second(y)", "x - self.second(y)"),
    "shape": lambda text: text.replace("Residual(8), Residual(8)", "Residual(8)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_different_files_of_one_name_are_refused(
    change: str, served: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / change, CHANGES[change](MODEL_FILE))
    line = refused(capsys, ["-t", "my_nets:mine", "--model-file", str(other), "--point", "1", *served])
    assert "different networks under the name my_nets:mine" in line
    assert "--model-file" in line


def test_different_weights_are_refused(served: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "weights", MODEL_FILE.replace("return Mine()", "torch.manual_seed(7)\n    return Mine()"))
    line = refused(capsys, ["-t", "my_nets:mine", "--model-file", str(other), "--point", "1", *served])
    assert "different weights of my_nets:mine" in line


def test_an_untraceable_module_is_one_line(
    served: list[str], model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, ["-t", "my_nets:Wilful", "--model-file", str(model_file), *served])
    assert "my_nets" in line
