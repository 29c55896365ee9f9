"""One task of the edge: the keys of its corrections, and the work that does not wait for the link."""

from __future__ import annotations

import io
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from neurosurgeon.edge.outcome import Outcome
from neurosurgeon.edge.settings import TaskSettings
from neurosurgeon.edge.stages import StageKeys, cloud_latencies, edge_latencies, stage_keys
from neurosurgeon.edge.task import FindLink, run_task
from neurosurgeon.engine.base import WeightsSource
from neurosurgeon.engine.torch_engine import TorchEngine
from neurosurgeon.net.messages import Latencies
from neurosurgeon.net.session import EdgeSession
from neurosurgeon.planner.strategies import Strategy
from neurosurgeon.reports.text import EdgeReport
from neurosurgeon.utils.link import LinkEstimate
from tests.faults import write_slow_edge
from tests.networks import ENGINE, Network, model_graph

LINK = LinkEstimate(1e6, 10.0)
IDEAL = LinkEstimate(math.inf, 10.0)
SLOW_LINK = LinkEstimate(1.0, 10.0)
WAIT_S = 60.0  # for work that has begun already


@dataclass
class Cloud:
    """A cloud whose layers all have one latency."""

    layer_ms: float
    host: str = "there"
    cloud: dict[str, Any] = field(default_factory=lambda: {"device": "cpu", "threads": 2})

    def send_state(self) -> None:
        return None

    def pace_first_task(self, link: LinkEstimate) -> None:
        pass

    def ask_latencies(self, model: str, graph_digest: str) -> Latencies:
        column = [self.layer_ms] * len(model_graph(model).layers)
        return Latencies(model, "forest", column, column, column, [], "data of A")


def keys_of(config: Path, layer_ms: float) -> StageKeys:
    task = TaskSettings("le_net", WeightsSource(), threads=1, predictor="linear", edge_config=config)
    graph, session = model_graph("le_net"), cast(EdgeSession, Cloud(layer_ms))
    latencies = edge_latencies(task, ENGINE, graph), cloud_latencies(task, session, graph)
    return stage_keys(task, session, LINK, *latencies, is_warm=True)


def test_a_correction_belongs_to_one_prediction(tmp_path: Path) -> None:
    config = write_slow_edge(tmp_path / "edge.json", 2.0)
    before = keys_of(config, 1.0)
    assert keys_of(config, 1.0) == before
    write_slow_edge(config, 4.0)  # as if it had been collected again
    after = keys_of(config, 1.0)
    assert after.edge != before.edge
    assert after[1:] == before[1:]
    changed_cloud = keys_of(config, 3.0)
    assert changed_cloud.cloud != after.cloud
    assert changed_cloud[:2] == after[:2]


# ---------------------------------------------------------------- work that does not wait for the link


def run_le_net(
    cloud_layer_ms: float, find_link: FindLink, ideal: LinkEstimate | None = None, task: TaskSettings | None = None
) -> tuple[Outcome, str]:
    """Run a task that ends on the edge; return its outcome and its lines."""
    lines = io.StringIO()
    task = task or TaskSettings("le_net", WeightsSource(), threads=1, predictor="linear")
    session = cast(EdgeSession, Cloud(cloud_layer_ms))
    return run_task(task, ENGINE, session, find_link, EdgeReport(lines), None, ideal), lines.getvalue()


def not_asked() -> LinkEstimate:
    raise AssertionError("the link was asked for")


def test_loading_and_predicting_begin_before_the_link_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, asked = threading.Event(), threading.Event()
    open_network, ask = TorchEngine.open, Cloud.ask_latencies

    def signalling_open(engine: TorchEngine, name: str, weights: WeightsSource) -> Network:
        loading.set()
        return open_network(engine, name, weights)

    def signalling_ask(cloud: Cloud, model: str, graph_digest: str) -> Latencies:
        asked.set()
        return ask(cloud, model, graph_digest)

    def find_link() -> LinkEstimate:
        assert loading.wait(WAIT_S) and asked.wait(WAIT_S)
        return SLOW_LINK

    monkeypatch.setattr(TorchEngine, "open", signalling_open)
    monkeypatch.setattr(Cloud, "ask_latencies", signalling_ask)
    outcome, _ = run_le_net(1.0, find_link)
    assert (outcome.where, outcome.link) == ("edge", SLOW_LINK)


def test_no_link_is_measured_if_none_makes_another_cut_faster() -> None:
    outcome, lines = run_le_net(1_000.0, not_asked, IDEAL)
    assert (outcome.where, outcome.link) == ("edge", IDEAL)
    assert outcome.measured.transfer_ms == 0.0
    line, *others = lines.splitlines()
    edge_ms, other_ms = outcome.plan.best.stages.total_ms, outcome.plan.candidates[-2].stages.total_ms
    assert line == (
        f"link not measured : edge-only takes {edge_ms:.2f} ms , any other cut at least {other_ms:.2f} ms however fast "
        "the link (round trip 10.00 ms)"
    )
    assert "best partition point : 12" in others[0]


def test_a_link_that_may_make_another_cut_faster_is_measured(tmp_path: Path) -> None:
    config = write_slow_edge(tmp_path / "edge.json")
    task = TaskSettings("le_net", WeightsSource(), threads=1, predictor="linear", edge_config=config)
    outcome, lines = run_le_net(0.0, lambda: SLOW_LINK, IDEAL, task)
    assert (outcome.where, outcome.link) == ("edge", SLOW_LINK)
    assert "not measured" not in lines


def test_the_round_trip_alone_may_make_the_edge_the_fastest() -> None:
    for rtt_ms, asked in ((0.0, 1), (1e6, 0)):
        calls: list[LinkEstimate] = []

        def find_link(calls: list[LinkEstimate] = calls) -> LinkEstimate:
            calls.append(SLOW_LINK)
            return SLOW_LINK

        run_le_net(0.0, find_link, LinkEstimate(math.inf, rtt_ms))
        assert len(calls) == asked


def test_edge_only_needs_no_link() -> None:
    task = TaskSettings("le_net", WeightsSource(), threads=1, predictor="linear", strategy=Strategy.EDGE_ONLY)
    _, lines = run_le_net(0.0, not_asked, LinkEstimate(math.inf, 0.0), task)
    assert "is the only cut" in lines


@pytest.mark.parametrize("cut", [{"point": 3}, {"strategy": Strategy.CLOUD_ONLY}])
def test_a_cut_that_sends_needs_the_link(cut: dict[str, Any]) -> None:
    task = TaskSettings("le_net", WeightsSource(), threads=1, predictor="linear", **cut)
    with pytest.raises(AssertionError, match="asked for"):
        run_le_net(1_000.0, not_asked, IDEAL, task)
