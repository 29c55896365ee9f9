"""JSON logs and counters of a cloud process with real tasks; the models that it serves, and its latencies."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest

import cloud_api
import edge_api
import tasks_cloud_api
from neurosurgeon.cli import cloud as cloud_flags
from neurosurgeon.cli import doctor
from neurosurgeon.cli.process import ServiceProcess
from neurosurgeon.cloud.executor import Executor
from neurosurgeon.cloud.latencies import COMPARED_TASKS, CloudLatencies
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.engine import torch_engine
from neurosurgeon.graph.cut import pack_nodes
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.models.names import ZOO, Catalogue
from neurosurgeon.predictor import machine_speed
from neurosurgeon.predictor.machine_speed import MachineSpeed, reference_layers
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from tests.equality import THREADS
from tests.networks import ENGINE, model_graph
from tests.utils.test_metrics import scraped

TASK = ["-t", "le_net", "--point", "0", "--bandwidth", "100"]


@pytest.fixture(scope="module")
def logging_cloud() -> Iterator[ServiceProcess]:
    """A cloud that logs every event as JSON, and counts if the library is installed."""
    command = ["cloud_api.py", "-p", "0", "--monitor-port", "0", "--log-json", "--log-level", "debug"]
    if importlib.util.find_spec("prometheus_client"):
        command += ["--metrics-port", "0"]
    with ServiceProcess(command, services=2) as process:
        yield process


def events(cloud: ServiceProcess) -> list[dict[str, Any]]:
    """Return the log. Every line must be a JSON object."""
    return [json.loads(line) for line in cloud.log]


def run_edge(cloud: ServiceProcess, *flags: str) -> int:
    address = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]
    return edge_api.main([*TASK, *address, *flags])


def test_json_log_has_one_object_for_each_event(
    logging_cloud: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_edge(logging_cloud) == 0
    answered = wait_for(logging_cloud, "answered task")
    assert {"time", "level", "logger", "peer", "task", "model", "duration_ms"} <= set(answered)
    assert re.fullmatch(r"[0-9a-f]{8}/1", answered["task"])
    assert any("connected" in event["message"] and event["peer"] == answered["peer"] for event in events(logging_cloud))
    assert all(len(line) < 1_000 for line in logging_cloud.log)  # no payloads
    capsys.readouterr()


def wait_for(cloud: ServiceProcess, text: str) -> dict[str, Any]:
    """Return the first event with this text."""
    for _ in range(100_000):
        for event in events(cloud):
            if text in event["message"]:
                return event
    raise AssertionError(f"no {text!r} in the log")


def test_metrics_count_tasks_bytes_and_times(logging_cloud: ServiceProcess, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    port = next(
        int(found[1]) for line in logging_cloud.log if (found := re.search(r"metrics at http://[\d.]+:(\d+)", line))
    )
    name = 'neurosurgeon_requests_total{model="le_net"}'
    before = scraped(port).get(name, 0)
    assert run_edge(logging_cloud) == 0
    after = scraped(port)
    for _ in range(1_000):  # a task is counted after its reply is sent
        if after.get(name, 0) == before + 1:
            break
        after = scraped(port)
    assert after[name] == before + 1
    assert after['neurosurgeon_bytes_total{direction="received"}'] > 150_528
    assert after['neurosurgeon_latency_seconds_count{stage="compute"}'] >= 1
    assert after["neurosurgeon_batch_size_count"] >= 1
    assert after["process_open_fds"] > 0
    capsys.readouterr()


def test_a_busy_metrics_port_is_one_line(logging_cloud: ServiceProcess, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    busy = str(logging_cloud.ports[1])
    assert cloud_api.main(["-p", "0", "--monitor-port", "0", "--metrics-port", busy]) == 3
    error = capsys.readouterr().err
    assert f"metrics port {busy} is busy" in error
    assert len(error.strip().splitlines()) == 1


# ---------------------------------------------------------------- the models that it serves


@pytest.mark.parametrize("script", [cloud_api, tasks_cloud_api])
def test_models_flag_with_an_unknown_name_is_one_line(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["-p", "0", "--monitor-port", "0", "--models", "le_net", "no_net"]) == 2
    error = capsys.readouterr().err
    assert "unknown model 'no_net'" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "traced"), [([], list(ZOO)), (["--models", "lenet", "mobile_net@64"], ["le_net", "mobile_net@64"])]
)
def test_the_graphs_of_a_cloud_are_traced_before_it_serves(
    flags: list[str], traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    graph = torch_engine.TorchEngine.graph

    def noted(engine: torch_engine.TorchEngine, name: str) -> TracedGraph:
        asked.append(name)
        return graph(engine, name)

    monkeypatch.setattr(torch_engine.TorchEngine, "graph", noted)
    args = cloud_flags.cloud_parser("cloud_api.py").parse_args([*flags, "--threads", str(THREADS)])
    service = cloud_flags.make_service(args, Catalogue(), lambda event, sock: None)
    service.executor.close()
    assert asked == traced
    assert all(map(service.executor.engine.has_graph, traced))


def test_a_cloud_serves_the_models_that_its_command_line_names(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tasks_cloud_api.py", "-p", "0", "--monitor-port", "0", "--models", "lenet"]
    with ServiceProcess(command, services=2) as cloud:
        assert run_edge(cloud) == 0
        assert run_edge(cloud, "-t", "mobile_net") == 2
        assert "does not serve 'mobile_net': choose from le_net" in capsys.readouterr().err
        address = ["-p", str(cloud.ports[0]), "--monitor-port", str(cloud.ports[1])]
        assert doctor.main([*address, "-t", "mobile_net", "le_net"]) == 2
        lines = {line[5:27].strip(): line for line in capsys.readouterr().out.splitlines()}
        assert "-> choose with -t a model that it serves" in lines["weights of mobile_net"]
        assert lines["weights of le_net"].startswith("ok")


# ---------------------------------------------------------------- its latencies


@pytest.fixture
def latencies(monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudLatencies]:
    """The latencies of a cloud on a machine whose speed is known, so that nothing is measured."""
    layers_ms = (1.0,) * len(reference_layers())
    speed = MachineSpeed(layers_ms, datetime.datetime.now(datetime.UTC).isoformat(), 0.0, 1.0, False)
    for module in (machine_speed, torch_engine):
        monkeypatch.setattr(module, "kept_machine_speed", lambda *_: speed)
    executor = Executor(ENGINE)
    yield CloudLatencies(NetworkStore(executor, {}), executor, "linear", None)
    executor.close()


@pytest.mark.parametrize(
    ("factors", "expects_doubt"),
    [((1.0,) * COMPARED_TASKS, False), ((9.0,) * COMPARED_TASKS, True), ((0.1,) * COMPARED_TASKS, True)]
    + [((9.0,) * (COMPARED_TASKS - 1) + (1.2,), False), ((9.0,) * (COMPARED_TASKS - 1), False)],
)
def test_tasks_that_contradict_a_prediction_have_the_machine_measured_again(
    factors: Sequence[float], expects_doubt: bool, latencies: CloudLatencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubted: list[tuple[str, int]] = []
    monkeypatch.setattr(torch_engine, "doubt_machine_speed", lambda *machine: doubted.append(machine))
    graph = model_graph("le_net")
    predicted_ms = sum(latencies("le_net", graph).latency_ms[3:])
    for factor in factors:
        latencies.computed("le_net", pack_nodes(graph, graph.edge_nodes(3)), factor * predicted_ms)
        latencies.computed("alex_net", b"", 1e6)  # of which nothing was predicted
    assert doubted == [("cpu", 1)] * expects_doubt


def test_edges_that_ask_at_once_have_a_predictor_fitted_once(
    latencies: CloudLatencies, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = Counter[str]()
    predict = latencies._predictor

    def counted() -> LatencyPredictor:
        at_once["now"] += 1
        at_once["most"] = max(at_once["most"], at_once["now"])
        time.sleep(0.02)  # so that the others arrive meanwhile
        predictor = predict()
        at_once["now"] -= 1
        return predictor

    monkeypatch.setattr(latencies, "_predictor", counted)
    with ThreadPoolExecutor(5) as edges:
        replies = edges.map(latencies, ["le_net"] * 5, [model_graph("le_net")] * 5)
        assert len({tuple(reply.latency_ms) for reply in replies}) == 1
    assert at_once["most"] == 1
