"""The minimum cut against brute force on every kind of small graph, and against prefix sums on chains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurosurgeon.planner.chain_search import best_point, chain_candidates
from neurosurgeon.planner.dag_search import DagCosts, DagCut, DagSearch
from neurosurgeon.utils.errors import PlanningError
from tests.planner.dags import COSTS, Reads, closed_sets, cost_of, costs_of, dags


def check(cut: DagCut, reads: Reads, costs: DagCosts, sent: Sequence[int] = ()) -> None:
    """Assert that a cut is possible, costs what it says, and that brute force finds none that is cheaper."""
    assert cut.edge_nodes in set(closed_sets(reads))
    assert cut.cost_ms == pytest.approx(cost_of(cut.edge_nodes, reads, costs, sent))
    best = min(cost_of(edge, reads, costs, sent) for edge in closed_sets(reads))
    assert cut.cost_ms == pytest.approx(best, rel=1e-6, abs=1e-9)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_the_minimum_cut_is_that_of_brute_force(data: st.DataObject) -> None:
    reads = data.draw(dags())
    costs = data.draw(costs_of(len(reads)))
    check(DagSearch(reads).best(costs), reads, costs)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_several_outputs_are_wanted_on_either_side(data: st.DataObject, in_cloud: bool) -> None:
    reads = data.draw(dags(most=9))
    last = len(reads) - 1
    outputs = sorted({last, *data.draw(st.sets(st.integers(0, last)))})
    costs = data.draw(costs_of(len(reads)))
    cut = DagSearch(reads, outputs, wanted_in_cloud=in_cloud).best(costs)
    check(cut, reads, costs, outputs if in_cloud else ())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_cannot_be_sent_never_crosses(data: st.DataObject) -> None:
    reads = data.draw(dags(most=9))
    costs = data.draw(costs_of(len(reads), st.one_of(COSTS, st.just(math.inf))))
    check(DagSearch(reads).best(costs), reads, costs)


@settings(deadline=None)
@given(st.data())
def test_a_chain_gets_exactly_its_prefix_sums(data: st.DataObject) -> None:
    layers = data.draw(st.integers(0, 30))
    reads = [[], *([index] for index in range(layers))]
    costs = data.draw(costs_of(layers + 1))
    send_ms = [*(costs.send_ms[:-1] + costs.fixed_ms), 0.0]
    candidates = chain_candidates(list(costs.edge_ms[1:]), send_ms, list(costs.cloud_ms[1:]))
    cut = DagSearch(reads).best(costs)
    best = candidates[best_point(candidates, candidates)].total_ms
    assert candidates[len(cut.edge_nodes) - 1].total_ms == pytest.approx(best, rel=1e-15)
    assert cut.cost_ms == pytest.approx(best, rel=1e-15)


def costs(edge: Sequence[float], send: Sequence[float], cloud: Sequence[float], fixed_ms: float = 0.0) -> DagCosts:
    return DagCosts(np.array(edge), np.array(send), np.array(cloud), fixed_ms)


DIAMOND: Reads = [[], [0], [1], [1], [2, 3]]


def test_a_tensor_that_many_read_is_paid_once() -> None:
    cut = DagSearch(DIAMOND).best(costs([0, 1, 9, 9, 9], [9, 2, 9, 9, 9], [0, 9, 1, 1, 1]))
    assert cut == (frozenset({0, 1}), 1 + 2 + 3)


def test_two_branches_are_cut_where_each_is_thinnest() -> None:
    cut = DagSearch(DIAMOND).best(costs([0, 1, 1, 9, 9], [9, 3, 1, 9, 9], [0, 9, 9, 1, 1]))
    assert cut == (frozenset({0, 1, 2}), 1 + 1 + 3 + 1 + 1 + 1)


def test_the_round_trip_is_paid_once_and_only_if_anything_crosses() -> None:
    cheap = costs([0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], 2.9)
    dear = costs([0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], 3.1)
    assert DagSearch(DIAMOND).best(cheap) == (frozenset({0}), pytest.approx(3.9))
    assert DagSearch(DIAMOND).best(dear) == (frozenset(range(5)), 4)


def test_ends_of_blocks_are_where_one_tensor_passes() -> None:
    assert DagSearch(DIAMOND).ends == (0, 1, 4)
    assert DagSearch([[], [0], [0, 1]]).ends == (0, 2)
    assert DagSearch(DIAMOND, outputs=[2, 4]).ends == (0, 1)


def test_a_parameter_is_where_it_is_read() -> None:
    scaled: Reads = [[], [0], [], [1, 2], [3]]  # node 2 reads nothing
    search = DagSearch(scaled)
    assert search.best(costs([0, 0, 0, 0, 9], [9, 9, 9, 1, 0], [0, 9, 0, 9, 0])).edge_nodes == {0, 1, 2, 3}
    assert search.best(costs([0, 0, 0, 9, 9], [9, 1, 9, 9, 0], [0, 9, 0, 0, 0])).edge_nodes == {0, 1}


def test_an_output_that_cannot_be_sent_but_must_be_has_no_cut() -> None:
    search = DagSearch([[], [0]], wanted_in_cloud=True)
    with pytest.raises(PlanningError, match="no cut is possible"):
        search.best(costs([0, 1], [math.inf, math.inf], [0, 1]))


@pytest.mark.parametrize("reads", [[], [[0]], [[], [2], [0]], [[], [-1]]])
def test_nodes_out_of_order_are_refused(reads: Reads) -> None:
    with pytest.raises(PlanningError, match="come after"):
        DagSearch(reads)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf])
def test_a_cost_that_is_none_is_refused(position: int, bad: float) -> None:
    values = [[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    values[position][1] = bad
    with pytest.raises(PlanningError, match="not a number"):
        costs(*values)


def test_costs_of_another_graph_are_refused() -> None:
    with pytest.raises(PlanningError, match="differ in number"):
        costs([0], [0, 0], [0])
    with pytest.raises(PlanningError, match="3 latencies do not make a graph of 5 nodes"):
        DagSearch(DIAMOND).best(costs([0] * 3, [0] * 3, [0] * 3))
