"""A queue of inference tasks: where they come from, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.timing import StageTimes


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """One task of the queue."""

    id: int  # from 1, in the order of the list
    model: str
    image: Path | None = None  # None: the fixed random input


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
    layers: int = 0  # of the whole network: point == layers ran on the edge alone
    rate_bytes_per_s: float = 0.0  # of the uplink, as known when the task was planned
    rate_age_s: float = 0.0
    rate_is_stale: bool = False
    best_total_ms: float = 0.0  # predicted, of the best cut for a single task
    predicted: StageTimes = StageTimes(0.0, 0.0, 0.0)
    measured: StageTimes = StageTimes(0.0, 0.0, 0.0)
    spans: tuple[Span, ...] = ()  # edge, transfer, cloud; the edge's alone where nothing crossed
    output_digest: str = ""
    top1: int | None = None
    retries: int = 0
    where: str = "split"  # "edge", "cloud" or "split": where its layers ran
    error: str | None = None  # one line; None: it has an answer
