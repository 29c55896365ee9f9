"""Fit the model of one kind: physical rates, trees, and intervals that cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import FEATURE_NAMES
from neurosurgeon.predictor.get_datasets_func import COLUMNS, csv_path, load_dataset, read_rows
from neurosurgeon.predictor.kind_models import HELD_OUT_EVERY, Score, conformal_interval, fit_kind, fit_rates
from neurosurgeon.predictor.places import default_directory
from neurosurgeon.predictor.predictor_utils import PREDICTORS
from tests.predictor.samples import RATES


def some_features(rows: int = 200) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(0).uniform(0.01, 2.0, (rows, len(FEATURE_NAMES)))


def test_fit_rates_recovers_the_rates_of_the_data() -> None:
    features = some_features()
    np.testing.assert_allclose(fit_rates(features, features @ RATES), RATES, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=8, max_size=30), st.integers(0, 2**32 - 1))
def test_fit_rates_is_never_negative(latencies_ms: list[float], seed: int) -> None:
    features = np.random.default_rng(seed).uniform(0, 10, (len(latencies_ms), len(FEATURE_NAMES)))
    assert (fit_rates(features, np.array(latencies_ms)) >= 0).all()


def test_fit_rates_minimises_the_relative_error() -> None:
    calls = np.array([[1.0], [1.0]])
    rate = fit_rates(calls, np.array([1.0, 100.0]))[0]
    assert rate < 3  # the relative error of the short one; a plain mean would be 50


@pytest.mark.parametrize("name", PREDICTORS)
def test_fit_kind_predicts_a_simple_law(tmp_path: Path, name: str) -> None:
    data = load_dataset(write_linear_law(tmp_path), LayerKind.LINEAR)
    model, score = fit_kind(data, with_forest=name == "forest")
    assert score.rows == pytest.approx(len(data) / 8, abs=1)
    assert score.mean_error < 0.05
    assert score.within_20 >= score.within_10 > 0.9
    assert 0.8 < model.interval[0] <= 1 <= model.interval[1] < 1.25


def write_linear_law(directory: Path, rows: int = 400) -> Path:
    """Write a data set of linear layers whose latency is 0.01 ms and 1 ms for each million weights."""
    rng = np.random.default_rng(5)
    lines = ["in_features,out_features,FLOPs,latency"]
    for _ in range(rows):
        inputs, outputs = (int(2 ** rng.uniform(4, 11)) for _ in range(2))
        lines.append(f"{inputs},{outputs},{2 * inputs * outputs},{0.01 + inputs * outputs / 1e6:.6f}")
    (directory / "linear_lat.csv").write_text("\n".join(lines) + "\n")
    return directory


def test_a_conformal_interval_covers_nine_in_ten() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(300):
        low, high = conformal_interval(rng.normal(0, 0.2, 60))
        covered.append(np.mean([low <= np.exp(value) <= high for value in rng.normal(0, 0.2, 200)]))
    assert 0.88 < np.mean(covered) < 0.95


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50))
def test_an_interval_holds_its_prediction(residuals: list[float]) -> None:
    low, high = conformal_interval(np.array(residuals))
    assert 0 < low <= 1 <= high


CONTRACT_KINDS = (LayerKind.CONV, LayerKind.DW_CONV, LayerKind.LINEAR, LayerKind.MAXPOOL, LayerKind.BATCHNORM)


@pytest.mark.parametrize("kind", CONTRACT_KINDS)
def test_the_forest_is_no_worse_than_plain_boosting_on_any_file(tmp_path: Path, kind: LayerKind) -> None:
    """The shipped rows with just the contract's columns, rounded to 3 decimals, against untuned boosting on logs."""
    rows = read_rows(csv_path(default_directory("edge", "cpu"), kind), kind)
    names = COLUMNS[kind]
    kept = [{name: row[name] for name in names} for row in rows if round(row["latency"], 3) > 0][:3000]
    ours, plain = [], []
    for turn in range(3):  # other rows are held out every time: a single turn is down to chance
        turned = kept[turn:] + kept[:turn]
        lines = [",".join(names), *(",".join(f"{row[name]:.3f}" for name in names) for row in turned)]
        (tmp_path / f"{kind}_lat.csv").write_text("\n".join(lines) + "\n")
        ours.append(fit_kind(load_dataset(tmp_path, kind), with_forest=True)[1].within_20)
        plain.append(plain_boosting(turned, names).within_20)
    assert sum(ours) >= sum(plain), (ours, plain)


def plain_boosting(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Score:
    """Return how well untuned boosting on the logarithms of the columns predicts the rows that fits hold out."""
    inputs = np.log1p(np.array([[row[name] for name in names[:-1]] for row in rows]))
    latency_ms = np.array([round(row["latency"], 3) for row in rows])
    held = np.arange(len(rows)) % HELD_OUT_EVERY == 0
    with threadpool_limits(1, "openmp"):
        boosting = HistGradientBoostingRegressor(random_state=0).fit(inputs[~held], np.log(latency_ms[~held]))
    return Score.of(np.exp(boosting.predict(inputs[held])), latency_ms[held])
