"""The Python API: plans without a cloud, tasks and queues with one, modules of the user, and wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import neurosurgeon as ns
from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.edge.inputs import load_image
from neurosurgeon.edge.records import Answered, Finished, LinkKnown, Planned, TaskEvent
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.utils.errors import (
    ConnectError,
    InputError,
    InputSizeError,
    NeurosurgeonError,
    PartitionError,
    PlanningError,
    UnknownModelError,
    UsageError,
    WeightsError,
)
from tests.equality import THREADS, assert_equal, output_digest, whole_digest
from tests.faults import write_slow_edge

LINK: dict[str, Any] = {"rate_mb_per_s": 100.0, "rtt_ms": 0.1}


class Mine(nn.Module):
    """A network of the user, which takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def edge(cloud_process: ServiceProcess) -> ns.Edge:
    """An edge of the shared cloud."""
    port, monitor_port = cloud_process.ports
    return ns.Edge(port=port, monitor_port=monitor_port, threads=THREADS)


@pytest.fixture(scope="module")
def mine() -> nn.Module:
    """A module of the user."""
    torch.manual_seed(5)
    return Mine().eval()


@pytest.fixture(scope="module")
def own_cloud(mine: nn.Module) -> Iterator[ns.Cloud]:
    """A cloud in this process, with the user's module."""
    with ns.Cloud({"mine": mine}, flags=["--threads", str(THREADS)]) as cloud:
        yield cloud


@pytest.fixture
def own_edge(own_cloud: ns.Cloud, mine: nn.Module) -> ns.Edge:
    """An edge of that cloud, with the same module."""
    port, monitor_port = own_cloud.port, own_cloud.monitor_port
    return ns.Edge(port=port, monitor_port=monitor_port, models={"mine": mine}, threads=THREADS)


def test_importing_the_package_imports_no_library() -> None:
    code = "import neurosurgeon, sys; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'scipy')))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_plan_has_every_candidate_and_becomes_json() -> None:
    plan = ns.plan("alex_net", rate_mb_per_s=10.0, rtt_ms=5.0)
    assert [candidate.point for candidate in plan.candidates] == list(range(len(plan.graph.layers) + 1))
    assert json.loads(json.dumps(plan.to_dict()))["best"]["point"] == plan.best.point


def test_a_module_of_the_user_is_planned() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 4))
    graph = ns.layer_graph(module, input_shape=(1, 3, 16, 16))
    assert graph.outputs[0].spec.shape == (1, 4)
    assert ns.layer_graph(graph) is graph
    assert len(ns.plan(graph, rate_mb_per_s=1.0).candidates) == 5


def test_strategies_are_compared_as_rows() -> None:
    rows = ns.compare(["le_net", "alex_net"], [0.1, 100.0], rtt_ms=5.0, strategies=["dads", "edge-only"])
    assert {(row.model, row.strategy, row.mb_per_s) for row in rows} == {
        (model, strategy, rate)
        for model in ("le_net", "alex_net")
        for strategy in (Strategy.DADS, Strategy.EDGE_ONLY)
        for rate in (0.1, 100.0)
    }
    best = {(row.model, row.mb_per_s): row.total_ms for row in rows if row.strategy == "dads"}
    assert all(best[row.model, row.mb_per_s] <= row.total_ms for row in rows)


def test_an_unknown_model_is_a_typed_error() -> None:
    with pytest.raises(UnknownModelError, match="no_such_net"):
        ns.plan("no_such_net", rate_mb_per_s=1.0)


def test_a_task_is_answered_and_reports_its_events(edge: ns.Edge) -> None:
    events: list[TaskEvent] = []
    with edge:
        outcome = edge.run("le_net", point=3, rate_mb_per_s=100.0, observe=events.append)
    assert outcome.to_dict()["output"]["digest"] == whole_digest("le_net")
    assert outcome.output.shape == (1, 1000)
    kinds = [type(event) for event in events]
    assert (kinds[0], kinds[1], kinds[-2], kinds[-1]) == (LinkKnown, Planned, Finished, Answered)
    assert json.loads(json.dumps(outcome.to_dict()))["partition_point"] == 3


def test_inputs_of_all_kinds_give_the_same_answer(edge: ns.Edge, photo: Path) -> None:
    from neurosurgeon.edge.inputs import read_image

    array = load_image(photo)
    expected = edge.run("le_net", photo, point=3, **LINK).output
    for given in (str(photo), read_image(photo), array, torch.from_numpy(array)):
        assert_equal(edge.run("le_net", given, point=3, **LINK).output, expected, same_setup=True, what=type(given))


def test_a_queue_yields_each_result_with_its_output(edge: ns.Edge, photo: Path, tmp_path: Path) -> None:
    tasks = [("le_net", None), ("le_net", photo), ("lenet", load_image(photo)), ("le_net", "none.jpg")]
    slow_edge = write_slow_edge(tmp_path / "slow.json")  # all tasks are sent
    done = {task.result.task.id: task for task in edge.run_queue(tasks, edge_config=slow_edge, **LINK)}
    assert sorted(done) == [1, 2, 3, 4]
    assert [done[number].result.where for number in (1, 2, 3)] == ["cloud"] * 3
    assert done[1].output is not None
    assert output_digest(done[1].output) == done[1].result.output_digest == whole_digest("le_net")
    assert done[2].result.output_digest == done[3].result.output_digest != whole_digest("le_net")
    assert done[4].output is None
    assert "none.jpg" in str(done[4].result.error)


def test_a_queue_left_early_begins_no_other_task(edge: ns.Edge) -> None:
    results = edge.run_queue([("le_net", None)] * 500, in_flight=2, **LINK)
    assert next(results).result.error is None
    results.close()  # would block for the time of all tasks
    with pytest.raises(StopIteration):
        next(results)


def test_an_empty_queue_has_no_results(edge: ns.Edge) -> None:
    assert list(edge.run_queue([], **LINK)) == []


@pytest.mark.parametrize("name", ["mine", "module:mine"])
def test_a_module_is_split_with_its_own_weights(own_edge: ns.Edge, mine: nn.Module, name: str) -> None:
    image = torch.rand(1, 3, 224, 224)
    outcome = own_edge.run(name, image, point=1, verify=True, **LINK)
    assert outcome.where == "split"
    with torch.inference_mode():
        assert_equal(outcome.output, mine(image), same_setup=False)


def test_a_module_is_a_task_of_a_queue(own_edge: ns.Edge, mine: nn.Module, tmp_path: Path) -> None:
    images = list(torch.rand(3, 1, 3, 224, 224))
    slow_edge = write_slow_edge(tmp_path / "slow.json")
    for done in own_edge.run_queue([("mine", image) for image in images], edge_config=slow_edge, **LINK):
        assert done.output is not None
        with torch.inference_mode():
            assert_equal(done.output, mine(images[done.result.task.id - 1]), same_setup=False)


def test_a_stream_of_frames_yields_their_classes(own_edge: ns.Edge, mine: nn.Module) -> None:
    frames = [np.full((224, 224, 3), value, np.uint8) for value in (0, 100, 200)]
    results = {done.result.task.id: done for done in own_edge.run_stream("mine", frames, keep_all=True, **LINK)}
    for number, frame in enumerate(frames, start=1):
        outcome = own_edge.run("mine", frame, **LINK)
        assert_equal(results[number].output, outcome.output, same_setup=False)
        taken = results[number].result.task.frame
        assert taken is not None
        assert taken.number == number
        assert (results[number].result.age_ms or 0) > 0


def test_a_stream_has_the_labels_of_its_edge(own_cloud: ns.Cloud, mine: nn.Module) -> None:
    labels = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]
    ports = {"port": own_cloud.port, "monitor_port": own_cloud.monitor_port}
    edge = ns.Edge(**ports, models={"mine": mine}, threads=THREADS, labels=labels)
    (done,) = edge.run_stream("mine", [np.zeros((300, 300, 3), np.uint8)], keep_all=True, **LINK)
    assert done.result.label in labels


def test_a_queue_with_too_few_labels_is_refused_and_leaves_no_connection(own_cloud: ns.Cloud, mine: nn.Module) -> None:
    ports = {"port": own_cloud.port, "monitor_port": own_cloud.monitor_port}
    edge = ns.Edge(**ports, models={"mine": mine}, threads=THREADS, labels=["ant", "bee"])
    with pytest.raises(UsageError, match="7 classes, and there are 2 labels"):
        next(edge.run_queue([("mine", None)], **LINK))


def test_a_stream_that_breaks_raises_after_its_results(own_edge: ns.Edge) -> None:
    def frames() -> Iterator[Any]:
        yield np.zeros((300, 300, 3), np.uint8)
        raise OSError("unplugged")

    results = own_edge.run_stream("mine", frames(), keep_all=True, **LINK)
    assert next(results).result.is_finished
    with pytest.raises(OSError, match="unplugged"):
        next(results)


def test_a_cloud_of_modules_serves_no_other_model(own_edge: ns.Edge) -> None:
    with pytest.raises(UnknownModelError, match="module:mine"):
        own_edge.run("le_net", point=0, **LINK)


def test_modules_of_other_weights_are_refused(own_cloud: ns.Cloud) -> None:
    other = ns.Edge(port=own_cloud.port, monitor_port=own_cloud.monitor_port, models={"mine": Mine()}, threads=THREADS)
    with pytest.raises(WeightsError):
        other.run("mine", point=1, **LINK)


def test_a_local_cloud_serves_its_models_and_ends_with_its_block() -> None:
    with ns.Cloud(["le_net"]) as cloud:
        outcome = ns.Edge(port=cloud.port, monitor_port=cloud.monitor_port).run("le_net", verify=True)
        assert outcome.max_abs_diff is not None
        assert outcome.max_abs_diff < 1e-4
    with pytest.raises(ConnectError):
        ns.Edge(port=cloud.port, monitor_port=cloud.monitor_port).run("le_net", rate_mb_per_s=1.0)


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"rate_mb_per_s": 0.0}, "rate_mb_per_s: expected a number above 0, got 0.0"),
        ({"rate_mb_per_s": float("nan")}, "got nan"),
        ({"rtt_ms": -1.0}, "rtt_ms: expected a number of at least 0, got -1.0"),
        ({"max_edge_memory_mb": 0.0}, "max_edge_memory_mb"),
        ({"strategy": "best"}, "strategy: expected dads or neurosurgeon .* got 'best'"),
        ({"objective": "speed"}, "objective: expected latency or throughput, got 'speed'"),
        ({"model": nn.ReLU}, "expected a name, a torch.nn.Module or a LayerGraph, got type"),
    ],
)
def test_plan_refuses_an_argument(changed: dict[str, Any], expected: str) -> None:
    arguments: dict[str, Any] = {"model": "le_net", "rate_mb_per_s": 1.0} | changed
    with pytest.raises(UsageError, match=expected):
        ns.plan(**arguments)


def test_plan_refuses_latencies_of_another_network() -> None:
    with pytest.raises(PlanningError, match="alex_net"):
        ns.plan("alex_net", rate_mb_per_s=1.0, edge=ns.latencies("le_net", "edge"))


def test_plan_refuses_a_memory_that_no_cut_fits_into() -> None:
    with pytest.raises(PlanningError, match="fits"):
        ns.plan("le_net", rate_mb_per_s=1.0, strategy="edge-only", max_edge_memory_mb=0.001)


def test_layer_graph_refuses_a_shape_of_other_channels() -> None:
    with pytest.raises(InputSizeError, match="to have 3 channels, but got 4"):
        ns.layer_graph(Mine(), input_shape=(1, 4, 32, 32))


def test_latencies_refuse_a_side_a_predictor_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="side: expected edge or cloud, got 'client'"):
        ns.latencies("le_net", "client")
    with pytest.raises(UsageError, match="predictor: expected forest or linear, got 'oracle'"):
        ns.latencies("le_net", "edge", predictor="oracle")
    with pytest.raises(UsageError, match="none.json"):
        ns.latencies("le_net", "edge", config=str(tmp_path / "none.json"))


def test_compare_refuses_a_strategy_and_a_rate() -> None:
    with pytest.raises(UsageError, match="strategy"):
        ns.compare(["le_net"], [1.0], strategies=["best"])
    with pytest.raises(UsageError, match="rate_mb_per_s"):
        ns.compare(["le_net"], [1.0, 0.0])


@pytest.mark.parametrize(
    ("model", "changed", "error", "expected"),
    [
        ("no_such_net", {}, UnknownModelError, "no_such_net"),
        (nn.ReLU(), {}, UsageError, "expected a name, got ReLU"),
        ("le_net", {"inputs": np.zeros((1, 3, 8, 8), np.float32)}, InputError, r"got float32 \(1, 3, 8, 8\)"),
        ("le_net", {"inputs": np.zeros((1, 3, 224, 224))}, InputError, "got float64"),
        ("le_net", {"inputs": [[1], [1, 2]]}, InputError, "got list"),
        ("le_net", {"inputs": "none.jpg"}, InputError, "none.jpg"),
        ("le_net", {"point": 13}, PartitionError, "choose 0 .* to 12"),
        ("le_net", {"strategy": "best"}, UsageError, "strategy: expected dads"),
        ("le_net", {"on_cloud_loss": "wait"}, UsageError, "on_cloud_loss: expected local or retry or fail, got 'wait'"),
        ("le_net", {"predictor": "oracle"}, UsageError, "predictor: expected forest or linear or measured"),
        ("le_net", {"repeat": 0}, UsageError, "repeat: expected a number above 0, got 0"),
        ("le_net", {"rate_mb_per_s": 0.0}, UsageError, "rate_mb_per_s"),
    ],
)
def test_run_refuses_an_argument(
    edge: ns.Edge, model: Any, changed: dict[str, Any], error: type[NeurosurgeonError], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        edge.run(model, **(LINK | changed))


@pytest.mark.parametrize(
    ("task", "changed", "error", "expected"),
    [
        (("no_such_net", None), {}, UnknownModelError, "no_such_net"),
        (("le_net", np.zeros((8, 8), np.uint8)), {}, InputError, r"got uint8 \(8, 8\)"),
        (
            ("le_net", None),
            {"objective": "speed"},
            UsageError,
            "objective: expected latency or throughput, got 'speed'",
        ),
        (("le_net", None), {"schedule": "random"}, UsageError, "schedule: expected fifo or johnson, got 'random'"),
        (("le_net", None), {"in_flight": 0}, UsageError, "in_flight"),
        (("le_net", None), {"rtt_ms": -1.0}, UsageError, "rtt_ms"),
    ],
)
def test_run_queue_refuses_an_argument(
    edge: ns.Edge, task: tuple[str, object], changed: dict[str, Any], error: type[NeurosurgeonError], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        next(edge.run_queue([task], **(LINK | changed)))


def test_an_unknown_setting_is_a_type_error(edge: ns.Edge) -> None:
    with pytest.raises(TypeError, match="colour"):
        edge.run("le_net", colour="red", **LINK)
    with pytest.raises(TypeError, match="colour"):
        next(edge.run_queue([("le_net", None)], colour="red", **LINK))


def test_an_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="device: expected cpu or cuda, got 'tpu'"):
        ns.Edge(device="tpu")


def test_a_queue_without_a_cloud_is_a_connect_error() -> None:
    with pytest.raises(ConnectError):
        next(ns.Edge(port=1, monitor_port=1).run_queue([("le_net", None)], rate_mb_per_s=1.0))


@pytest.mark.parametrize(
    ("models", "flags", "expected"),
    [
        ("no_such_net", [], "unknown model 'no_such_net'"),
        ("le_net", ["--no-such-flag"], "--no-such-flag"),
        ({"mine": Mine()}, ["--no-such-flag"], "--no-such-flag"),
        ({"mine": "no module"}, [], "returns a str, not a torch.nn.Module"),
    ],
)
def test_cloud_refuses_a_model_or_a_flag(models: Any, flags: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected), ns.Cloud(models, flags=flags):
        pytest.fail("it started")


def test_a_missing_weights_file_is_named(cloud_process: ServiceProcess) -> None:
    edge = ns.Edge(port=cloud_process.ports[0], monitor_port=cloud_process.ports[1])
    with pytest.raises(WeightsError, match=r"none\.pth does not exist"):
        edge.run("le_net", weights="none.pth", rate_mb_per_s=1.0)
