"""Correct predictions online: the factor by which the stages of a model differ from their prediction here.

Every inference adds a residual, the logarithm of measured / predicted. A decaying mean of the residuals, and of their
squares, is kept for each stage. The next prediction is multiplied by the part of the mean that noise cannot explain.
So a bias is corrected within a few inferences and forgotten as fast, and predictions that are right on average stay
as they are.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neurosurgeon.utils.files import DAMAGED, cache_directory, replace_file

log = logging.getLogger(__name__)

DECAY = 0.2  # weight of the newest residual, after the first few
MAX_LOG_FACTOR = math.log(4.0)  # of a correction; a larger factor means data of another machine
NOISE_WIDTHS = 2.0  # standard errors of the mean that may be noise
MIN_SAMPLES = 3  # fewer have no useful spread
MIN_STAGE_MS = 0.05  # shorter stages are mostly overhead
MAX_KEPT = 512  # stages of models; the least recently used are dropped


@dataclass(frozen=True, slots=True)
class Residuals:
    """Decaying mean and mean square of log(measured / predicted), and the number of samples."""

    mean: float = 0.0
    mean_square: float = 0.0
    samples: int = 0

    def with_sample(self, predicted_ms: float, measured_ms: float) -> Residuals:
        """Return the residuals with one more inference; a stage that hardly ran does not count."""
        if min(predicted_ms, measured_ms) < MIN_STAGE_MS:
            return self
        residual = max(-MAX_LOG_FACTOR, min(MAX_LOG_FACTOR, math.log(measured_ms / predicted_ms)))
        weight = max(DECAY, 1 / (self.samples + 1))
        mean = self.mean + weight * (residual - self.mean)
        mean_square = self.mean_square + weight * (residual * residual - self.mean_square)
        return Residuals(mean, mean_square, self.samples + 1)

    @property
    def factor(self) -> float:
        """The factor for the next prediction; 1 if the mean may be noise.

        The standard error of an exponentially weighted mean is the spread times sqrt(w / (2 - w)) (Roberts, 1959).
        """
        if self.samples < MIN_SAMPLES:
            return 1.0
        weight = max(DECAY, 1 / self.samples)
        spread = math.sqrt(max(0.0, self.mean_square - self.mean * self.mean))
        noise = NOISE_WIDTHS * spread * math.sqrt(weight / (2 - weight))
        return math.exp(math.copysign(max(0.0, abs(self.mean) - noise), self.mean))


class Corrections:
    """The residuals of every stage of every model, kept between runs."""

    def __init__(self, residuals: Mapping[str, Residuals] | None = None) -> None:
        self._residuals = dict(residuals or {})

    @classmethod
    def load(cls) -> Corrections:
        """Return the kept corrections; none if there is no file, or a damaged one."""
        try:
            document = json.loads(_path().read_text())
            return cls({key: _residuals(entry) for key, entry in document.items()})
        except OSError:
            return cls()
        except DAMAGED as exc:
            log.warning("the kept corrections are damaged (%s): starting without corrections", exc)
            return cls()

    def factor(self, key: str) -> float:
        """Return the factor for one stage; 1 if it has no residuals."""
        return self._residuals.get(key, Residuals()).factor

    def learn(self, key: str, predicted_ms: float, measured_ms: float) -> None:
        """Record one inference; ``predicted_ms`` is the prediction without any correction."""
        residuals = self._residuals.pop(key, Residuals()).with_sample(predicted_ms, measured_ms)
        self._residuals[key] = residuals  # the newest are last

    def save(self) -> None:
        """Write the corrections to the cache directory; a failed write is logged."""
        newest = list(self._residuals.items())[-MAX_KEPT:]
        try:
            replace_file(_path(), json.dumps({key: asdict(residuals) for key, residuals in newest}) + "\n")
        except OSError as exc:
            log.warning("the corrections cannot be kept: %s", exc)


def _path() -> Path:
    return cache_directory() / "corrections.json"


def _residuals(entry: Mapping[str, Any]) -> Residuals:
    residuals = Residuals(float(entry["mean"]), float(entry["mean_square"]), int(entry["samples"]))
    if not (abs(residuals.mean) <= MAX_LOG_FACTOR and 0 <= residuals.mean_square < math.inf and residuals.samples >= 0):
        raise ValueError("a correction is out of bounds")
    return residuals
