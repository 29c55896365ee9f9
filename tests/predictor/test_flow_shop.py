"""Orders of a queue, against every permutation."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from predictor.flow_shop import Schedule, johnson_order, makespan_ms, order_of
from utils.timing import StageTimes

times_ms = st.floats(0.0, 50.0)
tasks = st.lists(st.builds(StageTimes, times_ms, st.just(0.0), times_ms), min_size=1, max_size=6)


@given(tasks)
def test_no_order_beats_johnsons_on_two_machines(busy: list[StageTimes]) -> None:
    chosen = makespan_ms(busy[i] for i in order_of(Schedule.JOHNSON, busy))
    assert chosen <= min(map(makespan_ms, permutations(busy))) + 1e-6


@given(tasks)
def test_every_order_has_every_task_once(busy: list[StageTimes]) -> None:
    for schedule in Schedule:
        assert sorted(order_of(schedule, busy)) == list(range(len(busy)))
    assert order_of(Schedule.FIFO, busy) == list(range(len(busy)))


def test_a_textbook_queue() -> None:
    assert johnson_order([3, 5, 1, 6, 7], [6, 2, 2, 6, 5]) == [2, 0, 3, 4, 1]


def test_makespan_of_three_stages() -> None:
    assert makespan_ms([StageTimes(2, 3, 1), StageTimes(2, 1, 5)]) == 2 + 3 + 1 + 5
    assert makespan_ms([]) == 0
