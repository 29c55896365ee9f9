"""Orders of a queue, against every permutation."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from predictor.flow_shop import Schedule, StageLoads, johnson_order, makespan_ms, order_of
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


def test_loads_are_balanced_over_a_queue_and_not_within_each_task() -> None:
    """Cut in the middle each of ten tasks takes 190 ms of its busiest stage; half here, half there, about 125."""
    here, there, middle = StageTimes(250, 0, 0), StageTimes(0, 240, 100), StageTimes(190, 160, 30)
    loads, total = StageLoads(), [0.0, 0.0, 0.0]
    for _ in range(10):
        chosen = (here, there, middle)[loads.lightest([here, there, middle])]
        loads.add(chosen)
        total = [total[0] + chosen.edge_ms, total[1] + chosen.transfer_ms, total[2] + chosen.cloud_ms]
    assert max(total) <= 1300


def test_without_any_load_the_lightest_is_chosen() -> None:
    assert StageLoads().lightest([StageTimes(3, 0, 0), StageTimes(1, 1, 1), StageTimes(0, 0, 2)]) == 1
