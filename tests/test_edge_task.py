"""One task of the edge: what its corrections belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from edge_task import StageKeys, Task, predicted_stages
from models.zoo import WeightsSource, model_graph
from net.bandwidth import LinkEstimate
from net.messages import Latencies
from net.session import EdgeSession
from tests.faults import write_slow_edge

LINK = LinkEstimate(1e6, 10.0)


@dataclass
class Cloud:
    """A cloud whose layers all take as long."""

    layer_ms: float
    host: str = "there"
    cloud: dict[str, Any] = field(default_factory=lambda: {"device": "cpu", "threads": 2})

    def ask_latencies(self, model: str, graph_digest: str) -> Latencies:
        column = [self.layer_ms] * len(model_graph(model).layers)
        return Latencies(model, "forest", column, column, column, [], "data of A")


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
