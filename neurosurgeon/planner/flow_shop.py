"""Many tasks on three machines in a row, edge, link and cloud: which cut each should have, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from operator import add, getitem
from typing import NamedTuple

import numpy as np

from neurosurgeon.utils.timing import StageTimes

NORMS = (4, 8)  # of loads: the longest counts most, yet the others still count
BALANCING_SWEEPS = 5
MAX_SWEEPS = 8  # most queues settle after two or three
STEPS = 8
PRICES = np.array([(a, b, STEPS - a - b) for a in range(STEPS + 1) for b in range(STEPS + 1 - a)]) / STEPS


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


class Pipeline(NamedTuple):
    """When edge, link and cloud have done what they were given, and when its answers come, ms from now."""

    edge_ms: float = 0.0
    link_ms: float = 0.0
    cloud_ms: float = 0.0
    answers_ms: tuple[float, ...] = ()  # of tasks that are on their way, earliest first

    def after(self, busy: StageTimes, in_flight: int | None = None) -> Pipeline:
        """Return the times after one more task, which waits until fewer than ``in_flight`` are on their way."""
        edge_ms, link_ms, cloud_ms, answers_ms = self
        if in_flight and len(answers_ms) >= in_flight:
            edge_ms = max(edge_ms, answers_ms[-in_flight])
            answers_ms = answers_ms[len(answers_ms) - in_flight + 1 :]
        edge_ms += busy.edge_ms
        if busy.transfer_ms or busy.cloud_ms:
            link_ms = max(link_ms, edge_ms) + busy.transfer_ms
            cloud_ms = max(cloud_ms, link_ms) + busy.cloud_ms
            answers_ms = (*answers_ms, cloud_ms)
        return Pipeline(edge_ms, link_ms, cloud_ms, answers_ms)

    def with_waits(self, stages: StageTimes, busy: StageTimes) -> StageTimes:
        """Return the stages of a task that begins now and waits for link and cloud until they have done the rest.

        Args: stages: what it takes where nothing else is under way; a wait for the cloud may be part of it already.
              busy: how long it keeps the stages busy.
        """
        if not (busy.transfer_ms or busy.cloud_ms):
            return stages
        link_wait_ms = max(self.link_ms - busy.edge_ms, 0.0)
        arrives_ms = busy.edge_ms + link_wait_ms + busy.transfer_ms
        known_wait_ms = stages.cloud_ms - busy.cloud_ms
        cloud_wait_ms = max(self.cloud_ms - arrives_ms - known_wait_ms, 0.0)
        return StageTimes(stages.edge_ms, stages.transfer_ms + link_wait_ms, stages.cloud_ms + cloud_wait_ms)

    def from_now(self) -> Pipeline:
        """Return the same, counted from when the edge is free."""
        edge_ms, link_ms, cloud_ms, answers_ms = self
        left = tuple(answer_ms - edge_ms for answer_ms in answers_ms if answer_ms > edge_ms)
        return Pipeline(0.0, max(link_ms - edge_ms, 0.0), max(cloud_ms - edge_ms, 0.0), left)

    def end_ms(self, tasks: Iterable[StageTimes], in_flight: int | None = None) -> float:
        """Return when the last of these tasks, and of those before, is finished."""
        pipeline = self
        for busy in tasks:
            pipeline = pipeline.after(busy, in_flight)
        return max(pipeline[:3])


IDLE = Pipeline()


def makespan_ms(busy: Iterable[StageTimes], in_flight: int | None = None) -> float:
    """Return when the last task is finished, if edge, link and cloud each work through the tasks in this order."""
    return IDLE.end_ms(busy, in_flight)


def choose_cuts(
    candidates: Sequence[Sequence[StageTimes]],
    pipeline: Pipeline = IDLE,
    in_flight: int | None = None,
    earlier: Sequence[int] = (),
) -> list[int]:
    """Return which candidate each task of a queue should have, (n,), for a short makespan in this order.

    A task's own bottleneck is the wrong measure: a queue that sends one task whole and keeps the next is often faster
    than one that cuts both in the middle. So the loads of the stages are balanced over the whole queue, and then each
    task in turn is given what finishes the queue earliest, until that gains no more: a local optimum.

    Args: candidates: how long each candidate of each task keeps the stages busy, (n, candidates of the task).
          pipeline: what the stages are still busy with.
          in_flight: how many tasks may be on their way at once; None: any number.
          earlier: choices of an earlier call for these tasks, or the first of them, to be made better.
    """
    options = _worthwhile(candidates, earlier)
    times = [[busy[option] for option in few] for busy, few in zip(candidates, options, strict=True)]
    known = [few.index(option) for few, option in zip(options, earlier, strict=False)]
    starts = dict.fromkeys(tuple(_balanced(times, pipeline, norm, known)) for norm in NORMS)  # often the same
    settled = [_settled(times, list(start), pipeline, in_flight) for start in starts]
    best = min(settled, key=lambda chosen: pipeline.end_ms(map(getitem, times, chosen), in_flight))
    return list(map(getitem, options, best))


def _worthwhile(candidates: Sequence[Sequence[StageTimes]], earlier: Sequence[int]) -> list[list[int]]:
    """Return the candidates of each task that are best for some prices of the stages' time, and earlier choices.

    Only these can be part of the linear-programming optimum of the loads; of fifty they are two to five.
    """
    cheapest: dict[int, set[int]] = {}  # tasks of one model share their candidates
    for busy in candidates:
        if id(busy) not in cheapest:
            cheapest[id(busy)] = set((PRICES @ np.transpose(busy)).argmin(axis=1).tolist())
    own: list[set[int]] = [{option} for option in earlier]
    own += [set()] * (len(candidates) - len(own))
    return [sorted(cheapest[id(busy)] | mine) for busy, mine in zip(candidates, own, strict=True)]


def _balanced(times: Sequence[Sequence[StageTimes]], pipeline: Pipeline, norm: int, known: Sequence[int]) -> list[int]:
    """Return choices that keep a norm of the stages' loads small: the known ones, then greedily, and task by task."""
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
    """Return choices that are improved until that gains no more."""
    for _ in range(MAX_SWEEPS):
        improved = _improved(times, chosen, pipeline, in_flight)
        if improved == chosen:
            break
        chosen = improved
    return chosen


def _improved(
    candidates: Sequence[Sequence[StageTimes]], chosen: Sequence[int], pipeline: Pipeline, in_flight: int | None
) -> list[int]:
    """Return choices with each task's, one after the other, changed to what ends the queue earliest.

    Linear in the number of tasks: what comes after a task is summed up once, from the end.
    """
    rests = [Rest.of_nothing(in_flight)]  # after each task, the last one first
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


class Rest(NamedTuple):
    """What the rest of a queue adds to each time of a `Pipeline`, ms; the queue ends at the latest of these sums.

    Every start is the maximum of some ends before it, so the end of the queue is linear in the algebra of maximum and
    plus, and any number of tasks is summed up by one number for each time.
    """

    edge_ms: float
    link_ms: float
    cloud_ms: float
    answers_ms: tuple[float, ...]  # of as many tasks as may be in flight, the last one first

    @classmethod
    def of_nothing(cls, in_flight: int | None) -> Rest:
        """Return the rest of a queue whose last task has begun."""
        return cls(0.0, 0.0, 0.0, (-math.inf,) * (in_flight or 0))

    def before(self, busy: StageTimes) -> Rest:
        """Return the rest with one more task, which comes before all others; see `Pipeline.after`."""
        edge_ms, link_ms, cloud_ms, answers_ms = self
        if busy.transfer_ms or busy.cloud_ms:
            cloud_ms = max((cloud_ms, *answers_ms[:1])) + busy.cloud_ms
            link_ms = max(link_ms, cloud_ms) + busy.transfer_ms
            edge_ms = max(edge_ms, link_ms) + busy.edge_ms
            return Rest(edge_ms, link_ms, cloud_ms, answers_ms and (*answers_ms[1:], edge_ms))
        edge_ms += busy.edge_ms
        return Rest(edge_ms, link_ms, cloud_ms, answers_ms and (*answers_ms[:-1], max(answers_ms[-1], edge_ms)))

    def end_ms(self, pipeline: Pipeline) -> float:
        """Return when the last task is finished, after those of a pipeline."""
        edge_ms, link_ms, cloud_ms, answers_ms = pipeline
        stages_ms = (edge_ms + self.edge_ms, link_ms + self.link_ms, cloud_ms + self.cloud_ms)
        end_ms: float = max(*stages_ms, *map(add, reversed(answers_ms), self.answers_ms))
        return end_ms
