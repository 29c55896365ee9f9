"""Quick rounds of the survival benchmark."""

from __future__ import annotations

import signal

from tests.benchmark import survival


def test_a_killed_cloud_loses_no_task() -> None:
    found = survival.lose_clouds(1, signal.SIGKILL)
    assert found["tasks"] > 1
    assert (found["unanswered"], found["wrong"]) == (0, 0)


def test_killed_edges_leak_no_resources() -> None:
    found = survival.kill_edges(10)
    for resource in ("threads", "descriptors", "children"):
        assert found["after"][resource] == found["before"][resource]


def test_a_stopping_cloud_replies_to_arrived_tasks() -> None:
    found = survival.stop_with_tasks(edges=2, tasks=4)
    assert (found["answers"], found["wrong"], found["exit_code"]) == (8, 0, 0)
