"""The minimum cut against brute force on every kind of small graph, and against prefix sums on chains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurosurgeon.planner.chain_search import chain_stages
from neurosurgeon.planner.dag_search import DagCosts, DagCut, DagSearch
from neurosurgeon.utils.errors import PlanningError
from tests.planner.dags import COSTS, Reads, closed_sets, cost_of, costs_of, dags


def check(cut: DagCut, reads: Reads, costs: DagCosts) -> None:
    """Assert that a cut is possible, has the cost that it states, and is the cheapest by brute force."""
    assert cut.edge_nodes in set(closed_sets(reads))
    assert cut.cost_ms == pytest.approx(cost_of(cut.edge_nodes, reads, costs))
    best = min(cost_of(edge, reads, costs) for edge in closed_sets(reads))
    assert cut.cost_ms == pytest.approx(best, rel=1e-6, abs=1e-9)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_best_is_that_of_brute_force(data: st.DataObject) -> None:
    reads = data.draw(dags())
    costs = data.draw(costs_of(len(reads)))
    check(DagSearch(reads).best(costs), reads, costs)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_best_never_sends_a_tensor_that_cannot_be_sent(data: st.DataObject) -> None:
    reads = data.draw(dags(most=9))
    costs = data.draw(costs_of(len(reads), st.one_of(COSTS, st.just(math.inf))))
    check(DagSearch(reads).best(costs), reads, costs)


@settings(deadline=None)
@given(st.data())
def test_best_of_a_chain_is_that_of_prefix_sums(data: st.DataObject) -> None:
    layers = data.draw(st.integers(0, 30))
    reads = [[], *([index] for index in range(layers))]
    costs = data.draw(costs_of(layers + 1))
    send_ms = [*(costs.send_ms[:-1] + costs.fixed_ms), 0.0]
    totals_ms = chain_stages(list(costs.edge_ms[1:]), send_ms, list(costs.cloud_ms[1:])).sum(axis=1)
    cut = DagSearch(reads).best(costs)
    best = float(totals_ms.min())
    assert totals_ms[len(cut.edge_nodes) - 1] == pytest.approx(best, rel=1e-15)
    assert cut.cost_ms == pytest.approx(best, rel=1e-15)


def costs(edge: Sequence[float], send: Sequence[float], cloud: Sequence[float], fixed_ms: float = 0.0) -> DagCosts:
    return DagCosts(np.array(edge), np.array(send), np.array(cloud), fixed_ms)


DIAMOND: Reads = [[], [0], [1], [1], [2, 3]]


def test_best_pays_once_for_a_tensor_with_two_readers() -> None:
    cut = DagSearch(DIAMOND).best(costs([0, 1, 9, 9, 9], [9, 2, 9, 9, 9], [0, 9, 1, 1, 1]))
    assert cut == (frozenset({0, 1}), 1 + 2 + 3)


def test_best_cuts_each_branch_at_its_smallest_tensor() -> None:
    cut = DagSearch(DIAMOND).best(costs([0, 1, 1, 9, 9], [9, 3, 1, 9, 9], [0, 9, 9, 1, 1]))
    assert cut == (frozenset({0, 1, 2}), 1 + 1 + 3 + 1 + 1 + 1)


def test_best_pays_fixed_costs_once_if_a_tensor_is_sent() -> None:
    cheap = costs([0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], 2.9)
    dear = costs([0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], 3.1)
    assert DagSearch(DIAMOND).best(cheap) == (frozenset({0}), pytest.approx(3.9))
    assert DagSearch(DIAMOND).best(dear) == (frozenset(range(5)), 4)


def test_ends_are_nodes_with_the_only_tensor_alive() -> None:
    assert DagSearch(DIAMOND).ends == [0, 1, 4]
    assert DagSearch([[], [0], [0, 1]]).ends == [0, 2]


def test_best_keeps_a_parameter_beside_its_reader() -> None:
    scaled: Reads = [[], [0], [], [1, 2], [3]]  # node 2 reads nothing
    search = DagSearch(scaled)
    assert search.best(costs([0, 0, 0, 0, 9], [9, 9, 9, 1, 0], [0, 9, 0, 9, 0])).edge_nodes == {0, 1, 2, 3}
    assert search.best(costs([0, 0, 0, 9, 9], [9, 1, 9, 9, 0], [0, 9, 0, 0, 0])).edge_nodes == {0, 1}


@pytest.mark.parametrize("reads", [[], [[0]], [[], [2], [0]], [[], [-1]]])
def test_search_refuses_nodes_out_of_order(reads: Reads) -> None:
    with pytest.raises(PlanningError, match="come after"):
        DagSearch(reads)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf])
def test_costs_refuse_a_value_that_is_none(position: int, bad: float) -> None:
    values = [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    values[position][1] = bad
    with pytest.raises(PlanningError, match="not a number"):
        costs(*values)


def test_best_refuses_costs_of_another_graph() -> None:
    with pytest.raises(PlanningError, match="differ in number"):
        costs([0], [0, 0], [0])
    with pytest.raises(PlanningError, match="3 latencies do not make a graph of 5 nodes"):
        DagSearch(DIAMOND).best(costs([0] * 3, [0] * 3, [0] * 3))
