"""Records of the edge: tasks, their results, and the events that a task or a queue reports to an observer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosurgeon.utils.timing import StageTimes, Timing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from neurosurgeon.engine.base import NetworkRef, Verdict
    from neurosurgeon.graph.layer_graph import LayerGraph, Node
    from neurosurgeon.graph.spec import Array
    from neurosurgeon.planner.plan import Candidate, SplitPlan
    from neurosurgeon.utils.link import LinkEstimate


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame of a stream: pixels, or the reason why it cannot be read."""

    number: int  # from 1, in the source; dropped frames count
    time_s: float | None  # in the video, or since the camera was opened; None: a file of a directory
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB; of no size with an error
    read_ms: float  # when it was read (`now_ms`)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """One task of the queue."""

    id: int  # from 1, in the order of the list
    model: str
    image: Path | None = None
    arrays: tuple[Array, ...] | None = field(
        default=None, compare=False, repr=False
    )  # its inputs; if both are None, the network's example
    frame: Frame | None = field(default=None, compare=False, repr=False)  # of a stream; its inputs are made of it


class Span(NamedTuple):
    """The start and the end of a stage, ms since the queue started."""

    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of a task: an output, or an error. A failed task has only the fields that were known before."""

    task: QueuedTask
    point: int = 0
    layer: str = "None"
    layers: int = (
        0  # of the whole network: if point == layers, it was planned for the edge alone; 0: it was not planned
    )
    graph: LayerGraph | None = None  # of its network
    rate_bytes_per_s: float = 0.0  # of the uplink, as estimated when the task was planned; 0: unknown
    rate_age_s: float = 0.0
    rate_is_stale: bool = False
    best_total_ms: float = 0.0  # predicted, of the best cut for a single task
    predicted: StageTimes = StageTimes(0.0, 0.0, 0.0)
    measured: StageTimes = StageTimes(0.0, 0.0, 0.0)
    spans: tuple[Span, ...] = ()  # edge, transfer, cloud; the edge's alone if nothing was sent
    elapsed_ms: float = 0.0  # from the start of its edge partition to its result, with all waits
    age_ms: float | None = None  # of a frame: from when it was read to its result
    output_digest: str = ""
    top1: int | None = None
    label: str | None = None  # of that class; None: unknown
    retries: int = 0
    where: str = "split"  # "edge", "cloud" or "split": where its layers ran in the end
    deadline_ms: float | None = None  # None: it has no deadline
    error: str | None = None  # one line; None: it has an output

    @property
    def is_in_reach(self) -> bool:
        """Whether it was predicted to meet its deadline."""
        return self.deadline_ms is None or self.predicted.total_ms <= self.deadline_ms

    @property
    def is_in_time(self) -> bool:
        """Whether it has an output, and met its deadline."""
        return self.is_finished and (self.deadline_ms is None or self.elapsed_ms <= self.deadline_ms)

    @property
    def is_finished(self) -> bool:
        """Whether it has an output."""
        return self.error is None

    @property
    def is_planned(self) -> bool:
        """Whether a partition point was chosen for it."""
        return self.layers > 0

    @property
    def edge_nodes(self) -> frozenset[int]:
        """The nodes of its graph that its cut leaves on the edge."""
        return self.graph.edge_nodes(self.point) if self.graph else frozenset()

    @property
    def boundary(self) -> tuple[Node, ...]:
        """The nodes of its graph whose outputs are the boundary tensors of its cut."""
        return self.graph.boundary(self.edge_nodes) if self.graph and self.point < self.layers else ()

    @property
    def uses_cloud(self) -> bool:
        """Whether anything was sent to the cloud."""
        return self.where != "edge"


@dataclass(frozen=True, slots=True)
class Guess:
    """One class with its probability."""

    index: int
    label: str | None  # None: unknown
    probability: float


# ---------------------------------------------------------------- events of one task, in their order


class LinkKnown(NamedTuple):
    """The link estimate is known: given, or measured."""

    link: LinkEstimate


class LinkReused(NamedTuple):
    """The link is not measured: a kept estimate is used."""

    age_s: float


class LinkNotNeeded(NamedTuple):
    """The link was not measured, because no link can change the plan."""

    plan: SplitPlan
    rtt_ms: float


class Planned(NamedTuple):
    """The task has a plan and a cut: the best one, or the one that the user forced."""

    plan: SplitPlan
    chosen: Candidate


class Prepared(NamedTuple):
    """The cloud has loaded its partition."""


class EdgeComputed(NamedTuple):
    """The edge partition has run."""

    model: str
    edge_ms: float


class Sent(NamedTuple):
    """The boundary tensors are sent: the last byte has been passed to the system."""


class Replied(NamedTuple):
    """The reply of the cloud has arrived."""

    model: str
    times: StageTimes


class Finished(NamedTuple):
    """The first run of the task is done."""


class Answered(NamedTuple):
    """All runs of the task are done."""

    guesses: Sequence[Guess]  # none if the output is no vector of classes
    is_seeded: bool  # the weights are those of the fixed seed
    predicted: StageTimes
    measured: StageTimes
    timings: Mapping[str, Timing]  # of each stage, over the runs
    runs: int
    origins: Mapping[str, str]  # side -> the machine whose data its predictions use
    where: str  # "edge", "cloud" or "split"
    verdict: Verdict | None  # the comparison with the user's own module, with --verify


class Progress(NamedTuple):
    """Long work has advanced: ``done`` of ``total`` steps."""

    name: str
    done: int
    total: int


TaskEvent = (
    LinkReused
    | LinkKnown
    | LinkNotNeeded
    | Planned
    | Prepared
    | EdgeComputed
    | Sent
    | Replied
    | Finished
    | Progress
    | Answered
)
TaskObserver = Callable[[TaskEvent], None]


# ---------------------------------------------------------------- events of a queue


class QueueStarted(NamedTuple):
    """The first task is about to be planned."""

    tasks: Sequence[QueuedTask]


class StreamStarted(NamedTuple):
    """The first frame of a stream is about to be read."""

    network: NetworkRef


class TaskPlanned(NamedTuple):
    """A task is planned for this rate of the link, and this wait in the cloud."""

    rate_bytes_per_s: float
    queue_ms: float


class TaskDone(NamedTuple):
    """A task has its result: an output or an error."""

    result: TaskResult
    output: Any  # of the network: an array, or a tree of arrays; None with an error


QueueEvent = Progress | QueueStarted | StreamStarted | TaskPlanned | TaskDone
QueueObserver = Callable[[QueueEvent], None]
