"""The order of a known queue: edge first, then link and cloud, as a flow shop of two machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from utils.timing import StageTimes


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
