"""The Python API: plans without a cloud, and a task with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import neurosurgeon as ns
from neurosurgeon.cli.process import ROOT, ServiceProcess
from neurosurgeon.edge.records import Answered, Finished, LinkKnown, Planned, TaskEvent
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.utils.errors import ConnectError, UnknownModelError
from tests.equality import THREADS, whole_digest


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
    assert graph.output.shape == (1, 4)
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


def test_a_task_is_answered_and_reports_its_events(cloud_process: ServiceProcess) -> None:
    events: list[TaskEvent] = []
    port, monitor_port = cloud_process.ports
    with ns.Edge(port=port, monitor_port=monitor_port, threads=THREADS) as edge:
        outcome = edge.run("le_net", point=3, rate_mb_per_s=100.0, observe=events.append)
    assert outcome.to_dict()["output"]["digest"] == whole_digest("le_net")
    assert outcome.output.shape == (1, 1000)
    kinds = [type(event) for event in events]
    assert (kinds[0], kinds[1], kinds[-2], kinds[-1]) == (LinkKnown, Planned, Finished, Answered)
    assert json.loads(json.dumps(outcome.to_dict()))["partition_point"] == 3


def test_pixels_and_a_file_give_the_same_answer(cloud_process: ServiceProcess, photo: Path) -> None:
    from neurosurgeon.edge.inputs import read_image

    edge = ns.Edge(port=cloud_process.ports[0], monitor_port=cloud_process.ports[1], threads=THREADS)
    by_file = edge.run("le_net", photo, rate_mb_per_s=100.0).output
    np.testing.assert_array_equal(by_file, edge.run("le_net", read_image(photo, 224), rate_mb_per_s=100.0).output)


def test_a_local_cloud_serves_its_models_and_ends_with_its_block() -> None:
    with ns.Cloud(["le_net"]) as cloud:
        outcome = ns.Edge(port=cloud.port, monitor_port=cloud.monitor_port).run("le_net", verify=True)
        assert outcome.max_abs_diff is not None
        assert outcome.max_abs_diff < 1e-4
    with pytest.raises(ConnectError):
        ns.Edge(port=cloud.port, monitor_port=cloud.monitor_port).run("le_net", rate_mb_per_s=1.0)
