"""Quick rounds of the survival benchmark: what its long runs measure, its short ones must show, too."""

from __future__ import annotations

import signal

from tests.benchmark import survival


def test_a_cloud_that_is_killed_costs_no_answer() -> None:
    found = survival.lose_clouds(1, signal.SIGKILL)
    assert found["tasks"] > 1
    assert (found["unanswered"], found["wrong"]) == (0, 0)


def test_edges_that_are_killed_while_they_send_leave_nothing_behind() -> None:
    found = survival.kill_edges(10)
    for what in ("threads", "descriptors", "children"):
        assert found["after"][what] == found["before"][what]


def test_a_stopping_cloud_answers_what_has_arrived() -> None:
    found = survival.stop_with_tasks(edges=2, tasks=4)
    assert (found["answers"], found["wrong"], found["exit_code"]) == (8, 0, 0)
