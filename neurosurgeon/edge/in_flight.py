"""The record of a queued task from its plan to its result."""

from __future__ import annotations

from dataclasses import dataclass

from neurosurgeon.edge.cuts import QueueModel, StageFactors
from neurosurgeon.edge.records import QueuedTask
from neurosurgeon.edge.task_states import TaskRecord
from neurosurgeon.graph.spec import Array
from neurosurgeon.net.link_watch import LinkNow
from neurosurgeon.planner.plan import Candidate
from neurosurgeon.planner.queue import Choice

FIRST_RUN_MS = 1_000.0  # the cloud, too, builds kernels for a cut that it runs for the first time


@dataclass(slots=True, eq=False)
class InFlightTask:
    """A task that has a cut; times are of this machine's clock (`now_ms`).

    Owned by the main loop (`edge.queue`). Once it is reported, the reporter (`edge.results`) reads it on its own
    thread, and the main loop changes only ``record`` and ``arrays``, which the reporter does not read.
    """

    queued: QueuedTask
    model: QueueModel
    record: TaskRecord
    now: LinkNow  # the link estimate of its plan
    chosen: Choice
    factors: StageFactors  # the corrections in its predictions
    arrays: tuple[Array, ...] = ()  # the boundary tensors, until it is reported
    made: tuple[Array, ...] = ()  # the outputs that the edge partition has made
    is_first_run: bool = False  # of its cut
    planned_ms: float = 0.0  # when it was planned, while a partition of it runs
    edge_ms: float = 0.0  # computing time of the edge
    start_ms: float = 0.0  # when its edge partition began
    done_ms: float = 0.0  # and when it ended
    lost_ms: float = 0.0  # from its first transfer until it was sent again, after the connection was lost

    @property
    def id(self) -> int:
        """The number of the task."""
        return self.queued.id

    @property
    def candidate(self) -> Candidate:
        """Its cut."""
        return self.chosen.candidate

    @property
    def edge_nodes(self) -> frozenset[int]:
        """The nodes of the graph that its cut leaves on the edge."""
        return self.chosen.plan.edge_nodes(self.candidate)

    @property
    def timeout_ms(self) -> float:
        """The predicted time until its reply, with all known waits."""
        return self.chosen.predicted.beyond_edge.total_ms + FIRST_RUN_MS * self.is_first_run

    def change_cut(self, now: LinkNow, chosen: Choice) -> None:
        """Take the cut of a newer plan."""
        self.now, self.chosen, self.factors = now, chosen, self.model.factors
