"""Predict with trees in plain arrays the same numbers as the library that fitted them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor

from neurosurgeon.predictor import forest
from neurosurgeon.predictor.forest import fit_forest


@pytest.mark.parametrize(("rows", "features"), [(4, 1), (50, 3), (2000, 7)])
def test_arrays_predict_the_same_as_the_library(rows: int, features: int) -> None:
    rng = np.random.default_rng(rows)
    inputs = rng.uniform(-1, 1, (rows, features))
    targets = np.sin(3 * inputs[:, 0]) + inputs.sum(axis=1) ** 2
    fresh = rng.uniform(-1.5, 1.5, (200, features))
    library = HistGradientBoostingRegressor(
        max_iter=forest.FEW_ROUNDS,
        learning_rate=forest.FEW_RATE,
        max_leaf_nodes=forest.LEAVES,
        min_samples_leaf=min(forest.MIN_LEAF_ROWS, max(1, rows // 4)),
        l2_regularization=forest.L2_PENALTY,
        early_stopping=False,
        random_state=forest.TREE_SEED,
    ).fit(inputs, targets)
    np.testing.assert_allclose(fit_forest(inputs, targets).predict(fresh), library.predict(fresh), atol=1e-9)


def test_a_forest_predicts_no_rows() -> None:
    inputs = np.random.default_rng(0).uniform(size=(30, 2))
    assert fit_forest(inputs, inputs[:, 0]).predict(np.zeros((0, 2))).shape == (0,)


def test_fit_forest_of_equal_targets_predicts_them() -> None:
    inputs = np.random.default_rng(0).uniform(size=(30, 2))
    np.testing.assert_allclose(fit_forest(inputs, np.full(30, 2.5)).predict(inputs), 2.5)
