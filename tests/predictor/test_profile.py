"""Measure the profile of a network once, and time functions within a budget."""

from __future__ import annotations

import json

import pytest
import torch

from neurosurgeon.engine.torch_engine import as_tensor
from neurosurgeon.predictor import profile
from neurosurgeon.predictor.profile import measure, measured_latencies, profile_passes, profile_path
from neurosurgeon.utils.timing import Timing
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
    passes = profile_passes(network, [tensor])
    assert len(passes) == profile.MIN_PASSES
    assert {len(layers) for layers in passes} == {len(network.graph.layers)}
    assert torch.equal(tensor, before)


def test_a_profile_is_measured_once(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured_latencies(network)
    monkeypatch.setattr(profile, "profile_passes", None)
    assert measured_latencies(network) == first


def test_profile_path_depends_on_shapes_and_threads(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---------------------------------------------------------------- timing one function


class FakeClock:
    """A clock that only the measured function moves."""

    def __init__(self, call_ms: float) -> None:
        self.call_ms = call_ms
        self.ms = 0.0
        self.calls = 0

    def now(self) -> float:
        return self.ms

    def function(self) -> None:
        self.calls += 1
        self.ms += self.call_ms


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock(request.param)
    monkeypatch.setattr(profile, "now_ms", clock.now)
    return clock


@pytest.mark.parametrize("fake", [10.0], indirect=True)
def test_a_long_function_is_called_until_the_budget_is_spent(fake: FakeClock) -> None:
    result = measure(fake.function, min_samples=2, budget_ms=70.0)
    assert result == Timing(10.0, 10.0, 10.0, 0.0, 7)
    assert fake.calls == profile.WARMUP_RUNS + 1 + 7


@pytest.mark.parametrize("fake", [100.0], indirect=True)
def test_a_slow_function_has_enough_samples_beyond_the_budget(fake: FakeClock) -> None:
    assert measure(fake.function, min_samples=5, budget_ms=1.0).samples == 5


@pytest.mark.parametrize("fake", [0.01], indirect=True)
def test_a_short_function_is_called_often_in_a_sample(fake: FakeClock) -> None:
    result = measure(fake.function, min_samples=3, budget_ms=0.5)
    assert result.samples == 3
    assert result.median_ms == pytest.approx(0.01)
    assert fake.calls == profile.WARMUP_RUNS + 1 + 3 * 20
