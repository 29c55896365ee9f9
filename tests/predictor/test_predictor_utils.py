"""Fitting, saving and applying predictors: physical rates, whole files, and a price for every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.graph import trace
from models.operations import LayerKind
from models.zoo import ZOO, model_graph
from predictor import predictor_utils
from predictor.features import FEATURE_NAMES, feature_matrix
from predictor.kernel_flops import node_work
from predictor.predictor_utils import (
    SIDES,
    LatencyPredictor,
    Score,
    config_path,
    fit_and_save,
    fit_directory,
    fit_rates,
    load_predictor,
    save_predictor,
    score_held_out,
)
from utils.errors import DataSetError, MissingPredictorError

RATES = np.array([0.01, 5.0, 0.1, 0.2, 0.05, 0.3, 0.0, 1.5])
ONES = np.ones(len(FEATURE_NAMES))


def some_features(rows: int = 200) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(0).uniform(0.01, 2.0, (rows, len(FEATURE_NAMES)))


# ---------------------------------------------------------------- fitting


def test_fitting_recovers_the_rates_that_made_the_data() -> None:
    features = some_features()
    np.testing.assert_allclose(fit_rates(features, features @ RATES), RATES, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=8, max_size=30), st.integers(0, 2**32 - 1))
def test_rates_are_never_negative(latencies_ms: list[float], seed: int) -> None:
    features = np.random.default_rng(seed).uniform(0, 10, (len(latencies_ms), len(FEATURE_NAMES)))
    assert (fit_rates(features, np.array(latencies_ms)) >= 0).all()


def test_short_layers_count_as_much_as_long_ones() -> None:
    calls = np.array([[1.0], [1.0]])
    rate = fit_rates(calls, np.array([1.0, 100.0]))[0]
    assert rate < 3  # the relative error of the short one; a plain mean would be 50


def test_rows_that_the_fit_did_not_see_are_scored() -> None:
    features = some_features(50)
    exact = score_held_out(features, features @ RATES)
    assert (exact.rows, exact.within_10, exact.within_20) == (50, 1.0, 1.0)
    assert exact.mean_error == pytest.approx(0, abs=1e-9)
    noise = np.random.default_rng(1).uniform(0.5, 2.0, 50)
    assert score_held_out(features, features @ RATES * noise).mean_error > 0.1


def test_a_directory_without_data_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r"no data sets in .*predictor\.collect"):
        fit_directory(tmp_path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A directory with one small data set."""
    rows = [f"{n},{n % 7 + 1},{n / 100}" for n in range(1, 31)]
    (tmp_path / "batchnorm_lat.csv").write_text("\n".join(["HW,Cin,latency", *rows]) + "\n")
    return tmp_path


def test_fitting_a_directory_writes_a_file_that_loads(dataset: Path) -> None:
    (dataset / "provenance.json").write_text('{"device": "cpu", "threads": 3}')
    path = dataset / "deep" / "cpu.json"
    scores = fit_and_save(dataset, path)
    predictor = load_predictor(path)
    assert list(scores) == list(predictor.coefficients) == [LayerKind.BATCHNORM]
    assert (predictor.threads, predictor.device) == (3, "cpu")
    assert predictor.provenance["rows"] == {"batchnorm": 30}


def test_malformed_provenance_is_refused(dataset: Path) -> None:
    (dataset / "provenance.json").write_text("{")
    with pytest.raises(DataSetError, match=r"provenance\.json cannot be read"):
        fit_directory(dataset)


def test_the_command_fits_and_prints_the_scores(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = dataset / "edge.json"
    assert predictor_utils.main(["--side", "edge", "--dataset", str(dataset), "--output", str(path)]) == 0
    assert "batchnorm" in capsys.readouterr().out
    assert load_predictor(path).coefficients


# ---------------------------------------------------------------- files


def a_predictor(kinds: list[LayerKind] | None = None) -> LatencyPredictor:
    """Return a predictor in which every feature costs 1 ms."""
    return LatencyPredictor({kind: ONES for kind in kinds or [LayerKind.CONV]}, {"device": "cpu", "threads": 2})


def test_a_saved_predictor_loads_as_it_was(tmp_path: Path) -> None:
    predictor = LatencyPredictor({LayerKind.CONV: RATES, LayerKind.ADD: ONES}, {"device": "cuda", "threads": 7})
    score = Score(10, 0.1, 0.5, 0.9)
    save_predictor(tmp_path / "p.json", predictor, {LayerKind.CONV: score, LayerKind.ADD: score})
    loaded = load_predictor(tmp_path / "p.json")
    assert (loaded.device, loaded.threads) == ("cuda", 7)
    assert list(loaded.coefficients) == list(predictor.coefficients)
    for kind, rates in predictor.coefficients.items():
        np.testing.assert_allclose(loaded.coefficients[kind], rates, atol=1e-9)


def shipped_document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(config_path("edge").read_text())
    return document


def changed(**entries: Any) -> str:
    return json.dumps({**shipped_document(), **entries})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"version": 1',
        changed(kinds=[]),
        changed(kinds={"conv": {}}),
        changed(kinds={"conv": {"coefficients_ms": [1, 2]}}),
        changed(kinds={"conv": {"coefficients_ms": ["a"] * 8}}),
        changed(kinds={"transformer": {"coefficients_ms": [1] * 8}}),
        changed(provenance="yesterday"),
    ],
)
def test_a_malformed_parameter_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(DataSetError, match=r"mine\.json are malformed"):
        load_predictor(path)


@pytest.mark.parametrize("text", [changed(version=2), changed(features=["calls"])])
def test_parameters_for_other_features_say_to_fit_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(DataSetError, match=r"old\.json was fitted for other features: fit it again"):
        load_predictor(path)


def test_a_missing_parameter_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r"none\.json: python -m predictor\.collect"):
        load_predictor(tmp_path / "none.json")


# ---------------------------------------------------------------- predicting


def test_a_layer_costs_its_features_times_the_rates_of_its_kind() -> None:
    graph = model_graph("le_net")
    kinds = sorted({node.kind for node in graph.nodes[1:]})
    predictor = LatencyPredictor({kind: RATES * (n + 1) for n, kind in enumerate(kinds)}, {})
    for layer, latency_ms in zip(graph.layers, predictor.layer_latencies_ms(graph), strict=True):
        rates = predictor.coefficients[layer.kind]
        assert latency_ms == pytest.approx(float(feature_matrix([node_work(layer.nodes[0])])[0] @ rates))


def test_a_block_costs_the_sum_of_its_nodes() -> None:
    graph = model_graph("mobile_net")
    calls_only = np.eye(len(FEATURE_NAMES))[0]
    predictor = LatencyPredictor({kind: calls_only for kind in LayerKind}, {})
    expected = [sum(not node.folded for node in layer.nodes) for layer in graph.layers]
    assert predictor.layer_latencies_ms(graph) == expected


def test_a_folded_batch_norm_costs_nothing() -> None:
    graph = model_graph("vgg_net")
    latencies_ms = a_predictor(list(LayerKind)).layer_latencies_ms(graph)
    for layer, latency_ms in zip(graph.layers, latencies_ms, strict=True):
        assert (latency_ms == 0) == (layer.kind is LayerKind.BATCHNORM), layer.name


def test_a_layer_without_predictor_is_named() -> None:
    with pytest.raises(
        MissingPredictorError, match=r"features\.1 is of kind activation.*there are predictors for conv"
    ):
        a_predictor().layer_latencies_ms(model_graph("alex_net"))


def test_an_operation_that_nothing_predicts_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    with pytest.raises(MissingPredictorError, match="sin is of kind other"):
        load_predictor(config_path("edge")).layer_latencies_ms(trace(Odd(), "odd", (1, 3)))


# ---------------------------------------------------------------- the shipped parameters


@pytest.mark.parametrize("side", SIDES)
def test_the_shipped_parameters_price_every_layer_of_the_four_models(side: str) -> None:
    predictor = load_predictor(config_path(side))
    for name in ZOO:
        graph = model_graph(name)
        latencies_ms = predictor.layer_latencies_ms(graph)
        worked = [any(not node.folded for node in layer.nodes) for layer in graph.layers]
        assert [latency_ms > 0 for latency_ms in latencies_ms] == worked


@pytest.mark.parametrize("side", SIDES)
def test_the_shipped_parameters_say_where_they_come_from(side: str) -> None:
    predictor = load_predictor(config_path(side))
    assert set(predictor.provenance) >= {"side", "device", "device_name", "threads", "torch", "date", "rows"}
    assert predictor.provenance["side"] == side
    assert set(predictor.provenance["rows"]) == set(predictor.coefficients)


@pytest.mark.parametrize("side", SIDES)
def test_the_shipped_parameters_are_those_of_the_shipped_data_sets(side: str) -> None:
    shipped = load_predictor(config_path(side))
    fitted, _ = fit_directory(predictor_utils.DATASET_DIR / side)
    for kind, rates in fitted.coefficients.items():
        np.testing.assert_allclose(shipped.coefficients[kind], rates, rtol=1e-4, atol=1e-6)
