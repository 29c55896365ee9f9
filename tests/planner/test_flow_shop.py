"""Orders and cuts of a queue, against every permutation and every choice."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosurgeon.planner.flow_shop import (
    IDLE,
    Pipeline,
    RestOfQueue,
    Schedule,
    choose_cuts,
    johnson_order,
    makespan_ms,
    order_of,
)
from neurosurgeon.utils.timing import StageTimes

times_ms = st.floats(0.0, 50.0)
tasks = st.lists(st.builds(StageTimes, times_ms, st.just(0.0), times_ms), min_size=1, max_size=6)


@given(tasks)
def test_johnson_order_is_the_shortest_on_two_machines(busy: list[StageTimes]) -> None:
    chosen = makespan_ms(busy[i] for i in order_of(Schedule.JOHNSON, busy))
    assert chosen <= min(map(makespan_ms, permutations(busy))) + 1e-6


@given(tasks)
def test_order_of_has_every_task_once(busy: list[StageTimes]) -> None:
    for schedule in Schedule:
        assert sorted(order_of(schedule, busy)) == list(range(len(busy)))
    assert order_of(Schedule.FIFO, busy) == list(range(len(busy)))


def test_johnson_order_of_a_textbook_queue() -> None:
    assert johnson_order([3, 5, 1, 6, 7], [6, 2, 2, 6, 5]) == [2, 0, 3, 4, 1]


def test_makespan_of_three_stages() -> None:
    assert makespan_ms([StageTimes(2, 3, 1), StageTimes(2, 1, 5)]) == 2 + 3 + 1 + 5
    assert makespan_ms([]) == 0


def test_choose_cuts_balances_the_whole_queue() -> None:
    """With every task cut in the middle, the busiest stage takes 190 ms a task; with whole tasks on both sides, 125."""
    options = [StageTimes(250, 0, 0), StageTimes(0, 240, 100), StageTimes(190, 160, 30)]
    chosen = choose_cuts([options] * 10)
    assert makespan_ms(options[option] for option in chosen) <= 1400


Candidates = Sequence[Sequence[StageTimes]]
stage_times = st.builds(StageTimes, times_ms, st.sampled_from((0.0, 5.0, 40.0)), st.sampled_from((0.0, 5.0, 40.0)))


def end_ms(candidates: Candidates, chosen: Sequence[int], in_flight: int | None) -> float:
    return makespan_ms([options[option] for options, option in zip(candidates, chosen, strict=True)], in_flight)


def best_ms(candidates: Candidates, in_flight: int | None) -> float:
    """Return the shortest makespan of all choices."""
    choices = product(*(range(len(options)) for options in candidates))
    return min(end_ms(candidates, chosen, in_flight) for chosen in choices)


@given(st.lists(st.lists(st.builds(StageTimes, times_ms, times_ms, times_ms), min_size=1, max_size=3), max_size=5))
def test_choose_cuts_is_within_twice_the_best(candidates: list[list[StageTimes]]) -> None:
    assert end_ms(candidates, choose_cuts(candidates, in_flight=2), 2) <= 2 * best_ms(candidates, 2) + 1e-6


def test_choose_cuts_is_nearly_the_best_for_small_queues() -> None:
    """Of queues with one to three models, the mean is 1.002 times the shortest makespan, the worst 1.17 times."""
    draw = random.Random(7)
    ratios = []
    for _ in range(200):
        models = [
            [StageTimes(*(draw.uniform(0, 50) for _ in range(3))) for _ in range(draw.randint(1, 3))]
            for _ in range(draw.randint(1, 3))
        ]
        candidates = draw.choices(models, k=draw.randint(1, 6))
        in_flight = draw.choice((1, 2, 4, None))
        chosen = choose_cuts(candidates, in_flight=in_flight)
        ratios.append(end_ms(candidates, chosen, in_flight) / best_ms(candidates, in_flight))
    assert statistics.mean(ratios) < 1.005
    assert max(ratios) < 1.2


@given(st.lists(stage_times, max_size=10), st.lists(stage_times, max_size=10), st.sampled_from((None, 1, 2, 5)))
def test_rest_of_queue_ends_with_its_tasks(
    first: list[StageTimes], others: list[StageTimes], in_flight: int | None
) -> None:
    pipeline = IDLE
    for busy in first:
        pipeline = pipeline.after(busy, in_flight)
    rest = RestOfQueue.empty(in_flight)
    for busy in reversed(others):
        rest = rest.before(busy)
    for start in (pipeline, pipeline.from_now()):
        assert rest.end_ms(start) == pytest.approx(start.end_ms(others, in_flight))


@given(st.lists(stage_times, min_size=1, max_size=5), times_ms, times_ms, times_ms)
def test_totals_are_those_of_with_waits(
    busy: list[StageTimes], link_ms: float, cloud_ms: float, wait_ms: float
) -> None:
    pipeline = Pipeline(0.0, link_ms, cloud_ms)
    stages = [times._replace(cloud_ms=times.cloud_ms + wait_ms) for times in busy]
    expected = [pipeline.with_waits(*pair).total_ms for pair in zip(stages, busy, strict=True)]
    assert pipeline.totals_ms(np.array(stages), np.array(busy)).tolist() == pytest.approx(expected)


@given(tasks)
def test_makespan_is_no_shorter_with_fewer_in_flight(busy: list[StageTimes]) -> None:
    one, two, any_number = (makespan_ms(busy, in_flight) for in_flight in (1, 2, None))
    assert one == pytest.approx(sum(times.total_ms for times in busy))
    assert one >= two - 1e-6 >= any_number - 2e-6


def test_choose_cuts_of_an_empty_queue() -> None:
    assert choose_cuts([]) == []
