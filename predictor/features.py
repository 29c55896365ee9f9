"""The one definition of the features, used to fit and to predict.

A layer's time is a fixed cost, plus arithmetic, plus memory traffic, plus a cost per window: every coefficient is a
physical rate, so none may be negative. Traffic that leaves the caches has a rate of its own; arithmetic runs over
whole vectors of channels. Units keep the coefficients near ms: GFLOP, MB, millions of positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from predictor.kernel_flops import FLOAT_BYTES, Work
from utils.units import bytes_to_mb

FEATURE_NAMES = (
    "calls",
    "vector_gflops",
    "input_mb",
    "output_mb",
    "weight_mb",
    "far_weight_mb",
    "far_activation_mb",
    "output_mpixels",
)
VECTOR_FLOATS = 16  # channels that one vector instruction handles (AVX-512; two NEON or AVX2 steps)
NEAR_WEIGHT_MB = 16.0  # about what a shared last-level cache keeps of a layer's weights between two runs
NEAR_ACTIVATION_MB = 1.0  # about a core's own cache

FloatArray = NDArray[np.float64]


def feature_matrix(works: Sequence[Work]) -> FloatArray:
    """Return the features of layers, (n, 8), in the order of ``FEATURE_NAMES``."""
    rows = [_features(work) for work in works]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(FEATURE_NAMES))


def _features(work: Work) -> tuple[float, ...]:
    channels = max(work.output_channels, 1)
    vector_fill = channels / (math.ceil(channels / VECTOR_FLOATS) * VECTOR_FLOATS)
    input_mb, output_mb = bytes_to_mb(work.input_bytes), bytes_to_mb(work.output_bytes)
    weight_mb = bytes_to_mb(work.weight_bytes)
    return (
        1.0,
        work.flops / 1e9 / vector_fill,
        input_mb,
        output_mb,
        weight_mb,
        max(weight_mb - NEAR_WEIGHT_MB, 0.0),
        max(input_mb + output_mb - NEAR_ACTIVATION_MB, 0.0),
        output_mb / FLOAT_BYTES / channels,
    )
