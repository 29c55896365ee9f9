"""The model of one kind of layer: rates, trees over them, a calibrated interval, and the range of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FloatArray
from neurosurgeon.predictor.forest import Forest, fit_forest
from neurosurgeon.predictor.get_datasets_func import BoolArray, DataSet
from neurosurgeon.predictor.latencies import COVERAGE

HELD_OUT_EVERY = 8  # rows: the fit never sees these; they calibrate the intervals and give the score
MIN_LATENCY_MS = 1e-4
UNMEASURED = (0.5, 2.0)  # the interval of a kind without data: a guess, and told as one
RANGE_MARGIN = 0.5  # of a feature, which is a logarithm to base 2: by this much a layer may leave the data


class Family(StrEnum):
    """Layers whose speed has the same limit: on another machine they take longer by about the same factor."""

    CONVOLUTION = "convolution"
    POINTWISE = "pointwise"  # convolutions of 1x1: products of matrices
    DEPTHWISE = "depthwise"
    LINEAR = "linear"  # and products of tokens
    MEMORY = "memory"  # all others: they read and write more than they compute


_FAMILIES: Mapping[LayerKind, Family] = {
    LayerKind.CONV: Family.CONVOLUTION,
    LayerKind.WEIGHTED: Family.CONVOLUTION,
    LayerKind.DW_CONV: Family.DEPTHWISE,
    LayerKind.LINEAR: Family.LINEAR,
    LayerKind.MATMUL: Family.LINEAR,
    LayerKind.ATTENTION: Family.LINEAR,
}


def family_of(kind: LayerKind, columns: Mapping[str, float]) -> Family:
    """Return the family of a layer.

    Args: columns: of the layer, as in its data set.
    """
    if kind is LayerKind.CONV and columns.get("kernel") == 1:
        return Family.POINTWISE
    return _FAMILIES.get(kind, Family.MEMORY)


class Scale(NamedTuple):
    """How much longer the layers of a family take on this machine than predicted."""

    factor: float = 1.0
    low: float = 1.0  # measured / (predicted * factor) lies between these two for nine layers in ten
    high: float = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """How well held-out rows of one kind are predicted."""

    rows: int
    mean_error: float  # mean of |predicted - measured| / measured
    within_10: float
    within_20: float

    @classmethod
    def of(cls, predicted_ms: FloatArray, measured_ms: FloatArray) -> Score:
        """Compare predictions with measurements, both (n,)."""
        errors = np.abs(predicted_ms / measured_ms - 1)
        return cls(len(errors), float(errors.mean()), float((errors <= 0.1).mean()), float((errors <= 0.2).mean()))


@dataclass(frozen=True, eq=False)
class KindModel:
    """The model of one kind of layer: rates, trees over them if any, and what is known of its errors."""

    rates: FloatArray  # (features,), ms per feature
    forest: Forest | None
    interval: tuple[float, float]  # the truth lies between these times the prediction, nine times in ten
    low: FloatArray  # (tree features,), smallest and largest in the data
    high: FloatArray

    def predict(self, features: FloatArray, tree_features: FloatArray) -> FloatArray:
        """Return latencies (n,), ms, for the features of both models, (n, features)."""
        linear_ms: FloatArray = np.maximum(features @ self.rates, MIN_LATENCY_MS)
        return linear_ms * np.exp(self.forest.predict(tree_features)) if self.forest else linear_ms

    def for_another_kind(self) -> KindModel:
        """Return the model for layers of a kind without data: the rates alone; each layer is beyond the data."""
        return KindModel(self.rates, None, UNMEASURED, np.array([np.inf]), np.array([-np.inf]))

    def is_beyond(self, tree_features: FloatArray) -> BoolArray:
        """Return for each layer whether a feature leaves the data, (n,)."""
        below, above = self.low - RANGE_MARGIN, self.high + RANGE_MARGIN
        return np.asarray(((tree_features < below) | (tree_features > above)).any(axis=1))


def fit_rates(features: FloatArray, latency_ms: FloatArray) -> FloatArray:
    """Return the non-negative coefficients (features,) that take features (n, features) to latencies (n,), ms.

    A row counts with the inverse square of its latency, so that short layers matter as much as long ones.
    """
    from sklearn.linear_model import LinearRegression

    regression = LinearRegression(positive=True, fit_intercept=False)
    regression.fit(features / latency_ms[:, None], np.ones_like(latency_ms))
    rates: FloatArray = regression.coef_
    return rates


def fit_kind(data: DataSet, *, with_forest: bool) -> tuple[KindModel, Score]:
    """Return the model of one kind, and its score on the rows that it did not see.

    The same rows calibrate its interval: split-conformal prediction (Papadopoulos et al., ECML'02) on the logarithm
    of measured / predicted.
    """
    held = np.arange(len(data)) % HELD_OUT_EVERY == 0
    seen = data.rows(~held)
    rates = fit_rates(seen.features, seen.latency_ms)
    model = KindModel(rates, None, (1.0, 1.0), data.tree_features.min(axis=0), data.tree_features.max(axis=0))
    if with_forest:
        linear_ms = model.predict(seen.features, seen.tree_features)
        trees = fit_forest(seen.tree_features, np.log(seen.latency_ms / linear_ms))
        model = replace(model, forest=trees)
    rest = data.rows(held)
    predicted_ms = model.predict(rest.features, rest.tree_features)
    interval = conformal_interval(np.log(rest.latency_ms / predicted_ms))
    return replace(model, interval=interval), Score.of(predicted_ms, rest.latency_ms)


def conformal_interval(residuals: FloatArray) -> tuple[float, float]:
    """Return the factors that hold a new measured / predicted with probability 0.9, from residuals (n,) of its log."""
    count = len(residuals)
    tail = (1 - COVERAGE) / 2
    rank_low = max(0, int(np.floor(tail * (count + 1))) - 1)
    rank_high = min(count - 1, int(np.ceil((1 - tail) * (count + 1))) - 1)
    ordered = np.sort(residuals)
    return float(min(1.0, np.exp(ordered[rank_low]))), float(max(1.0, np.exp(ordered[rank_high])))
