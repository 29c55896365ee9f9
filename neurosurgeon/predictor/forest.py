"""Boosted regression trees over the linear model, as plain arrays: fitted by scikit-learn, applied by numpy.

The trees predict the logarithm of measured / linear prediction. So they need not learn that twice the work takes twice
the time, and outside the data the linear model extrapolates, which trees cannot. Fitted trees are numbers in arrays:
they are stored without pickle, and a device that only predicts never imports scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.predictor.features import FloatArray

ROUNDS, LEARNING_RATE = 300, 0.06  # of boosting; see `python -m predictor.evaluate --compare`
FEW_ROWS = 3000  # up to this many rows are fitted in fewer, larger steps
FEW_ROUNDS, FEW_RATE = 120, 0.12
LEAVES = 31
L2_PENALTY = 1.0
MIN_LEAF_ROWS = 8
TREE_SEED = 0
ARRAY_NAMES = ("feature", "threshold", "left", "right", "value", "roots")

IntArray = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees whose values are added. A leaf is its own child, so that all rows take the same number of steps."""

    feature: IntArray  # (nodes,) index of the compared feature
    threshold: FloatArray  # (nodes,) a row with at most this value goes left
    left: IntArray  # (nodes,)
    right: IntArray  # (nodes,)
    value: FloatArray  # (nodes,) of leaves; 0 elsewhere
    roots: IntArray  # (trees,)
    baseline: float

    def predict(self, features: FloatArray) -> FloatArray:
        """Return the sum over all trees, (n,), for features (n, features)."""
        at = np.repeat(self.roots[None, :], len(features), axis=0)  # (n, trees)
        rows = np.arange(len(features))[:, None]
        for _ in range(self._depth):
            goes_left = features[rows, self.feature[at]] <= self.threshold[at]
            at = np.where(goes_left, self.left[at], self.right[at])
        total: FloatArray = self.baseline + self.value[at].sum(axis=1)
        return total

    @cached_property
    def _depth(self) -> int:
        """The number of steps from a root to its farthest leaf."""
        at, depth = self.roots, 0
        while True:
            inner = at[self.left[at] != at]
            if not len(inner):
                return depth
            at, depth = np.concatenate([self.left[inner], self.right[inner]]), depth + 1


def fit_forest(features: FloatArray, targets: FloatArray) -> Forest:
    """Return boosted trees fitted to features (n, features) and targets (n,).

    Source: histogram-based gradient boosting (LightGBM, NeurIPS'17), as implemented in scikit-learn.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    rounds, rate = (ROUNDS, LEARNING_RATE) if len(targets) > FEW_ROWS else (FEW_ROUNDS, FEW_RATE)
    regressor = HistGradientBoostingRegressor(
        max_iter=rounds,
        learning_rate=rate,
        max_leaf_nodes=LEAVES,
        min_samples_leaf=min(MIN_LEAF_ROWS, max(1, len(targets) // 4)),
        l2_regularization=L2_PENALTY,
        early_stopping=False,
        random_state=TREE_SEED,
    )
    with threadpool_limits(1, "openmp"):  # a second team beside torch's makes both wait: 70 s instead of 3
        regressor.fit(features, targets)
    trees = [predictors[0].nodes for predictors in regressor._predictors]  # scikit-learn has no public view of them
    starts = np.cumsum([0, *map(len, trees)])
    nodes = np.concatenate(trees)
    offset = np.repeat(starts[:-1], np.diff(starts))
    is_leaf = nodes["is_leaf"].astype(bool)
    own = np.arange(len(nodes))
    return Forest(
        feature=np.where(is_leaf, 0, nodes["feature_idx"]).astype(np.int32),
        threshold=np.where(is_leaf, 0.0, nodes["num_threshold"]),
        left=np.where(is_leaf, own, nodes["left"] + offset).astype(np.int32),
        right=np.where(is_leaf, own, nodes["right"] + offset).astype(np.int32),
        value=np.where(is_leaf, nodes["value"], 0.0),
        roots=starts[:-1].astype(np.int32),
        baseline=float(np.ravel(regressor._baseline_prediction)[0]),
    )
