"""The search over a chain against brute force, and refused latencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.chain_search import Objective, chain_stages, rank_cuts
from neurosurgeon.utils.errors import PlanningError

LATENCIES = st.floats(0, 1e6)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Edge, transfer and cloud times of a chain of up to 10 layers."""
    layers = draw(st.integers(0, 10))

    def times(count: int) -> list[float]:
        return draw(st.lists(LATENCIES, min_size=count, max_size=count))

    return times(layers), times(layers + 1), times(layers)


@given(chains())
def test_chain_stages_are_those_of_brute_force(chain: tuple[list[float], list[float], list[float]]) -> None:
    edge, transfer, cloud = chain
    stages_ms = chain_stages(*chain).tolist()
    assert len(stages_ms) == len(transfer)
    for point, (edge_ms, transfer_ms, cloud_ms) in enumerate(stages_ms):
        assert edge_ms == pytest.approx(math.fsum(edge[:point]))
        assert transfer_ms == transfer[point]
        assert cloud_ms == pytest.approx(math.fsum(cloud[point:]))


@given(chains())
def test_rank_cuts_begins_with_the_shortest_latency(chain: tuple[list[float], list[float], list[float]]) -> None:
    totals = chain_stages(*chain).sum(axis=1)
    ranked = rank_cuts(chain_stages(*chain), chain_stages(*chain))
    assert totals[ranked].tolist() == sorted(totals.tolist())


@given(chains())
def test_chain_stages_are_0_on_the_other_side(chain: tuple[list[float], list[float], list[float]]) -> None:
    stages_ms = chain_stages(*chain)
    assert stages_ms[0, 0] == 0
    assert stages_ms[-1, 2] == 0


def test_rank_cuts_keeps_the_order_of_equals() -> None:
    stages_ms = np.array([(0.0, 2.0, 1.0), (1.0, 1.0, 0.0), (0.0, 0.0, 2.0), (1.0, 1.0, 0.0)])
    assert rank_cuts(stages_ms, stages_ms).tolist() == [1, 3, 2, 0]


@given(chains())
def test_rank_cuts_begins_with_the_shortest_bottleneck(chain: tuple[list[float], list[float], list[float]]) -> None:
    stages_ms = chain_stages(*chain)
    longest_ms = stages_ms.max(axis=1)
    ranked = rank_cuts(stages_ms, stages_ms, Objective.THROUGHPUT)
    assert longest_ms[ranked].tolist() == sorted(longest_ms.tolist())


def test_rank_cuts_ignores_waits_and_round_trips_for_throughput() -> None:
    stages_ms = np.array([(0.0, 60.0, 9.0), (30.0, 0.0, 0.0)])
    busy_ms = np.array([(0.0, 10.0, 9.0), (30.0, 0.0, 0.0)])
    assert rank_cuts(stages_ms, busy_ms, Objective.THROUGHPUT)[0] == 0
    assert rank_cuts(stages_ms, busy_ms, Objective.LATENCY)[0] == 1


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("bad", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_chain_stages_refuse_a_latency_that_is_none(position: int, bad: float) -> None:
    chain = [[1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0]]
    chain[position][1] = bad
    with pytest.raises(PlanningError, match="negative or not a number"):
        chain_stages(*chain)


@pytest.mark.parametrize(("edge", "transfer", "cloud"), [(2, 2, 2), (2, 4, 2), (1, 3, 2), (2, 3, 1), (0, 0, 0)])
def test_chain_stages_refuse_other_lengths(edge: int, transfer: int, cloud: int) -> None:
    with pytest.raises(PlanningError, match=f"{edge} edge, {cloud} cloud and {transfer} transfer"):
        chain_stages([1.0] * edge, [1.0] * transfer, [1.0] * cloud)
