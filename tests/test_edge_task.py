"""One task of the edge: what its corrections belong to, and what does not wait for the link."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from edge_task import FindLink, Outcome, StageKeys, Task, predicted_stages, run_task
from models.zoo import Network, WeightsSource, model_graph
from net.bandwidth import LinkEstimate
from net.messages import Latencies
from net.session import EdgeSession
from tests.faults import write_slow_edge
from utils.report import EdgeReport

LINK = LinkEstimate(1e6, 10.0)
SLOW_LINK = LinkEstimate(1.0, 10.0)
WAIT_S = 60.0  # for what has begun already


@dataclass
class Cloud:
    """A cloud whose layers all take as long."""

    layer_ms: float
    host: str = "there"
    cloud: dict[str, Any] = field(default_factory=lambda: {"device": "cpu", "threads": 2})

    def send_state(self) -> None:
        return None

    def pace_first_task(self, link: LinkEstimate) -> None:
        pass

    def ask_latencies(self, model: str, graph_digest: str) -> Latencies:
        column = [self.layer_ms] * len(model_graph(model).layers)
        return Latencies(model, "forest", column, column, column, [])


def keys_of(config: Path, layer_ms: float) -> StageKeys:
    task = Task("le_net", WeightsSource(), threads=1, predictor="linear", edge_config=config)
    return predicted_stages(task, cast(EdgeSession, Cloud(layer_ms)), LINK, is_warm=True).keys


def test_what_was_learnt_of_one_prediction_corrects_no_other(tmp_path: Path) -> None:
    config = write_slow_edge(tmp_path / "edge.json", 2.0)
    before = keys_of(config, 1.0)
    assert keys_of(config, 1.0) == before
    write_slow_edge(config, 4.0)  # as if it had been collected anew
    after = keys_of(config, 1.0)
    assert after.edge != before.edge
    assert after[1:] == before[1:]
    changed_cloud = keys_of(config, 3.0)
    assert changed_cloud.cloud != after.cloud
    assert changed_cloud[:2] == after[:2]


# ---------------------------------------------------------------- what does not wait for the link


def run_le_net(cloud_layer_ms: float, find_link: FindLink) -> tuple[Outcome, str]:
    """Run a task that ends on the edge; return its outcome and its lines."""
    lines = io.StringIO()
    task = Task("le_net", WeightsSource(), threads=1, predictor="linear")
    session = cast(EdgeSession, Cloud(cloud_layer_ms))
    return run_task(task, session, find_link, EdgeReport(lines), None), lines.getvalue()


def test_the_network_loads_and_the_cloud_is_asked_before_the_link_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, asked = threading.Event(), threading.Event()
    build, ask = Task.build, Cloud.ask_latencies

    def build_and_say(task: Task) -> Network:
        loading.set()
        return build(task)

    def ask_and_say(cloud: Cloud, model: str, graph_digest: str) -> Latencies:
        asked.set()
        return ask(cloud, model, graph_digest)

    def find_link() -> LinkEstimate:
        assert loading.wait(WAIT_S) and asked.wait(WAIT_S)
        return SLOW_LINK

    monkeypatch.setattr(Task, "build", build_and_say)
    monkeypatch.setattr(Cloud, "ask_latencies", ask_and_say)
    outcome, _ = run_le_net(1.0, find_link)
    assert (outcome.where, outcome.link) == ("edge", SLOW_LINK)
