"""The cuts and the order of many tasks on three machines in a row: edge, link and cloud (a permutation flow shop)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from operator import add, getitem
from typing import NamedTuple

import numpy as np

from neurosurgeon.planner.chain_search import Floats
from neurosurgeon.utils.timing import StageTimes

NORMS = (4, 8)  # of the loads: the longest counts most, but the others count as well
BALANCING_SWEEPS = 5
MAX_SWEEPS = 8  # most queues need two or three
STEPS = 8  # of the grid of prices
PRICES = np.array([(a, b, STEPS - a - b) for a in range(STEPS + 1) for b in range(STEPS + 1 - a)]) / STEPS


class Schedule(StrEnum):
    """The order in which the tasks of a queue run."""

    FIFO = "fifo"
    JOHNSON = "johnson"


def order_of(schedule: Schedule, busy: Sequence[StageTimes]) -> list[int]:
    """Return the order of tasks, as indices into the queue.

    Args: busy: how long each task keeps edge, link and cloud busy, (n,), ms.
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


class Pipeline(NamedTuple):
    """The times from now, ms, at which edge, link and cloud have finished all their tasks, and replies arrive."""

    edge_ms: float = 0.0
    link_ms: float = 0.0
    cloud_ms: float = 0.0
    replies_ms: tuple[float, ...] = ()  # of tasks in flight, earliest first

    def after(self, busy: StageTimes, in_flight: int | None = None) -> Pipeline:
        """Return the times after one more task, which starts when fewer than ``in_flight`` others are in flight."""
        edge_ms, link_ms, cloud_ms, replies_ms = self
        if in_flight and len(replies_ms) >= in_flight:
            edge_ms = max(edge_ms, replies_ms[-in_flight])
            replies_ms = replies_ms[len(replies_ms) - in_flight + 1 :]
        edge_ms += busy.edge_ms
        if busy.transfer_ms or busy.cloud_ms:
            link_ms = max(link_ms, edge_ms) + busy.transfer_ms
            cloud_ms = max(cloud_ms, link_ms) + busy.cloud_ms
            replies_ms = (*replies_ms, cloud_ms)
        return Pipeline(edge_ms, link_ms, cloud_ms, replies_ms)

    def with_waits(self, stages: StageTimes, busy: StageTimes) -> StageTimes:
        """Return the stages of a task that starts now, with its waits for link and cloud.

        Args: stages: its stages without other tasks; they may already contain a wait for the cloud.
              busy: how long it keeps the stages busy.
        """
        if not (busy.transfer_ms or busy.cloud_ms):
            return stages
        link_wait_ms = max(self.link_ms - busy.edge_ms, 0.0)
        arrives_ms = busy.edge_ms + link_wait_ms + busy.transfer_ms
        known_wait_ms = stages.cloud_ms - busy.cloud_ms
        cloud_wait_ms = max(self.cloud_ms - arrives_ms - known_wait_ms, 0.0)
        return StageTimes(stages.edge_ms, stages.transfer_ms + link_wait_ms, stages.cloud_ms + cloud_wait_ms)

    def totals_ms(self, stages_ms: Floats, busy_ms: Floats) -> Floats:
        """Return the total of `with_waits` for every cut of a task, (n,), ms.

        Args: stages_ms, busy_ms: those of each cut, (n, 3), ms.
        """
        edge_ms, link_ms, cloud_ms = busy_ms.T
        link_wait_ms = np.maximum(self.link_ms - edge_ms, 0.0)
        arrives_ms = edge_ms + link_wait_ms + link_ms
        known_wait_ms = stages_ms[:, 2] - cloud_ms
        cloud_wait_ms = np.maximum(self.cloud_ms - arrives_ms - known_wait_ms, 0.0)
        waits_ms = np.where(link_ms + cloud_ms > 0, link_wait_ms + cloud_wait_ms, 0.0)
        return np.asarray(stages_ms.sum(axis=1) + waits_ms)

    def from_now(self) -> Pipeline:
        """Return the times relative to the moment when the edge is free."""
        edge_ms, link_ms, cloud_ms, replies_ms = self
        left = tuple(reply_ms - edge_ms for reply_ms in replies_ms if reply_ms > edge_ms)
        return Pipeline(0.0, max(link_ms - edge_ms, 0.0), max(cloud_ms - edge_ms, 0.0), left)

    def end_ms(self, tasks: Iterable[StageTimes], in_flight: int | None = None) -> float:
        """Return the time at which the last of these tasks, and of those before, is finished."""
        pipeline = self
        for busy in tasks:
            pipeline = pipeline.after(busy, in_flight)
        return max(pipeline[:3])


IDLE = Pipeline()


def makespan_ms(busy: Iterable[StageTimes], in_flight: int | None = None) -> float:
    """Return the time until the last task is finished, ms; edge, link and cloud each run the tasks in this order."""
    return IDLE.end_ms(busy, in_flight)


def choose_cuts(
    candidates: Sequence[Sequence[StageTimes]],
    pipeline: Pipeline = IDLE,
    in_flight: int | None = None,
    earlier: Sequence[int] = (),
) -> list[int]:
    """Return the index of a candidate for each task of a queue, (n,), for a short makespan in this order.

    The bottleneck of each task is the wrong measure. A queue that sends one task whole and keeps the next is often
    faster than one that cuts both in the middle. So the loads of the stages are balanced over the whole queue. Then
    each task in turn gets the candidate that finishes the queue first, until no change helps: a local optimum.

    Args: candidates: how long each candidate of each task keeps the stages busy, (n, candidates of the task).
          pipeline: how long the stages are still busy with earlier tasks.
          in_flight: how many tasks may be in flight at once; None: any number.
          earlier: results of an earlier call for all of these tasks, or for the first of them, to be improved.
    """
    options = _worthwhile(candidates, earlier)
    times = [[busy[option] for option in few] for busy, few in zip(candidates, options, strict=True)]
    known = [few.index(option) for few, option in zip(options, earlier, strict=False)]
    starts = dict.fromkeys(tuple(_balanced(times, pipeline, norm, known)) for norm in NORMS)  # often the same
    settled = [_settled(times, list(start), pipeline, in_flight) for start in starts]
    best = min(settled, key=lambda chosen: pipeline.end_ms(map(getitem, times, chosen), in_flight))
    return list(map(getitem, options, best))


def _worthwhile(candidates: Sequence[Sequence[StageTimes]], earlier: Sequence[int]) -> list[list[int]]:
    """Return the candidates of each task that are cheapest for some prices of the stages' time, and earlier choices.

    Only these can be part of the linear-programming optimum of the loads: two to five of fifty candidates.
    """
    cheapest: dict[int, set[int]] = {}  # tasks of one model share their candidates
    for busy in candidates:
        if id(busy) not in cheapest:
            cheapest[id(busy)] = set((PRICES @ np.transpose(busy)).argmin(axis=1).tolist())
    own: list[set[int]] = [{option} for option in earlier]
    own += [set()] * (len(candidates) - len(own))
    return [sorted(cheapest[id(busy)] | mine) for busy, mine in zip(candidates, own, strict=True)]


def _balanced(times: Sequence[Sequence[StageTimes]], pipeline: Pipeline, norm: int, known: Sequence[int]) -> list[int]:
    """Return choices that keep a norm of the stages' loads small: first the known ones, then greedily task by task."""
    loads_ms = pipeline[:3]
    for options, option in zip(times, known, strict=False):
        loads_ms = _loads(loads_ms, options[option])
    chosen = dict(enumerate(known))
    for _ in range(BALANCING_SWEEPS):
        before = dict(chosen)
        for task, options in enumerate(times[len(known) :], len(known)):
            if task in chosen:
                loads_ms = _loads(loads_ms, options[chosen[task]], -1)
            with_option = [_loads(loads_ms, busy) for busy in options]
            costs = [edge**norm + link**norm + cloud**norm for edge, link, cloud in with_option]
            chosen[task] = costs.index(min(costs))
            loads_ms = with_option[chosen[task]]
        if chosen == before:
            break
    return list(chosen.values())


def _loads(loads_ms: tuple[float, float, float], busy: StageTimes, sign: int = 1) -> tuple[float, float, float]:
    edge_ms, link_ms, cloud_ms = loads_ms
    return edge_ms + sign * busy.edge_ms, link_ms + sign * busy.transfer_ms, cloud_ms + sign * busy.cloud_ms


def _settled(
    times: Sequence[Sequence[StageTimes]], chosen: list[int], pipeline: Pipeline, in_flight: int | None
) -> list[int]:
    """Return choices that are improved until no sweep changes them."""
    for _ in range(MAX_SWEEPS):
        improved = _improved(times, chosen, pipeline, in_flight)
        if improved == chosen:
            break
        chosen = improved
    return chosen


def _improved(
    candidates: Sequence[Sequence[StageTimes]], chosen: Sequence[int], pipeline: Pipeline, in_flight: int | None
) -> list[int]:
    """Return the choices after each task in turn was given the candidate that finishes the queue first.

    It takes linear time: the tasks after each one are summed up once, beginning at the end.
    """
    rests = [RestOfQueue.empty(in_flight)]  # after each task, the last task first
    for busy in reversed(list(map(getitem, candidates, chosen))[1:]):
        rests.append(rests[-1].before(busy))
    improved = []
    for options, before in zip(candidates, chosen, strict=True):
        rest = rests.pop()
        pipelines = [pipeline.after(busy, in_flight) for busy in options]
        ends_ms = [rest.end_ms(after) for after in pipelines]
        best_ms = min(ends_ms)
        improved.append(ends_ms.index(best_ms) if best_ms < ends_ms[before] else before)
        pipeline = pipelines[improved[-1]]
    return improved


class RestOfQueue(NamedTuple):
    """The time that the rest of a queue adds to each time of a `Pipeline`, ms; the queue ends at the latest sum.

    Every start is the maximum of some ends before it. So the end of the queue is linear in the max-plus algebra, and
    one number for each time sums up any number of tasks.
    """

    edge_ms: float
    link_ms: float
    cloud_ms: float
    replies_ms: tuple[float, ...]  # of as many tasks as may be in flight, the last task first

    @classmethod
    def empty(cls, in_flight: int | None) -> RestOfQueue:
        """Return the rest of a queue whose last task has started."""
        return cls(0.0, 0.0, 0.0, (-math.inf,) * (in_flight or 0))

    def before(self, busy: StageTimes) -> RestOfQueue:
        """Return the rest with one more task before all others; see `Pipeline.after`."""
        edge_ms, link_ms, cloud_ms, replies_ms = self
        if busy.transfer_ms or busy.cloud_ms:
            cloud_ms = max((cloud_ms, *replies_ms[:1])) + busy.cloud_ms
            link_ms = max(link_ms, cloud_ms) + busy.transfer_ms
            edge_ms = max(edge_ms, link_ms) + busy.edge_ms
            return RestOfQueue(edge_ms, link_ms, cloud_ms, replies_ms and (*replies_ms[1:], edge_ms))
        edge_ms += busy.edge_ms
        return RestOfQueue(edge_ms, link_ms, cloud_ms, replies_ms and (*replies_ms[:-1], max(replies_ms[-1], edge_ms)))

    def end_ms(self, pipeline: Pipeline) -> float:
        """Return the time at which the last task is finished, after those of a pipeline."""
        edge_ms, link_ms, cloud_ms, replies_ms = pipeline
        stages_ms = (edge_ms + self.edge_ms, link_ms + self.link_ms, cloud_ms + self.cloud_ms)
        end_ms: float = max(*stages_ms, *map(add, reversed(replies_ms), self.replies_ms))
        return end_ms
