"""The cuts that strategies consider, of chains and of other networks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.dag_search import DagCosts
from neurosurgeon.planner.memory import edge_memory, memory_at_points
from neurosurgeon.planner.strategies import Strategy, inner_cuts, points_of, search_of
from tests.models.test_graph_dag import SHAPE, Diamond, closed_sets
from tests.networks import model_graph, trace_module
from tests.planner.dags import cost_of, costs_of

DIAMOND = trace_module(Diamond(), SHAPE, "diamond")
READS = [list(node.inputs) for node in DIAMOND.nodes]


def test_points_of_a_chain_are_all_for_cutting_strategies() -> None:
    graph = model_graph("alex_net")
    for strategy in (Strategy.DADS, Strategy.NEUROSURGEON, Strategy.CHAIN_OF_BLOCKS):
        assert list(points_of(strategy, graph)) == list(range(len(graph.layers) + 1))


def test_points_of_strategies_that_do_not_cut() -> None:
    graph = model_graph("alex_net")
    assert points_of(Strategy.CLOUD_ONLY, graph) == [0]
    assert points_of(Strategy.EDGE_ONLY, graph) == [len(graph.layers)]


def test_points_of_blocks_send_a_single_tensor() -> None:
    graph = model_graph("resnet18")
    points = points_of(Strategy.CHAIN_OF_BLOCKS, graph)
    assert all(len(graph.boundary(graph.edge_nodes(point))) == 1 for point in points[:-1])
    assert len(points_of(Strategy.NEUROSURGEON, graph)) > len(points) > 10
    assert points_of(Strategy.DADS, graph) == search_of(graph).ends


def best_ms(cuts: Iterable[frozenset[int]], costs: DagCosts) -> float:
    return min((cost_of(cut, READS, costs) for cut in cuts), default=math.inf)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_inner_cuts_and_points_contain_the_best_cut(data: st.DataObject) -> None:
    costs = data.draw(costs_of(len(READS)))
    points = map(DIAMOND.edge_nodes, points_of(Strategy.DADS, DIAMOND))
    found = best_ms([*points, *inner_cuts(DIAMOND, costs)], costs)
    assert found == pytest.approx(best_ms(closed_sets(DIAMOND), costs), rel=1e-6, abs=1e-9)


def test_inner_cuts_with_a_limit_fit_and_are_mostly_the_best() -> None:
    draw, memory = np.random.default_rng(0), memory_at_points(DIAMOND)
    exact = []
    for _ in range(100):
        costs = DagCosts(*(draw.exponential(1, (3, len(READS))) * [[0.3], [1], [1]]))
        limit = draw.uniform(memory[0].total_bytes, memory[-1].total_bytes)
        fitting = [cut for cut in closed_sets(DIAMOND) if edge_memory(DIAMOND, cut).total_bytes <= limit]
        points = [point for point in points_of(Strategy.DADS, DIAMOND) if memory[point].total_bytes <= limit]
        inner = inner_cuts(DIAMOND, costs, max_edge_bytes=limit)
        assert set(inner) <= set(fitting)
        found = best_ms([*map(DIAMOND.edge_nodes, points), *inner], costs)
        exact.append(found == pytest.approx(best_ms(fitting, costs), rel=1e-6))
    assert np.mean(exact) >= 0.9


def test_inner_cuts_for_throughput_are_at_most_one() -> None:
    draw = np.random.default_rng(1)
    cases = [DagCosts(*draw.exponential(1, (3, len(READS)))) for _ in range(20)]
    found = [inner_cuts(DIAMOND, costs, Objective.THROUGHPUT) for costs in cases]
    assert {len(cuts) for cuts in found} == {0, 1}
