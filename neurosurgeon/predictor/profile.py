"""Measure the latencies of one network's own layers on this device.

Layers are timed in turn, each on the output of the one before. That takes seconds, so the profile is kept. Its name
depends on all that the latencies depend on: the network's shapes (not its weights), device, threads and torch version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import Array, synthetic_input
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.models.partition import LayerStep, Values, layer_steps
from neurosurgeon.models.preprocess import as_network_input, synchronise
from neurosurgeon.predictor.latencies import COVERAGE, LayerFeature, LayerLatencies
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.files import cache_directory, replace_file
from neurosurgeon.utils.machine import device_name
from neurosurgeon.utils.timing import Timing, now_ms
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

MIN_PASSES, MAX_PASSES = 9, 60  # over all layers of a network
BUDGET_S = 2.0
WARMUP_RUNS = 2  # of a layer timed alone: the first runs build kernels and touch memory
MIN_SAMPLE_MS = 0.2  # a shorter sample is dominated by the clock's own cost
PROFILE_VERSION = 1


class Profilable(Protocol):
    """A network that is ready to run, layer by layer."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def graph(self) -> TracedGraph: ...
    @property
    def device(self) -> str: ...


def measured_latencies(network: Profilable) -> LayerLatencies:
    """Return the network's measured latencies on this device: kept ones, or measured now. May take seconds."""
    try:
        return read_profile(profile_path(network.graph, network.device), len(network.graph.layers))
    except OSError:
        log.info("measuring the layers of %s: this takes seconds, and is kept", network.graph.model)
    except (ValueError, KeyError, TypeError, NeurosurgeonError) as exc:
        log.warning("the kept profile of %s is damaged (%s); measuring again", network.graph.model, exc)
    tensors = [torch.from_numpy(synthetic_input(spec)) for spec in network.graph.inputs]
    latencies = summarise(profile_passes(network, tensors))
    columns = {name: list(getattr(latencies, name)) for name in ("latency_ms", "low_ms", "high_ms")}
    document = {"version": PROFILE_VERSION, **columns}
    try:
        replace_file(profile_path(network.graph, network.device), json.dumps(document) + "\n")
    except OSError as exc:
        log.warning("the profile cannot be kept: %s", exc)
    return latencies


def profile_passes(network: Profilable, inputs: Sequence[Tensor]) -> list[list[float]]:
    """Run the network layer by layer, repeatedly; return the time of each layer, (passes, layers), ms."""
    steps = layer_steps(network.module, network.graph)
    with torch.inference_mode():
        _one_pass(steps, input_values(network, inputs), network.device)  # builds kernels
        start_ms = now_ms()
        passes: list[list[float]] = []
        while len(passes) < MIN_PASSES or (now_ms() - start_ms < BUDGET_S * MS_PER_S and len(passes) < MAX_PASSES):
            passes.append(_one_pass(steps, input_values(network, inputs), network.device))
    return passes


def input_values(network: Profilable, inputs: Sequence[Tensor]) -> Values:
    """Return copies of inputs as the values with which layers start: a layer may work in place."""
    values = (as_network_input(tensor, network.device).clone() for tensor in inputs)
    return dict(zip(network.graph.made_by[0], values, strict=True))


def _one_pass(steps: Sequence[LayerStep], values: Values, device: str) -> list[float]:
    times_ms = []
    for step in steps:
        start_ms = now_ms()
        step.apply(values)
        synchronise(device)
        times_ms.append(now_ms() - start_ms)
        for read in step.last_reads:
            del values[read]
    return times_ms


def summarise(passes: Sequence[Sequence[float]]) -> LayerLatencies:
    """Return the medians and the middle 90 % of repeated times (passes, layers), ms."""
    tail = (1 - COVERAGE) / 2
    low, median, high = np.quantile(np.array(passes), [tail, 0.5, 1 - tail], axis=0).tolist()
    return LayerLatencies.measured(median, low, high)


def profile_path(graph: LayerGraph, device: str) -> Path:
    """Return the path of the profile of a network on this device, with the current threads and versions."""
    shapes = [
        (node.kind, sorted(node.params.items()), node.output, node.weight_bytes, node.folded) for node in graph.nodes
    ]
    machine = (device_name(device), torch.get_num_threads(), torch.__version__, platform.python_version())
    digest = hashlib.sha256(repr((shapes, device, machine)).encode()).hexdigest()[:32]
    return cache_directory() / "profiles" / f"{graph.model}-{digest}.json"


def read_profile(path: Path, layers: int) -> LayerLatencies:
    """Return a kept profile.

    Args:   layers: expected number of layers.
    Raises: OSError: there is none. ValueError, KeyError, TypeError, PlanningError: it is damaged or outdated.
    """
    document = json.loads(path.read_text())
    if document["version"] != PROFILE_VERSION or len(document["latency_ms"]) != layers:
        raise ValueError(f"expected version {PROFILE_VERSION} and {layers} layers")
    latency, low, high = ([float(value) for value in document[name]] for name in ("latency_ms", "low_ms", "high_ms"))
    return LayerLatencies.measured(latency, low, high)


# ---------------------------------------------------------------- the layer study


def show_features(
    network: Profilable,
    arrays: Sequence[Array],
    progress: Callable[[Sequence[LayerStep]], Sequence[LayerStep]] = lambda x: x,
) -> list[LayerFeature]:
    """Return the measured latency, output shape, transfer size and accumulated latency of each layer of a network.

    Each layer is timed alone on the outputs of those before it, as the median of repeated runs. A batch norm that is
    folded into its convolution has no latency of its own.
    """
    features: list[LayerFeature] = []
    accumulated_ms = 0.0
    values = input_values(network, [torch.from_numpy(array) for array in arrays])
    for step in progress(layer_steps(network.module, network.graph)):
        layer = step.layer
        with torch.inference_mode():
            latency_ms = measure(partial(step.apply, values), network.device).median_ms
        for read in step.last_reads:
            del values[read]
        accumulated_ms += latency_ms
        output = layer.output
        position = layer.index + 1, layer.name, layer.kind
        features.append(LayerFeature(*position, output.shape, output.size_bytes, latency_ms, accumulated_ms))
    return features


def measure(
    function: Callable[[], object], device: str = "cpu", *, min_samples: int = 5, budget_ms: float = 30.0
) -> Timing:
    """Return the timing of a function, called until both ``min_samples`` samples and ``budget_ms`` are reached.

    A function shorter than `MIN_SAMPLE_MS` is called several times for each sample.
    """
    for _ in range(WARMUP_RUNS):
        function()
    synchronise(device)
    once_ms = _timed_calls(function, 1, device)
    calls = max(1, round(MIN_SAMPLE_MS / max(once_ms, 1e-4)))
    samples_ms: list[float] = []
    spent_ms = 0.0
    while len(samples_ms) < min_samples or spent_ms < budget_ms:
        sample_ms = _timed_calls(function, calls, device)
        samples_ms.append(sample_ms / calls)
        spent_ms += sample_ms
    return Timing.of(samples_ms)


def _timed_calls(function: Callable[[], object], calls: int, device: str) -> float:
    start_ms = now_ms()
    for _ in range(calls):
        function()
    synchronise(device)
    return now_ms() - start_ms
