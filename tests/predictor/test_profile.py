"""Measured profiles: what they depend on, and that they are kept."""

from __future__ import annotations

import json

import pytest
import torch

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.predictor import profile
from neurosurgeon.predictor.profile import measured_latencies, profile_passes, profile_path
from tests.networks import Network, load_network, random_input


@pytest.fixture(scope="module")
def network() -> Network:
    return load_network("le_net")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "BUDGET_S", 0.0)


def test_every_layer_is_measured_and_lies_in_its_interval(network: Network) -> None:
    latencies = measured_latencies(network)
    assert len(latencies.latency_ms) == len(network.graph.layers)
    assert latencies.source == "measured"
    assert min(latencies.latency_ms) > 0


def test_passes_run_the_real_network(network: Network) -> None:
    tensor = as_tensor(random_input())
    before = tensor.clone()
    passes = profile_passes(network, tensor)
    assert len(passes) == profile.MIN_PASSES
    assert {len(layers) for layers in passes} == {len(network.graph.layers)}
    assert torch.equal(tensor, before)


def test_a_profile_is_measured_once(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured_latencies(network)
    monkeypatch.setattr(profile, "profile_passes", None)
    assert measured_latencies(network) == first


def test_a_profile_depends_on_shapes_device_threads_and_version_not_on_weights(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = profile_path(network.graph, "cpu")
    assert profile_path(network.graph, "cpu") == usual
    assert profile_path(load_network("alex_net").graph, "cpu") != usual
    monkeypatch.setattr(profile.torch, "get_num_threads", lambda: 99)
    assert profile_path(network.graph, "cpu") != usual


@pytest.mark.parametrize("text", ["", "{}", '{"version": 0}', "[]"])
def test_a_damaged_profile_is_measured_again(network: Network, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = profile_path(network.graph, "cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert measured_latencies(network).latency_ms
    assert "is damaged" in caplog.text
    assert json.loads(path.read_text())["version"] == profile.PROFILE_VERSION
