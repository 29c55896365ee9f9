"""Statistics of measured runs: no luck counts twice, and the reference chooses as its contract says."""

from __future__ import annotations

import pytest

from tests.benchmark.cut_runs import Link, Taken, near_best, score
from tests.benchmark.reference import predicted_ms, reference_point
from tests.benchmark.regret import regrets, summary
from tests.networks import model_graph

STEADY, LUCKY = frozenset([0]), frozenset([0, 1])


def test_a_lucky_cut_is_not_scored_by_its_lucky_runs() -> None:
    taken = {STEADY: [Taken(10.0, 0.0)] * 4, LUCKY: [Taken(1.0, 0.0), Taken(20.0, 0.0)] * 2}
    best, latency_ms = score(taken, slowdown=1.0)
    assert best == LUCKY and latency_ms == {STEADY: 10.0, LUCKY: 20.0}


def test_a_single_run_both_chooses_and_tells() -> None:
    assert score({STEADY: [Taken(10.0, 5.0)]}, slowdown=2.0) == (STEADY, {STEADY: 25.0})


def test_near_the_best_of_any_edge_is_near() -> None:
    best_here, best_on_slow_edge, neither = (frozenset([0, number]) for number in (1, 2, 3))
    taken = {best_here: [Taken(10.0, 0.0)], best_on_slow_edge: [Taken(1.0, 30.0)], neither: [Taken(10.0, 30.0)]}
    assert near_best(taken) == [best_here, best_on_slow_edge]


@pytest.mark.parametrize(("size_bytes", "least_ms"), [(0, 0.0), (1_000_000, 8_050.0)])
def test_no_task_is_faster_than_its_bytes_and_a_round_trip(size_bytes: int, least_ms: float) -> None:
    assert Link(1.0, 50.0).least_ms(size_bytes) == least_ms


def test_regret_is_the_share_beyond_the_best() -> None:
    edge = {"edge_nodes": 3, "nodes": 3, "crossing": [], "edge_ms_rest_ms": [(10.0, 0.0)] * 4}
    cloud = {"edge_nodes": 1, "nodes": 3, "crossing": ["x"], "edge_ms_rest_ms": [(0.0, 20.0)] * 4}
    names = {"forest": 0, "measured": 0, "reference": 1, "edge-only": 0, "cloud-only": 1}
    chosen = [{"slowdown": 1.0, "name": name, "cut": cut, "predicted_ms": None} for name, cut in names.items()]
    row = regrets({"link": "LTE", "model": "m", "boundaries": 3, "cuts": [edge, cloud], "choices": chosen}, 1.0)
    assert row["best"] == "edge" and row["best_ms"] == 10.0
    assert row["forest_regret"] == 0.0 and row["reference"] == "cloud" and row["reference_regret"] == 1.0
    of_reference = next(entry for entry in summary([row]) if entry["choice of"] == "reference")
    assert of_reference["speed_up_of_forest"] == pytest.approx(2.0) and of_reference["within_5_percent"] == 0


@pytest.mark.parametrize("model", ["alex_net", "resnet18"])
def test_the_reference_knows_bytes_and_bandwidth_alone(model: str) -> None:
    graph = model_graph(model)
    latencies = predicted_ms("edge", graph)
    assert len(latencies) == len(graph.layers) and min(latencies) >= 0.0 < sum(latencies)
    assert reference_point(graph, rate_bytes_per_s=1.0, slowdown=1.0) == len(graph.layers)
    assert reference_point(graph, rate_bytes_per_s=1e12, slowdown=1e6) == 0
