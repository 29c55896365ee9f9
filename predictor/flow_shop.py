"""Many tasks on three machines in a row, edge, link and cloud: which cut each should have, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from utils.timing import StageTimes

MEMORY = 0.98  # of loads, from task to task: what was given some fifty tasks ago has long been done


class Schedule(StrEnum):
    """In which order a queue is worked through."""

    FIFO = "fifo"
    JOHNSON = "johnson"


def order_of(schedule: Schedule, busy: Sequence[StageTimes]) -> list[int]:
    """Return the order of tasks, as indices into the queue.

    Args: busy: how long each task keeps edge, link and cloud busy, (n,).
    """
    if schedule is Schedule.FIFO:
        return list(range(len(busy)))
    return johnson_order([times.edge_ms for times in busy], [times.transfer_ms + times.cloud_ms for times in busy])


def johnson_order(first_ms: Sequence[float], second_ms: Sequence[float]) -> list[int]:
    """Return the order with the shortest makespan on two machines in a row (Johnson, 1954).

    Tasks that are shorter on the first machine come first, by that time; then the others, longest second time first.

    Args: first_ms, second_ms: how long each task keeps the first and the second machine busy, (n,), ms.
    """
    both = list(zip(first_ms, second_ms, strict=True))
    early = sorted((i for i, (first, second) in enumerate(both) if first < second), key=lambda i: both[i][0])
    late = sorted((i for i, (first, second) in enumerate(both) if first >= second), key=lambda i: -both[i][1])
    return early + late


def makespan_ms(busy: Iterable[StageTimes]) -> float:
    """Return when the last task is finished, if edge, link and cloud each work through the tasks in this order."""
    edge_ms = link_ms = cloud_ms = 0.0
    for times in busy:
        edge_ms += times.edge_ms
        link_ms = max(link_ms, edge_ms) + times.transfer_ms
        cloud_ms = max(cloud_ms, link_ms) + times.cloud_ms
    return cloud_ms


class StageLoads:
    """How much work edge, link and cloud were given of late, to keep all three busy.

    A task's own bottleneck is the wrong measure: a queue that sends one task whole and keeps the next is often faster
    than one that cuts both in the middle. Greedily keeping the sum of squared loads small is within a constant of the
    best assignment, without knowing what comes (Awerbuch et al., FOCS'95), and evens out what it got wrong.
    """

    def __init__(self) -> None:
        self._loads_ms = (0.0, 0.0, 0.0)

    def lightest(self, busy: Sequence[StageTimes]) -> int:
        """Return which of some candidates for a task adds least, given how long each keeps the stages busy."""
        return min(range(len(busy)), key=lambda index: sum(load * load for load in self._with(busy[index])))

    def add(self, busy: StageTimes) -> None:
        """Take in that a task was given to the stages."""
        self._loads_ms = self._with(busy)

    def _with(self, busy: StageTimes) -> tuple[float, float, float]:
        edge_ms, link_ms, cloud_ms = (MEMORY * load for load in self._loads_ms)
        return edge_ms + busy.edge_ms, link_ms + busy.transfer_ms, cloud_ms + busy.cloud_ms
