"""The search for the best partition point of a chain: prefix sums, no network is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate

from neurosurgeon.utils.errors import PlanningError
from neurosurgeon.utils.timing import StageTimes


def chain_candidates(
    edge_ms: Sequence[float], transfer_ms: Sequence[float], cloud_ms: Sequence[float]
) -> list[StageTimes]:
    """Return the stage times of every partition point, (L + 1,), in O(L) (Neurosurgeon, ASPLOS'17, sec. 5).

    Args:   edge_ms, cloud_ms: latency of each layer, (L,), ms.
            transfer_ms: time to send what crosses at each point, (L + 1,), ms.
    Raises: PlanningError: lengths differ, or a value is negative or no number.
    """
    if not len(edge_ms) == len(cloud_ms) == len(transfer_ms) - 1:
        raise PlanningError(
            f"{len(edge_ms)} edge, {len(cloud_ms)} cloud and {len(transfer_ms)} transfer times do not make a chain"
        )
    if not all(math.isfinite(value) and value >= 0 for times in (edge_ms, transfer_ms, cloud_ms) for value in times):
        raise PlanningError("a latency is negative or not a number")
    before = accumulate(edge_ms, initial=0.0)
    after = reversed(list(accumulate(reversed(cloud_ms), initial=0.0)))
    return [StageTimes(*stages) for stages in zip(before, transfer_ms, after, strict=True)]


class Objective(StrEnum):
    """What the best cut is best at."""

    LATENCY = "latency"  # of one task: the sum of its stages
    THROUGHPUT = "throughput"  # of many at once: the stage that is busy longest holds up the others


def cost_ms(objective: Objective, stages: StageTimes, busy: StageTimes) -> tuple[float, float]:
    """Return what to minimise, and what decides among equals.

    Args: stages: what one task takes. busy: how long it keeps edge, link and cloud from other tasks.
    """
    if objective is Objective.LATENCY:
        return stages.total_ms, busy.longest_ms
    return busy.longest_ms, stages.total_ms


def best_point(
    stages: Sequence[StageTimes], busy: Sequence[StageTimes], objective: Objective = Objective.LATENCY
) -> int:
    """Return the partition point with the smallest cost; of equals, the one that keeps more in the cloud."""
    return min(range(len(stages)), key=lambda point: cost_ms(objective, stages[point], busy[point]))
