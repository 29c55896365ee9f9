"""Fit and apply the model of one kind of layer: rates, trees over them, and a calibrated interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FloatArray
from neurosurgeon.predictor.forest import Forest, fit_forest
from neurosurgeon.predictor.get_datasets_func import BoolArray, DataSet
from neurosurgeon.predictor.latencies import COVERAGE

HELD_OUT_EVERY = 8  # rows: every eighth is not fitted, but calibrates the interval and gives the score
MIN_LATENCY_MS = 1e-4
UNMEASURED_INTERVAL = (0.5, 2.0)  # of a kind without data: a guess, and its layers are reported as extrapolated
RANGE_MARGIN = 0.5  # a feature, a logarithm to base 2, may lie this far outside the data before it is reported


class Family(StrEnum):
    """Layers whose speed has the same limit, so that it differs between machines by about the same factor."""

    CONVOLUTION = "convolution"
    POINTWISE = "pointwise"  # convolutions of 1x1: matrix products
    DEPTHWISE = "depthwise"
    LINEAR = "linear"  # and matrix products of tokens
    MEMORY = "memory"  # all others: limited by memory traffic


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

    Args: columns: the layer's values, by the column names of its data set.
    """
    if kind is LayerKind.CONV and columns.get("kernel") == 1:
        return Family.POINTWISE
    return _FAMILIES.get(kind, Family.MEMORY)


class Scale(NamedTuple):
    """Measured / predicted latency of the layers of a family on this machine."""

    factor: float = 1.0
    low: float = 1.0  # measured / (predicted * factor) lies between low and high for nine layers in ten
    high: float = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """The errors of the predictions for held-out rows of one kind."""

    rows: int
    mean_error: float  # mean of |predicted - measured| / measured
    within_10: float  # share of rows with an error of at most 10 %
    within_20: float

    @classmethod
    def of(cls, predicted_ms: FloatArray, measured_ms: FloatArray) -> Score:
        """Return the errors of predictions (n,) against measurements (n,), both in ms."""
        errors = np.abs(predicted_ms / measured_ms - 1)
        return cls(len(errors), float(errors.mean()), float((errors <= 0.1).mean()), float((errors <= 0.2).mean()))


@dataclass(frozen=True, eq=False)
class KindModel:
    """The model of one kind of layer: rates, trees over them if any, its interval, and the range of its data."""

    rates: FloatArray  # (features,), ms per feature
    forest: Forest | None
    interval: tuple[float, float]  # nine times in ten, measured / predicted lies between these
    low: FloatArray  # (tree features,), smallest in the data
    high: FloatArray  # (tree features,), largest in the data

    def predict(self, features: FloatArray, tree_features: FloatArray) -> FloatArray:
        """Return latencies (n,), ms, for the features of both models, (n, features)."""
        linear_ms: FloatArray = np.maximum(features @ self.rates, MIN_LATENCY_MS)
        return linear_ms * np.exp(self.forest.predict(tree_features)) if self.forest else linear_ms

    def for_similar_kind(self) -> KindModel:
        """Return the model for layers of a kind without data: the rates alone; every layer is an extrapolation."""
        return KindModel(self.rates, None, UNMEASURED_INTERVAL, np.array([np.inf]), np.array([-np.inf]))

    def extrapolates(self, tree_features: FloatArray) -> BoolArray:
        """Return for each layer whether a feature lies outside the range of the data, (n,)."""
        below, above = self.low - RANGE_MARGIN, self.high + RANGE_MARGIN
        return np.asarray(((tree_features < below) | (tree_features > above)).any(axis=1))


def fit_rates(features: FloatArray, latency_ms: FloatArray) -> FloatArray:
    """Return the non-negative coefficients (features,) that take features (n, features) to latencies (n,), ms.

    A row is weighted by the inverse square of its latency, so that the relative error is minimised: short layers
    matter as much as long ones.
    """
    from sklearn.linear_model import LinearRegression

    regression = LinearRegression(positive=True, fit_intercept=False)
    regression.fit(features / latency_ms[:, None], np.ones_like(latency_ms))
    rates: FloatArray = regression.coef_
    return rates


def fit_model(data: DataSet, fit_trees: Callable[[FloatArray, FloatArray], Any] | None) -> KindModel:
    """Return the model of all rows of one kind, its interval not yet calibrated.

    Args: fit_trees: takes features (n, features) and the log of measured / linear (n,), and returns fitted trees.
    """
    low, high = data.tree_features.min(axis=0), data.tree_features.max(axis=0)
    model = KindModel(fit_rates(data.features, data.latency_ms), None, (1.0, 1.0), low, high)
    if fit_trees is None:
        return model
    linear_ms = model.predict(data.features, data.tree_features)
    return replace(model, forest=fit_trees(data.tree_features, np.log(data.latency_ms / linear_ms)))


def fit_kind(data: DataSet, *, with_forest: bool) -> tuple[KindModel, Score]:
    """Return the model of one kind, and its score on the held-out rows.

    The same rows calibrate its interval: split-conformal prediction (Papadopoulos et al., ECML'02) on the logarithm
    of measured / predicted.
    """
    held_out = np.arange(len(data)) % HELD_OUT_EVERY == 0
    model = fit_model(data.rows(~held_out), fit_forest if with_forest else None)
    rest = data.rows(held_out)
    predicted_ms = model.predict(rest.features, rest.tree_features)
    interval = conformal_interval(np.log(rest.latency_ms / predicted_ms))
    low, high = data.tree_features.min(axis=0), data.tree_features.max(axis=0)
    return replace(model, interval=interval, low=low, high=high), Score.of(predicted_ms, rest.latency_ms)


def conformal_interval(residuals: FloatArray) -> tuple[float, float]:
    """Return the two factors between which a new measured / predicted lies with probability 0.9.

    Args: residuals: log of measured / predicted of rows that were not fitted, (n,).
    """
    count = len(residuals)
    tail = (1 - COVERAGE) / 2
    rank_low = max(0, int(np.floor(tail * (count + 1))) - 1)
    rank_high = min(count - 1, int(np.ceil((1 - tail) * (count + 1))) - 1)
    ordered = np.sort(residuals)
    return float(min(1.0, np.exp(ordered[rank_low]))), float(max(1.0, np.exp(ordered[rank_high])))
