"""The cuts of a queue of tasks: for latency with hysteresis, for throughput for the tasks ahead together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.flow_shop import IDLE, Pipeline, choose_cuts
from neurosurgeon.planner.hedge import is_clearly_sooner
from neurosurgeon.planner.plan import Candidate, SplitPlan
from neurosurgeon.utils.timing import StageTimes

HORIZON = 40  # tasks that are planned together
REPLAN_TASKS = 8  # after so many, the next ones are planned together, in 1 ms
MIN_GAIN = 0.05  # a cut is changed for no less: estimates move by some percent from second to second


class Choice(NamedTuple):
    """A cut for one task."""

    plan: SplitPlan
    candidate: Candidate
    predicted: StageTimes  # with the waits for tasks in flight

    @property
    def rest_ms(self) -> float:
        """The latency of the cloud partition on the edge, ms."""
        return self.plan.candidates[-1].busy.edge_ms - self.candidate.busy.edge_ms


def choice(plan: SplitPlan, index: int, pipeline: Pipeline) -> Choice:
    """Return the choice of a candidate for a task that begins now."""
    candidate = plan.candidates[index]
    return Choice(plan, candidate, pipeline.with_waits(candidate.stages, candidate.busy))


def cut_for_deadline(chosen: Choice, deadline_ms: float | None, pipeline: Pipeline) -> Choice:
    """Return the choice if it meets the deadline, else the fastest cut, which may still miss it."""
    if deadline_ms is None or chosen.predicted.total_ms <= deadline_ms:
        return chosen
    return _fastest(chosen.plan, pipeline)


def replan_whole_task(chosen: Choice, elapsed_ms: float, plan: SplitPlan, pipeline: Pipeline) -> Choice | None:
    """Return another cut for a task that the edge has computed for ``elapsed_ms``, or None.

    Starting over with it must now be clearly faster than going on. A link that was bad when a long edge partition began
    may have recovered long before its end.
    """
    as_chosen = choice(plan, chosen.candidate.point, pipeline).predicted
    left_ms = as_chosen.total_ms - min(elapsed_ms, as_chosen.edge_ms)
    better = _fastest(plan, pipeline)
    if not is_clearly_sooner(better.predicted.total_ms, left_ms):
        return None
    return better._replace(predicted=better.predicted._replace(edge_ms=elapsed_ms + better.predicted.edge_ms))


def plan_resend(chosen: Choice, elapsed_ms: float, plan: SplitPlan, pipeline: Pipeline) -> Choice | None:
    """Return how to send a task again whose rest the edge has computed for ``elapsed_ms``, or None.

    Sending it must now be clearly faster than going on. The prediction begins when it is sent: its edge partition has
    run.
    """
    candidate = plan.candidates[chosen.candidate.point]
    predicted = pipeline.with_waits(candidate.stages.beyond_edge, candidate.busy.beyond_edge)
    is_sooner = is_clearly_sooner(predicted.total_ms, chosen.rest_ms - elapsed_ms)
    return Choice(plan, candidate, predicted) if is_sooner else None


def _fastest(plan: SplitPlan, pipeline: Pipeline) -> Choice:
    totals_ms = pipeline.totals_ms(plan.candidates.stages_ms, plan.candidates.busy_ms)
    return choice(plan, int(totals_ms.argmin()), pipeline)


class Chooser:
    """Chooses the cuts of a queue of models, one task after the other.

    For latency a plan must have a candidate for every point, in order.

    Args: queue: the model of each task; it may be endless.
    """

    def __init__(self, objective: Objective, queue: Iterable[str], in_flight: int | None = None) -> None:
        self._objective = objective
        self._queue = iter(queue)
        self._next: deque[str] = deque()  # the models of the next tasks, `HORIZON` at most
        self._in_flight = in_flight
        self._position = 0  # in the queue
        self._last: dict[str, int] = {}  # latency: the point of each model's last task
        self._ahead: list[int] = []  # throughput: candidates of the tasks since they were planned together, and after

    def choose(self, plan_of: Callable[[str], SplitPlan], pipeline: Pipeline = IDLE) -> Choice:
        """Return how to run the next task.

        For throughput, with the cut with which the tasks ahead are finished first. For latency, with that of the
        model's last task, unless another one is faster by `MIN_GAIN`.

        Args: pipeline: for how long link and cloud are still busy.
        """
        position = self._position
        self._position += 1  # also where planning this task fails
        self._next.extend(islice(self._queue, HORIZON - len(self._next)))
        model = self._next.popleft()
        plan = plan_of(model)
        if self._objective is Objective.THROUGHPUT:
            if position % REPLAN_TASKS == 0 or not self._ahead:
                self._plan_ahead([plan_of(name) for name in (model, *self._next)], pipeline)
            index = min(self._ahead[position % REPLAN_TASKS], len(plan.candidates) - 1)
            chosen = choice(plan, index, pipeline)
        else:
            chosen = self._last_unless_slower(plan, pipeline)
        return chosen

    def _plan_ahead(self, plans: Iterable[SplitPlan], pipeline: Pipeline) -> None:
        ahead = [plan.candidates for plan in plans]
        busy = {id(candidates): [StageTimes(*row) for row in candidates.busy_ms.tolist()] for candidates in ahead}
        options = [busy[id(candidates)] for candidates in ahead]
        known = zip(self._ahead[REPLAN_TASKS:], options, strict=False)  # a plan may have a cut less than the one before
        start = [min(index, len(option) - 1) for index, option in known]
        self._ahead = choose_cuts(options, pipeline, self._in_flight, start)

    def _last_unless_slower(self, plan: SplitPlan, pipeline: Pipeline) -> Choice:
        model = plan.graph.model
        best = choice(plan, plan.best.point, IDLE) if pipeline == IDLE else _fastest(plan, pipeline)
        chosen = choice(plan, self._last.get(model, best.candidate.point), pipeline)
        if best.predicted.total_ms < (1 - MIN_GAIN) * chosen.predicted.total_ms:
            chosen = best
        self._last[model] = chosen.candidate.point
        return chosen
