"""A queue of inference tasks: where they come from, and what became of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from neurosurgeon.models.zoo import ZOO, canonical_name
from neurosurgeon.utils.errors import UsageError
from neurosurgeon.utils.timing import StageTimes, Timing

if TYPE_CHECKING:
    from neurosurgeon.graph.layer_graph import LayerGraph, Node
    from neurosurgeon.planner.plan import Candidate, SplitPlan
    from neurosurgeon.utils.link import LinkEstimate

COMMENT = "#"  # the first character of a line that a task file keeps to itself


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """One task of the queue."""

    id: int  # from 1, in the order of the list
    model: str
    image: Path | None = None  # None: the fixed image of noise


class Span(NamedTuple):
    """When a stage ran, ms since the queue started."""

    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What became of a task. Of one that failed, only what was known before is there."""

    task: QueuedTask
    point: int = 0
    layer: str = "None"
    layers: int = 0  # of the whole network: point == layers ran on the edge alone; 0: it was not planned
    graph: LayerGraph | None = None  # of its network
    rate_bytes_per_s: float = 0.0  # of the uplink, as known when the task was planned; 0: it was not known
    rate_age_s: float = 0.0
    rate_is_stale: bool = False
    best_total_ms: float = 0.0  # predicted, of the best cut for a single task
    predicted: StageTimes = StageTimes(0.0, 0.0, 0.0)
    measured: StageTimes = StageTimes(0.0, 0.0, 0.0)
    spans: tuple[Span, ...] = ()  # edge, transfer, cloud; the edge's alone where nothing crossed
    elapsed_ms: float = 0.0  # from the start of its edge half to its answer, with all that it waited
    output_digest: str = ""
    top1: int | None = None
    retries: int = 0
    where: str = "split"  # "edge", "cloud" or "split": where its layers ran, after a loss of the cloud, too
    deadline_ms: float | None = None  # None: it has no deadline
    error: str | None = None  # one line; None: it has an answer

    @property
    def is_in_reach(self) -> bool:
        """Whether it was predicted to make its deadline."""
        return self.deadline_ms is None or self.predicted.total_ms <= self.deadline_ms

    @property
    def is_in_time(self) -> bool:
        """Whether it has an answer that came within its deadline."""
        return self.is_finished and (self.deadline_ms is None or self.elapsed_ms <= self.deadline_ms)

    @property
    def is_finished(self) -> bool:
        """Whether it has an answer."""
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
    def crossing(self) -> tuple[Node, ...]:
        """The nodes of its graph whose tensors cross at its cut."""
        return self.graph.crossing(self.edge_nodes) if self.graph and self.point < self.layers else ()

    @property
    def crossed(self) -> bool:
        """Whether anything was sent to the cloud."""
        return self.where != "edge"


# ---------------------------------------------------------------- where tasks come from


def draw_tasks(count: int, seed: int | None = None, models: Sequence[str] | None = None) -> list[QueuedTask]:
    """Return ``count`` random tasks over the models (all of the zoo unless given); a seed draws the same again.

    Raises: UnknownModelError.
    """
    names = [canonical_name(name) for name in models or ZOO]
    drawn = np.random.default_rng(seed).integers(len(names), size=count)
    return [QueuedTask(number, names[index]) for number, index in enumerate(drawn, start=1)]


def read_task_file(path: Path) -> list[QueuedTask]:
    """Return the tasks of a file: one a line, a model and maybe an image, whose path starts at the file's directory.

    Blank lines and comments are skipped. Images are not opened: one that cannot be read fails its own task alone.

    Raises: UsageError: it cannot be read, or holds no task. UnknownModelError: names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # -sig: editors on Windows mark their files
    except OSError as exc:
        raise UsageError(f"task file {path} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"task file {path} cannot be read: it is no UTF-8 text") from exc
    tasks: list[QueuedTask] = []
    for number, line in enumerate(lines, start=1):
        words = line.split(maxsplit=1)
        if words and not words[0].startswith(COMMENT):
            tasks.append(_task_of_line(len(tasks) + 1, words, path, number))
    if not tasks:
        raise UsageError(f"task file {path} holds no task: a line is a model and maybe an image, as in: le_net cat.jpg")
    return tasks


def _task_of_line(task_id: int, words: Sequence[str], path: Path, number: int) -> QueuedTask:
    try:
        model = canonical_name(words[0])
    except UsageError as exc:
        raise type(exc)(f"{path}, line {number}: {exc}") from exc
    image = path.parent / words[1].rstrip() if len(words) > 1 else None
    return QueuedTask(task_id, model, image)


def tasks_of_directory(directory: Path, models: Sequence[str]) -> list[QueuedTask]:
    """Return a task for every image of a directory, by name; the models take turns.

    Raises: UsageError: it cannot be listed, or has no image. UnknownModelError.
    """
    names = [canonical_name(name) for name in models]
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as exc:
        raise UsageError(f"image directory {directory} cannot be read: {exc.strerror or exc}") from exc
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    if not images:
        raise UsageError(f"image directory {directory} has no image: put JPEG, PNG or similar files there")
    return [
        QueuedTask(number, model, image)
        for number, (image, model) in enumerate(zip(images, itertools.cycle(names), strict=False), start=1)
    ]


@cache
def image_suffixes() -> frozenset[str]:
    """Return the endings of the files that Pillow reads, in lower case with their dot."""
    from PIL import Image

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


@dataclass(frozen=True, slots=True)
class Guess:
    """One class that a network proposes."""

    index: int
    label: str | None  # None where the weights do not know ImageNet's classes
    probability: float


# ---------------------------------------------------------------- events of one task, in their order


class LinkKnown(NamedTuple):
    """The link is known: given, or measured."""

    link: LinkEstimate


class LinkReused(NamedTuple):
    """The link is not measured: a kept estimate is used."""

    age_s: float


class LinkNotNeeded(NamedTuple):
    """The link was not measured, because no link can change the plan."""

    plan: SplitPlan
    rtt_ms: float


class Planned(NamedTuple):
    """The best cut is known, and the one that is taken, which the user may have forced."""

    plan: SplitPlan
    chosen: Candidate


class Prepared(NamedTuple):
    """The cloud has its partition ready."""


class EdgeComputed(NamedTuple):
    """The edge partition has run."""

    model: str
    edge_ms: float


class Sent(NamedTuple):
    """The cloud accepted the task, and its tensors are being sent."""


class Replied(NamedTuple):
    """The reply of the cloud is here."""

    model: str
    times: StageTimes


class Finished(NamedTuple):
    """The first run of the task is done."""


class Answered(NamedTuple):
    """All runs of the task are done."""

    guesses: Sequence[Guess]  # none where the output is no vector of classes
    is_seeded: bool  # the weights are those of the fixed seed
    predicted: StageTimes
    measured: StageTimes
    timings: Mapping[str, Timing]  # of each stage, over the runs
    runs: int
    origins: Mapping[str, str]  # side -> the machine whose data its predictions use
    where: str  # "edge", "cloud" or "split"
    max_abs_diff: float | None  # to the unsplit network, if that was computed, too


TaskEvent = (
    LinkReused | LinkKnown | LinkNotNeeded | Planned | Prepared | EdgeComputed | Sent | Replied | Finished | Answered
)
TaskObserver = Callable[[TaskEvent], None]
