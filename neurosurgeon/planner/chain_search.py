"""The search for the best partition point of a chain, by prefix sums of predicted latencies."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neurosurgeon.utils.errors import PlanningError

Floats = NDArray[np.float64]


def sums_before(values: ArrayLike) -> Floats:
    """Return the sum of the first 0 ... n values, (n + 1,)."""
    return np.concatenate(([0.0], np.cumsum(values)))


def sums_after(values: ArrayLike) -> Floats:
    """Return the sum of all but the first 0 ... n values, (n + 1,)."""
    return np.concatenate((np.cumsum(np.asarray(values)[::-1])[::-1], [0.0]))


def chain_stages(edge_ms: Sequence[float], transfer_ms: Sequence[float], cloud_ms: Sequence[float]) -> Floats:
    """Return the times of edge, link and cloud for every partition point, (L + 1, 3), ms, in O(L).

    The source is Neurosurgeon (ASPLOS'17, sec. 5).

    Args:   edge_ms, cloud_ms: latency of each layer, (L,), ms.
            transfer_ms: time to send the boundary tensors of each partition point, (L + 1,), ms.
    Raises: PlanningError: lengths differ, or a value is negative or no number.
    """
    if not len(edge_ms) == len(cloud_ms) == len(transfer_ms) - 1:
        raise PlanningError(
            f"{len(edge_ms)} edge, {len(cloud_ms)} cloud and {len(transfer_ms)} transfer times do not make a chain"
        )
    stages_ms = np.stack((sums_before(edge_ms), np.asarray(transfer_ms), sums_after(cloud_ms)), axis=1)
    times_ms = np.concatenate((edge_ms, transfer_ms, cloud_ms))
    if not (np.isfinite(times_ms).all() and (times_ms >= 0).all()):
        raise PlanningError("a latency is negative or not a number")
    return stages_ms


class Objective(StrEnum):
    """The quantity that the best cut minimises."""

    LATENCY = "latency"  # of one task: the sum of its stages
    THROUGHPUT = "throughput"  # of many at once: the busiest stage limits the rate of all


def rank_cuts(stages_ms: Floats, busy_ms: Floats, objective: Objective = Objective.LATENCY) -> NDArray[np.intp]:
    """Return the indices of cuts by cost, (n,), the cheapest first; equal ones stay in their order.

    For latency the cost is the sum of the stages, and the busiest stage decides among equals. For throughput it is the
    other way round.

    Args: stages_ms: the time of one task on edge, link and cloud with each cut, (n, 3).
          busy_ms: how long that task keeps each of them from other tasks, (n, 3).
    """
    keys_ms = [busy_ms.max(axis=1), stages_ms.sum(axis=1)]  # lexsort's last key counts most
    if objective is Objective.THROUGHPUT:
        keys_ms.reverse()
    return np.lexsort(keys_ms)
