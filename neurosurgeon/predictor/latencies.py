"""The latencies of a network's layers as the planner reads them, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neurosurgeon.utils.errors import PlanningError

COVERAGE = 0.9  # probability that the true value lies in the interval
COMMON_ERROR = 0.25  # share of the errors that all layers of a network have in common; the rest averages out


class Interval(NamedTuple):
    """The bounds of the true value, ms; it lies between them nine times in ten."""

    low_ms: float
    high_ms: float


MEASURED_ORIGIN = "layers of this network, measured on this machine"


@dataclass(frozen=True, slots=True)
class LayerLatencies:
    """Latencies of a network's layers on one side, (layers,), ms, each with its 90 % interval."""

    latency_ms: Sequence[float]
    low_ms: Sequence[float]
    high_ms: Sequence[float]
    source: str  # linear, forest or measured
    extrapolated: Sequence[str] = ()  # names of layers outside the measured range: their intervals are too narrow
    origin: str = ""  # the machine of the data and its scaling, for people

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
        """Return the sum of the latencies of some layers, ms."""
        return sum(self.latency_ms[layers])

    def interval(self, layers: slice = slice(None)) -> Interval:
        """Return the interval of the sum of some layers, ms.

        Errors of single layers add up in squares; errors that the layers have in common add up linearly.
        """
        total = self.total(layers)
        below = [latency - low for latency, low in zip(self.latency_ms[layers], self.low_ms[layers], strict=True)]
        above = [high - latency for latency, high in zip(self.latency_ms[layers], self.high_ms[layers], strict=True)]
        return Interval(max(0.0, total - _combined_width(below)), total + _combined_width(above))

    def of(self, layers: Iterable[int]) -> LayerLatencies:
        """Return the latencies of the layers with these indices."""
        chosen = list(layers)
        latency, low, high = ([v[layer] for layer in chosen] for v in (self.latency_ms, self.low_ms, self.high_ms))
        return LayerLatencies(latency, low, high, self.source, self.extrapolated, self.origin)

    def scaled(self, factor: float) -> LayerLatencies:
        """Return the latencies multiplied by a factor."""
        latency, low, high = ([value * factor for value in v] for v in (self.latency_ms, self.low_ms, self.high_ms))
        return LayerLatencies(latency, low, high, self.source, self.extrapolated, self.origin)


def _combined_width(widths: Sequence[float]) -> float:
    own = math.sqrt((1 - COMMON_ERROR**2) * sum(width * width for width in widths))
    return math.hypot(own, COMMON_ERROR * sum(widths))


@dataclass(frozen=True, slots=True)
class LayerFeature:
    """One row of the layer study."""

    index: int
    name: str
    kind: str
    output_shape: tuple[int, ...]
    output_bytes: int
    latency_ms: float
    accumulated_ms: float
