"""Durations on one machine's monotonic clock, and repeated measurements of a function."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neurosurgeon.utils.units import MS_PER_S

WARMUP_RUNS = 2  # the first runs build kernels and touch memory
MIN_SAMPLE_MS = 0.2  # a sample shorter than this is dominated by the clock's own cost


def now_ms() -> float:
    """Return a monotonic time in ms; only differences within one process mean anything."""
    return time.perf_counter() * MS_PER_S


def thread_ms() -> float:
    """Return for how long this thread has computed, ms: not while others had its core. It takes a microsecond."""
    return time.thread_time() * MS_PER_S


def synchronise(device: str) -> None:
    """Wait until ``device`` has finished what it was given; the CPU always has."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


class StageTimes(NamedTuple):
    """What one split inference takes, predicted or measured, in ms."""

    edge_ms: float
    transfer_ms: float
    cloud_ms: float

    @property
    def total_ms(self) -> float:
        """The three stages, one after another."""
        return self.edge_ms + self.transfer_ms + self.cloud_ms

    @property
    def beyond_edge(self) -> StageTimes:
        """What is left once the edge's half has run."""
        return StageTimes(0.0, self.transfer_ms, self.cloud_ms)

    @property
    def longest_ms(self) -> float:
        """The stage that takes longest."""
        return max(self.edge_ms, self.transfer_ms, self.cloud_ms)

    def as_dict(self) -> dict[str, float]:
        """Return the four numbers under the names of the JSON interface."""
        return {name: getattr(self, name) for name in STAGE_NAMES}


STAGE_NAMES = ("edge_ms", "transfer_ms", "cloud_ms", "total_ms")


@dataclass(frozen=True, slots=True)
class Timing:
    """Repeated measurements of one duration, in ms."""

    median_ms: float
    min_ms: float
    max_ms: float
    iqr_ms: float
    samples: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """Summarise at least one sample."""
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


def measure(
    function: Callable[[], object],
    device: str = "cpu",
    *,
    min_samples: int = 5,
    budget_ms: float = 30.0,
) -> Timing:
    """Time ``function`` until both ``min_samples`` samples and ``budget_ms`` are reached.

    Functions shorter than a fifth of a millisecond are called several times a sample.
    """
    for _ in range(WARMUP_RUNS):
        function()
    synchronise(device)
    once_ms = _timed_calls(function, 1, device)
    calls = max(1, round(MIN_SAMPLE_MS / max(once_ms, 1e-4)))
    samples_ms: list[float] = []
    spent_ms = 0.0
    while len(samples_ms) < min_samples or spent_ms < budget_ms:
        sample_ms = _timed_calls(function, calls, device)
        samples_ms.append(sample_ms / calls)
        spent_ms += sample_ms
    return Timing.of(samples_ms)


def _timed_calls(function: Callable[[], object], calls: int, device: str) -> float:
    start_ms = now_ms()
    for _ in range(calls):
        function()
    synchronise(device)
    return now_ms() - start_ms


def stage_timings(runs: Sequence[StageTimes]) -> dict[str, Timing]:
    """Return median and spread of every stage over repeated runs."""
    return {name: Timing.of([getattr(run, name) for run in runs]) for name in STAGE_NAMES}
