"""What every source of latencies gives to the planner: a latency for each layer, and how far it is to be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neurosurgeon.utils.errors import PlanningError

COVERAGE = 0.9  # of the intervals
COMMON_ERROR = 0.25  # share of its layers' errors that a network's layers have in common; the rest averages out


class Interval(NamedTuple):
    """Where the true value lies, nine times in ten; ms."""

    low_ms: float
    high_ms: float


MEASURED_ORIGIN = "layers of this network, measured on this machine"


@dataclass(frozen=True, slots=True)
class LayerLatencies:
    """Latencies of a chain's layers on one side, (L,), ms, each with its 90 % interval."""

    latency_ms: Sequence[float]
    low_ms: Sequence[float]
    high_ms: Sequence[float]
    source: str  # linear, forest or measured
    extrapolated: Sequence[str] = ()  # layers unlike all that was measured: their intervals are too narrow
    origin: str = ""  # whose data the predictions come from, for people

    def __post_init__(self) -> None:
        if not len(self.latency_ms) == len(self.low_ms) == len(self.high_ms):
            raise PlanningError("latencies and their intervals differ in number")
        for low, latency, high in zip(self.low_ms, self.latency_ms, self.high_ms, strict=True):
            if not 0 <= low <= latency <= high < math.inf:  # false for NaN, too
                raise PlanningError(f"{low:g}, {latency:g}, {high:g} ms are no latency inside its interval")

    @classmethod
    def measured(cls, latency_ms: Sequence[float], low_ms: Sequence[float], high_ms: Sequence[float]) -> LayerLatencies:
        """Return latencies that were measured on this machine."""
        return cls(latency_ms, low_ms, high_ms, "measured", origin=MEASURED_ORIGIN)

    def total(self, layers: slice = slice(None)) -> float:
        """Return the latency of some layers together, ms."""
        return sum(self.latency_ms[layers])

    def interval(self, layers: slice = slice(None)) -> Interval:
        """Return the interval of some layers together.

        Errors of layers are partly their own, which add up in squares, and partly common to all, which simply add up.
        """
        total = self.total(layers)
        below = [latency - low for latency, low in zip(self.latency_ms[layers], self.low_ms[layers], strict=True)]
        above = [high - latency for latency, high in zip(self.latency_ms[layers], self.high_ms[layers], strict=True)]
        return Interval(max(0.0, total - _joined(below)), total + _joined(above))

    def of(self, layers: Iterable[int]) -> LayerLatencies:
        """Return the latencies of some layers."""
        chosen = list(layers)
        latency, low, high = ([v[layer] for layer in chosen] for v in (self.latency_ms, self.low_ms, self.high_ms))
        return LayerLatencies(latency, low, high, self.source, self.extrapolated, self.origin)

    def scaled(self, factor: float) -> LayerLatencies:
        """Return the same latencies, all times ``factor``."""
        latency, low, high = ([value * factor for value in v] for v in (self.latency_ms, self.low_ms, self.high_ms))
        return LayerLatencies(latency, low, high, self.source, self.extrapolated, self.origin)


def _joined(widths: Sequence[float]) -> float:
    own = math.sqrt((1 - COMMON_ERROR**2) * sum(width * width for width in widths))
    return math.hypot(own, COMMON_ERROR * sum(widths))


@dataclass(frozen=True, slots=True)
class LayerFeature:
    """What the layer study measures of one layer."""

    index: int
    name: str
    kind: str
    output_shape: tuple[int, ...]
    output_bytes: int
    latency_ms: float
    accumulated_ms: float
