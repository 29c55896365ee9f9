"""Durations on one machine's monotonic clock, and summaries of repeated ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neurosurgeon.utils.units import MS_PER_S


def now_ms() -> float:
    """Return a monotonic time, ms; only differences within one process are meaningful."""
    return time.perf_counter() * MS_PER_S


def thread_ms() -> float:
    """Return the CPU time of this thread, ms; other threads do not lengthen it. A call takes a microsecond."""
    return time.thread_time() * MS_PER_S


class StageTimes(NamedTuple):
    """The predicted or measured durations of one split inference, ms."""

    edge_ms: float
    transfer_ms: float
    cloud_ms: float

    @property
    def total_ms(self) -> float:
        """The sum of the three stages, ms."""
        return self.edge_ms + self.transfer_ms + self.cloud_ms

    @property
    def beyond_edge(self) -> StageTimes:
        """The stages after the edge partition has run."""
        return StageTimes(0.0, self.transfer_ms, self.cloud_ms)

    @property
    def longest_ms(self) -> float:
        """The duration of the longest stage, ms."""
        return max(self.edge_ms, self.transfer_ms, self.cloud_ms)

    def as_dict(self) -> dict[str, float]:
        """Return the stages and their total, ms, by the names of the JSON interface."""
        return {name: getattr(self, name) for name in STAGE_NAMES}


STAGE_NAMES = ("edge_ms", "transfer_ms", "cloud_ms", "total_ms")


@dataclass(frozen=True, slots=True)
class Timing:
    """The summary of repeated measurements of one duration, ms."""

    median_ms: float
    min_ms: float
    max_ms: float
    iqr_ms: float
    samples: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """Return the summary of samples, at least one, ms."""
        if len(samples_ms) > 1:
            quartiles = statistics.quantiles(samples_ms, n=4, method="inclusive")
        else:
            quartiles = [samples_ms[0]] * 3
        return cls(
            median_ms=statistics.median(samples_ms),
            min_ms=min(samples_ms),
            max_ms=max(samples_ms),
            iqr_ms=quartiles[2] - quartiles[0],
            samples=len(samples_ms),
        )


def stage_timings(runs: Sequence[StageTimes]) -> dict[str, Timing]:
    """Return the summary of every stage over repeated runs, by its name."""
    return {name: Timing.of([getattr(run, name) for run in runs]) for name in STAGE_NAMES}
