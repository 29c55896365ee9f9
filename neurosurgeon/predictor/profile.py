"""The measured latencies of one network's own layers on this device: the predictor that does not predict.

Layers are timed in flow, each on the output of the one before. That takes seconds, and is kept by what it depends
on: the network's shapes (not its weights), device, threads and torch.
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
from neurosurgeon.models.preprocess import as_network_input
from neurosurgeon.predictor.latencies import COVERAGE, LayerFeature, LayerLatencies
from neurosurgeon.utils.errors import NeurosurgeonError
from neurosurgeon.utils.files import cache_directory, replace_file
from neurosurgeon.utils.machine import device_name
from neurosurgeon.utils.timing import measure, now_ms, synchronise
from neurosurgeon.utils.units import MS_PER_S

log = logging.getLogger(__name__)

MIN_PASSES, MAX_PASSES = 9, 60
BUDGET_S = 2.0
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
    tensor = torch.from_numpy(synthetic_input(network.graph.input))
    latencies = summarise(profile_passes(network, as_network_input(tensor, network.device)))
    document = {"version": PROFILE_VERSION, **_columns(latencies)}
    try:
        replace_file(profile_path(network.graph, network.device), json.dumps(document) + "\n")
    except OSError as exc:
        log.warning("the profile cannot be kept: %s", exc)
    return latencies


def profile_passes(network: Profilable, tensor: Tensor) -> list[list[float]]:
    """Run the network layer by layer, again and again; return what each layer took, (passes, layers), ms."""
    steps, start = layer_steps(network.module, network.graph), network.graph.made_by[0][0]
    with torch.inference_mode():
        _one_pass(steps, {start: tensor.clone()}, network.device)  # builds kernels
        start_ms = now_ms()
        passes: list[list[float]] = []
        while len(passes) < MIN_PASSES or (now_ms() - start_ms < BUDGET_S * MS_PER_S and len(passes) < MAX_PASSES):
            passes.append(_one_pass(steps, {start: tensor.clone()}, network.device))  # the first may work in place
    return passes


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
    """Return medians and the middle 90 % of passes (passes, layers), ms."""
    tail = (1 - COVERAGE) / 2
    low, median, high = np.quantile(np.array(passes), [tail, 0.5, 1 - tail], axis=0).tolist()
    return LayerLatencies.measured(median, low, high)


def profile_path(graph: LayerGraph, device: str) -> Path:
    """Return where the profile of a network on this device, with this number of threads and version, is kept."""
    shapes = [
        (node.kind, sorted(node.params.items()), node.output, node.weight_bytes, node.folded) for node in graph.nodes
    ]
    machine = (device_name(device), torch.get_num_threads(), torch.__version__, platform.python_version())
    digest = hashlib.sha256(repr((shapes, device, machine)).encode()).hexdigest()[:32]
    return cache_directory() / "profiles" / f"{graph.model}-{digest}.json"


def read_profile(path: Path, layers: int) -> LayerLatencies:
    """Return a kept profile.

    Raises: OSError, ValueError, KeyError, PlanningError: there is none, or not such a one.
    """
    document = json.loads(path.read_text())
    if document["version"] != PROFILE_VERSION or len(document["latency_ms"]) != layers:
        raise ValueError("written for another version")
    latency, low, high = ([float(value) for value in document[name]] for name in ("latency_ms", "low_ms", "high_ms"))
    return LayerLatencies.measured(latency, low, high)


def _columns(latencies: LayerLatencies) -> dict[str, list[float]]:
    return {name: list(getattr(latencies, name)) for name in ("latency_ms", "low_ms", "high_ms")}


def show_features(
    network: Profilable, array: Array, progress: Callable[[Sequence[LayerStep]], Sequence[LayerStep]] = lambda x: x
) -> list[LayerFeature]:
    """Return, layer by layer, the measured latency, output shape, transfer size and accumulated time of a network.

    Each layer is timed alone on what those before it have made (median of repeated runs). A batch norm that is
    folded into its convolution takes no time of its own.
    """
    features: list[LayerFeature] = []
    accumulated_ms = 0.0
    values = {network.graph.made_by[0][0]: as_network_input(torch.from_numpy(array), network.device).clone()}
    for step in progress(layer_steps(network.module, network.graph)):
        described = step.layer
        with torch.inference_mode():
            latency_ms = measure(partial(step.apply, values), network.device).median_ms
        for read in step.last_reads:
            del values[read]
        accumulated_ms += latency_ms
        features.append(
            LayerFeature(
                described.index + 1,
                described.name,
                described.kind,
                described.output.shape,
                described.output.size_bytes,
                latency_ms,
                accumulated_ms,
            )
        )
    return features
