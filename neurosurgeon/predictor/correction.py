"""Learning from use: how much longer, or shorter, the stages of a model take here than predicted.

Every inference leaves its residual, the logarithm of measured / predicted. A decaying mean of them, and of their
squares, is kept for each stage; the next prediction is multiplied by the part of the mean that noise cannot explain.
So a bias is learnt within a few inferences and forgotten as fast, and where predictions are right on average, they
stay as they are.
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

DECAY = 0.2  # weight of the newest residual, once there are several
MAX_LOG_FACTOR = math.log(4.0)  # a correction is bounded: beyond, the predictor is for another machine
NOISE_WIDTHS = 2.0  # standard errors of the mean that are taken for noise
MIN_SAMPLES = 3  # no spread is known before
MIN_STAGE_MS = 0.05  # shorter stages are all overhead
MAX_KEPT = 512  # stages of models; the oldest go


@dataclass(frozen=True, slots=True)
class Residuals:
    """Decaying mean and mean square of log(measured / predicted), and how many there were."""

    mean: float = 0.0
    mean_square: float = 0.0
    samples: int = 0

    def with_sample(self, predicted_ms: float, measured_ms: float) -> Residuals:
        """Return the residuals after one more inference."""
        if min(predicted_ms, measured_ms) < MIN_STAGE_MS:
            return self
        residual = max(-MAX_LOG_FACTOR, min(MAX_LOG_FACTOR, math.log(measured_ms / predicted_ms)))
        weight = max(DECAY, 1 / (self.samples + 1))
        mean = self.mean + weight * (residual - self.mean)
        mean_square = self.mean_square + weight * (residual * residual - self.mean_square)
        return Residuals(mean, mean_square, self.samples + 1)

    @property
    def factor(self) -> float:
        """What to multiply the next prediction by; 1 where the mean may be noise.

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
        self._factors: dict[str, float] = {}  # those that were asked for, until they change

    @classmethod
    def load(cls) -> Corrections:
        """Return what was kept; nothing where there is no file, or a damaged one."""
        try:
            document = json.loads(_path().read_text())
            return cls({key: _residuals(entry) for key, entry in document.items()})
        except OSError:
            return cls()
        except DAMAGED as exc:
            log.warning("what was learnt from use is damaged (%s): learning anew", exc)
            return cls()

    def factor(self, key: str) -> float:
        """Return the factor for one stage; 1 where nothing is known."""
        known = self._factors.get(key)
        if known is None:
            known = self._factors[key] = self._residuals.get(key, Residuals()).factor
        return known

    def learn(self, key: str, predicted_ms: float, measured_ms: float) -> None:
        """Take in one inference; ``predicted_ms`` is the prediction without any correction."""
        residuals = self._residuals.pop(key, Residuals()).with_sample(predicted_ms, measured_ms)
        self._residuals[key] = residuals  # the newest are last
        self._factors.pop(key, None)

    def save(self) -> None:
        """Keep everything; a cache that cannot be written is only a pity."""
        newest = list(self._residuals.items())[-MAX_KEPT:]
        try:
            replace_file(_path(), json.dumps({key: asdict(residuals) for key, residuals in newest}) + "\n")
        except OSError as exc:
            log.warning("what was learnt from use cannot be kept: %s", exc)


def _path() -> Path:
    return cache_directory() / "corrections.json"


def _residuals(entry: Mapping[str, Any]) -> Residuals:
    residuals = Residuals(float(entry["mean"]), float(entry["mean_square"]), int(entry["samples"]))
    if not (abs(residuals.mean) <= MAX_LOG_FACTOR and 0 <= residuals.mean_square < math.inf and residuals.samples >= 0):
        raise ValueError("a correction is out of bounds")
    return residuals
