"""Predict every layer of a graph, each inside its interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.models.names import ZOO
from neurosurgeon.predictor import predictor_utils
from neurosurgeon.predictor.features import FEATURE_NAMES, feature_matrix
from neurosurgeon.predictor.kernel_flops import node_work
from neurosurgeon.predictor.kind_models import MIN_LATENCY_MS
from neurosurgeon.predictor.places import config_path
from neurosurgeon.predictor.predictor_utils import PREDICTORS, SIDES
from neurosurgeon.predictor.store import find_predictor, load_predictor
from neurosurgeon.utils.errors import MissingPredictorError
from tests.networks import model_graph, trace_module
from tests.predictor.samples import ONES, RATES, linear_predictor


def test_a_layer_costs_its_features_times_the_rates_of_its_kind() -> None:
    graph = model_graph("le_net")
    kinds = sorted({node.kind for node in graph.nodes[1:]})
    rates = {kind: RATES * (n + 1) for n, kind in enumerate(kinds)}
    for layer, latency_ms in zip(graph.layers, linear_predictor(rates).predict(graph).latency_ms, strict=True):
        expected = float(feature_matrix([node_work(layer.nodes[0])])[0] @ rates[layer.kind])
        assert latency_ms == pytest.approx(max(expected, MIN_LATENCY_MS))


def test_a_block_costs_the_sum_of_its_nodes() -> None:
    graph = model_graph("mobile_net")
    calls_only = np.eye(len(FEATURE_NAMES))[0]
    latencies = linear_predictor({kind: calls_only for kind in LayerKind}).predict(graph)
    expected = [sum(not node.folded for node in layer.nodes) for layer in graph.layers]
    assert latencies.latency_ms == pytest.approx(expected)


def test_a_folded_batch_norm_costs_nothing() -> None:
    graph = model_graph("vgg_net")
    latencies = linear_predictor({kind: ONES for kind in LayerKind}).predict(graph)
    for layer, latency_ms in zip(graph.layers, latencies.latency_ms, strict=True):
        assert (latency_ms == 0) == (layer.kind is LayerKind.BATCHNORM), layer.name


def test_every_layer_lies_inside_its_interval() -> None:
    graph = model_graph("mobile_net")
    latencies = linear_predictor({kind: ONES for kind in LayerKind}).predict(graph)
    for low, latency_ms, high in zip(latencies.low_ms, latencies.latency_ms, latencies.high_ms, strict=True):
        assert 0.5 * latency_ms <= low < latency_ms < high <= 2 * latency_ms


def test_a_prediction_is_kept_with_its_graph() -> None:
    predictor = linear_predictor({kind: ONES for kind in LayerKind})
    assert predictor.predict(model_graph("le_net")) is predictor.predict(model_graph("le_net"))


def test_the_kept_predictions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_utils, "MAX_PREDICTIONS", 2)
    predictor = linear_predictor({kind: ONES for kind in LayerKind})
    for size in (33, 34, 35, 36, 37):
        graph = model_graph(f"mobile_net@{size}")
        assert predictor.predict(graph) is predictor.predict(graph)
        assert len(predictor._predictions) <= 2


def test_a_layer_without_predictor_is_named() -> None:
    with pytest.raises(
        MissingPredictorError, match=r"features\.1 is of kind activation.*there are predictors for conv"
    ):
        linear_predictor({LayerKind.CONV: ONES}).predict(model_graph("alex_net"))


def test_a_kind_without_data_is_predicted_as_a_similar_one() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    predicted = load_predictor(config_path("edge")).predict(trace_module(Odd(), (1, 3), "odd"))
    assert predicted.latency_ms[0] > 0
    assert list(predicted.extrapolated) == ["sin"]


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_layer_outside_the_data_is_extrapolated(name: str) -> None:
    usual, vast = (nn.Sequential(nn.Conv2d(3, channels, 3)) for channels in (32, 32 * 4096))
    predictor = find_predictor("edge", name=name)
    assert not predictor.predict(trace_module(usual, (1, 3, 64, 64), "usual")).extrapolated
    assert list(predictor.predict(trace_module(vast, (1, 3, 64, 64), "vast")).extrapolated) == ["0"]


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("side", SIDES)
def test_the_shipped_predictors_cover_the_four_models(side: str, name: str) -> None:
    predictor = find_predictor(side, name=name)
    for model in ZOO:
        graph = model_graph(model)
        latencies = predictor.predict(graph)
        worked = [any(not node.folded for node in layer.nodes) for layer in graph.layers]
        assert [latency_ms > 0 for latency_ms in latencies.latency_ms] == worked
