"""The shortest bottleneck against brute force: never above the bound, seldom above the optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurosurgeon.planner.dag_search import DagCosts, DagSearch
from neurosurgeon.planner.heavy_load import busy_times, shortest_bottleneck
from tests.planner.dags import COSTS, closed_sets, costs_of, dags, random_case, stages_of

APPROXIMATION = 3.0  # of the cheapest cut, where the search begins


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shortest_bottleneck_is_within_its_bound(data: st.DataObject) -> None:
    reads = data.draw(dags(most=9))
    costs = data.draw(costs_of(len(reads), st.one_of(COSTS, st.just(math.inf))))
    cut = shortest_bottleneck(DagSearch(reads), costs)
    bottlenecks = {edge: max(stages_of(edge, reads, costs)) for edge in closed_sets(reads)}
    assert cut.cost_ms == pytest.approx(bottlenecks[cut.edge_nodes])
    assert cut.cost_ms <= APPROXIMATION * min(bottlenecks.values()) + 1e-6


def test_shortest_bottleneck_is_mostly_exact() -> None:
    ratios = []
    for seed in range(60):
        reads, costs = random_case(seed)
        shortest = min(max(stages_of(edge, reads, costs)) for edge in closed_sets(reads))
        ratios.append(shortest_bottleneck(DagSearch(reads), costs).cost_ms / shortest)
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.9
    assert max(ratios) < 1.5


def test_shortest_bottleneck_of_a_chain() -> None:
    costs = DagCosts(np.array([0.0, 2, 2, 2]), np.array([9.0, 3, 1, 9]), np.array([0.0, 4, 3, 3]))
    assert shortest_bottleneck(DagSearch([[], [0], [1], [2]]), costs) == (frozenset({0, 1, 2}), 4)


def test_busy_times_follow_their_definition() -> None:
    reads, costs = random_case(1)
    for edge in closed_sets(reads):
        assert busy_times(DagSearch(reads), costs, edge) == pytest.approx(stages_of(edge, reads, costs))
