"""Compute features in their order and units, with separate ones beyond the caches."""

from __future__ import annotations

import numpy as np
import pytest

from neurosurgeon.predictor.features import FEATURE_NAMES, feature_matrix
from neurosurgeon.predictor.kernel_flops import Work


def features_of(work: Work) -> dict[str, float]:
    return dict(zip(FEATURE_NAMES, feature_matrix([work])[0].tolist(), strict=True))


def test_features_are_calls_gflops_megabytes_and_megapixels() -> None:
    features = features_of(Work(2e9, 400_000, 640_000, 3_000_000, 16))
    assert features["calls"] == 1
    assert features["vector_gflops"] == 2
    assert (features["input_mb"], features["output_mb"], features["weight_mb"]) == (0.4, 0.64, 3.0)
    assert features["output_mpixels"] == pytest.approx(0.01)


def test_traffic_beyond_the_caches_has_features_of_its_own() -> None:
    near = features_of(Work(1, 400_000, 500_000, 15_000_000, 16))
    assert (near["far_weight_mb"], near["far_activation_mb"]) == (0, 0)
    far = features_of(Work(1, 1_000_000, 500_000, 18_000_000, 16))
    assert (far["far_weight_mb"], far["far_activation_mb"]) == (2.0, 0.5)


def test_a_partly_filled_vector_costs_a_whole_one() -> None:
    full, partial = (features_of(Work(1e9 * channels, 0, 0, 0, channels)) for channels in (16, 4))
    assert partial["vector_gflops"] == full["vector_gflops"]


def test_no_layers_have_no_features() -> None:
    assert feature_matrix([]).shape == (0, len(FEATURE_NAMES))


def test_a_layer_without_channels_is_finite() -> None:
    assert np.isfinite(feature_matrix([Work(0, 0, 0, 0, 0)])).all()
