"""The search over a chain against brute force, and latencies it must refuse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.chain_search import Objective, best_point, chain_candidates
from neurosurgeon.utils.errors import PlanningError
from neurosurgeon.utils.timing import StageTimes

LATENCIES = st.floats(0, 1e6)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[float], list[float], list[float]]:
    """Edge, transfer and cloud times of a chain of up to 10 layers."""
    layers = draw(st.integers(0, 10))

    def times(count: int) -> list[float]:
        return draw(st.lists(LATENCIES, min_size=count, max_size=count))

    return times(layers), times(layers + 1), times(layers)


@given(chains())
def test_every_candidate_is_what_brute_force_says(chain: tuple[list[float], list[float], list[float]]) -> None:
    edge, transfer, cloud = chain
    candidates = chain_candidates(*chain)
    assert len(candidates) == len(transfer)
    for point, times in enumerate(candidates):
        assert times.edge_ms == pytest.approx(math.fsum(edge[:point]))
        assert times.transfer_ms == transfer[point]
        assert times.cloud_ms == pytest.approx(math.fsum(cloud[point:]))
        assert times.total_ms == pytest.approx(math.fsum([*edge[:point], transfer[point], *cloud[point:]]))


@given(chains())
def test_no_point_is_better_than_the_best(chain: tuple[list[float], list[float], list[float]]) -> None:
    edge, transfer, cloud = chain
    totals = [math.fsum([*edge[:p], transfer[p], *cloud[p:]]) for p in range(len(transfer))]
    candidates = chain_candidates(*chain)
    best = best_point(candidates, candidates)
    assert totals[best] == pytest.approx(min(totals))


@given(chains())
def test_the_ends_pay_nothing_on_the_other_side(chain: tuple[list[float], list[float], list[float]]) -> None:
    candidates = chain_candidates(*chain)
    assert candidates[0].edge_ms == 0
    assert candidates[-1].cloud_ms == 0


def test_of_equals_the_one_with_more_in_the_cloud_wins() -> None:
    stages = [StageTimes(0, 2, 1), StageTimes(1, 1, 0), StageTimes(0, 0, 2)]
    assert best_point(stages, stages) == 1


@given(chains())
def test_no_point_has_a_shorter_bottleneck(chain: tuple[list[float], list[float], list[float]]) -> None:
    candidates = chain_candidates(*chain)
    best = best_point(candidates, candidates, Objective.THROUGHPUT)
    assert candidates[best].longest_ms == min(max(c.edge_ms, c.transfer_ms, c.cloud_ms) for c in candidates)


def test_waiting_and_round_trips_are_no_bottleneck() -> None:
    stages = [StageTimes(0, 60, 9), StageTimes(30, 0, 0)]
    busy = [StageTimes(0, 10, 9), StageTimes(30, 0, 0)]
    assert best_point(stages, busy, Objective.THROUGHPUT) == 0
    assert best_point(stages, busy, Objective.LATENCY) == 1


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("bad", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_a_latency_that_is_none_is_refused(position: int, bad: float) -> None:
    chain = [[1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0]]
    chain[position][1] = bad
    with pytest.raises(PlanningError, match="negative or not a number"):
        chain_candidates(*chain)


@pytest.mark.parametrize(("edge", "transfer", "cloud"), [(2, 2, 2), (2, 4, 2), (1, 3, 2), (2, 3, 1), (0, 0, 0)])
def test_lengths_that_make_no_chain_are_refused(edge: int, transfer: int, cloud: int) -> None:
    with pytest.raises(PlanningError, match=f"{edge} edge, {cloud} cloud and {transfer} transfer"):
        chain_candidates([1.0] * edge, [1.0] * transfer, [1.0] * cloud)
