"""A user's own residual network in a file, served and split over loopback; and how two sides may differ."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge_api
import tasks_edge_api
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.edge.task import request_of
from neurosurgeon.engine.base import Verdict
from neurosurgeon.engine.torch_engine import TorchEngine, TorchNetwork
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array
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


DETECTOR_FILE = '''
"""A network of two inputs and several outputs."""

import torch
from torch import nn


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, image, mask):
        features = torch.relu(self.stem(image))
        pooled = (features * mask).mean((2, 3))
        return {"features": [features, features.amax()], "scores": self.head(pooled), "kept": torch.nonzero(mask)}


def example():
    return {"image": torch.rand(1, 1, 10, 10), "mask": torch.rand(8, 8) > 0.5}
'''


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
    assert "top-5 classes:" in out  # of the module's own weights, which mean something


def test_a_queue_runs_an_own_network(served: list[str], model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue = ["-t", "my_nets:mine", "le_net", "--tasks", "6", "--seed", "1"]
    arguments = ["--model-file", str(model_file), *queue, *served, "--json"]
    assert tasks_edge_api.main(arguments) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert {task["error"] for task in tasks} == {None}
    assert {task["model"] for task in tasks} == {"my_nets:mine", "le_net"}


# ---------------------------------------------------------------- several inputs and outputs


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("detector"), DETECTOR_FILE)


@pytest.fixture(scope="module")
def detects(detector_file: Path) -> Iterator[list[str]]:
    """A cloud with the network of several inputs and outputs; the flags of its edges."""
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0", "--threads", "1", "--model-file", str(detector_file)]
    with ServiceProcess(command, services=2) as cloud:
        ports = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]
        yield ["-t", "my_nets:Detector", "--model-file", str(detector_file), "--threads", "1", *ports]


def detected(file: Path, inputs: Mapping[str, Array]) -> Any:
    """Return what the user's own module makes of its inputs."""
    module = Catalogue([file]).build_module("my_nets:Detector").eval()
    with torch.inference_mode():
        return module(**{name: torch.from_numpy(array) for name, array in inputs.items()})


def test_a_network_of_several_inputs_and_outputs_is_split_at_any_point(
    detects: list[str], detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"mask": np.eye(8) > 0, "image": np.random.default_rng(1).random((1, 1, 10, 10), np.float32)}
    np.savez(tmp_path / "inputs.npz", **inputs)
    expected = detected(detector_file, inputs)
    layers, where = 1, set()
    for point in range(20):
        if point > layers:
            break
        arguments = [*detects, "--input", str(tmp_path / "inputs.npz"), "--point", str(point), "--verify"]
        result = run_json(capsys, arguments)
        layers = result["layers"]
        where.add(result["where"])
        output = result["output"]
        assert result["verified"], point
        assert output["kept"]["values"] == [[index, index] for index in range(8)]
        assert output["features"][0]["shape"] == [1, 4, 8, 8]
        assert output["features"][1]["values"] == pytest.approx(expected["features"][1].item(), rel=1e-4)
        assert output["scores"]["top5"][0]["index"] == expected["scores"].argmax()
    assert where == {"cloud", "split", "edge"}


def test_a_queue_takes_several_inputs_from_files(
    detects: list[str], detector_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [{"image": np.full((1, 1, 10, 10), number, np.float32), "mask": np.eye(8) > 0} for number in range(3)]
    for number, arrays in enumerate(inputs):
        np.savez(tmp_path / f"{number}.npz", **arrays)
    (tmp_path / "tasks.txt").write_text("".join(f"my_nets:Detector {number}.npz\n" for number in range(3)))
    flags = [flag for flag in detects if flag not in ("-t", "my_nets:Detector")]
    assert tasks_edge_api.main([*flags, "--task-file", str(tmp_path / "tasks.txt"), "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert [task["error"] for task in tasks] == [None] * 3
    assert len({task["output_digest"] for task in tasks}) == 3
    expected = [int(detected(detector_file, arrays)["scores"].argmax()) for arrays in inputs]
    assert [task["top1"] for task in tasks] == expected


def test_wrong_inputs_are_refused_with_the_names(
    detects: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "inputs.npz", image=np.zeros((1, 1, 10, 10), np.float32), musk=np.eye(8) > 0)
    line = refused(capsys, [*detects, "--input", str(tmp_path / "inputs.npz")])
    assert "expected 2 (image float32 (1, 1, 10, 10), mask bool (8, 8)), got image, musk" in line


def test_an_output_that_is_not_that_of_the_module_ends_with_exit_code_1(
    detects: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchNetwork, "verify", lambda *_: Verdict(0.5, 0.25, False))
    assert edge_api.main([*detects, "--point", "1", "--verify", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verified"] is False
    assert "the output differs from that of the user's module by 0.25 of its largest value" in captured.err
    assert "Traceback" not in captured.err


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
