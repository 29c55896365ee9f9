"""Measure whole networks in turn with rows of the data set, and compare the predictors with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from neurosurgeon.engine.base import Side
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.graph.spec import LayerKind, TensorSpec, synthetic_input
from neurosurgeon.models.build import fold_batch_norms, trace
from neurosurgeon.models.names import USUAL_SIZE
from neurosurgeon.models.partition import partition_module
from neurosurgeon.models.preprocess import as_network_input, synchronise
from neurosurgeon.models.program import Example
from neurosurgeon.models.torchvision_compat import import_torchvision
from neurosurgeon.predictor.collect import BLOCK_LAYERS, config_names
from neurosurgeon.predictor.get_datasets_func import csv_path, read_rows
from neurosurgeon.predictor.layer_timing import build_layers, time_layers
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.sampling import RECIPES, Config
from neurosurgeon.utils.timing import now_ms

NETWORKS = (
    "alexnet vgg11 vgg16 vgg16_bn resnet18 resnet34 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet "
    "squeezenet1_0 squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_b1 "
    "mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 regnet_x_400mf regnet_y_400mf regnet_x_800mf "
    "regnet_y_800mf"
).split()
QUARTILE = 0.25  # of repeated times, as in the data sets
REMEASURED_LAYERS = 512  # of the data set
SMALL_ROW_MS = 0.05  # the times of shorter layers depend more on the caches than on the machine's speed


# ---------------------------------------------------------------- rows of the data set


Rows = list[tuple[float, LayerKind, Config]]  # latency in the data set, ms, and the layer


def sampled_rows(directory: Path) -> Rows:
    """Return some rows of all kinds, sorted by latency; rows without the collector's columns are left out."""
    rows: Rows = []
    for kind in RECIPES:
        if csv_path(directory, kind).exists():
            names = config_names(kind)
            known = [row for row in read_rows(csv_path(directory, kind), kind) if all(name in row for name in names)]
            rows += [(row["latency"], kind, {name: int(row[name]) for name in names}) for row in known]
    chosen = np.random.default_rng(0).permutation(len(rows))[:REMEASURED_LAYERS]
    return sorted((rows[index] for index in chosen), key=lambda row: row[0])


class RemeasuredRows:
    """Rows of the data set, measured again in blocks of layers of similar size, as the collector measures them."""

    def __init__(self, rows: Rows, device: str) -> None:
        self._device = device
        self._rows = rows
        blocks = [rows[start : start + BLOCK_LAYERS] for start in range(0, len(rows), BLOCK_LAYERS)]
        self._layers = [build_layers([(kind, config) for _, kind, config in block], device) for block in blocks]
        self._times_ms: list[list[list[float]]] = [[] for _ in blocks]

    def __len__(self) -> int:
        return len(self._layers)

    def measure(self, block: int, counts: bool) -> None:
        """Run a block twice; record the second run if it ``counts``."""
        time_layers(self._layers[block], self._device)
        times_ms = time_layers(self._layers[block], self._device)
        if counts:
            self._times_ms[block].append(times_ms)

    @property
    def drift(self) -> float:
        """The median of latency now / latency in the data set; 1 if no row was measured again."""
        now_ms = self._quartiles(slice(None))
        ratios = [now / then for now, (then, _, _) in zip(now_ms, self._rows, strict=True) if then > SMALL_ROW_MS]
        return float(np.median(ratios)) if ratios else 1.0

    def noise(self) -> dict[str, float]:
        """Return the noise of each kind: mean of |first / second - 1| of two measurements of the same layers."""
        ratios: dict[str, list[float]] = {}
        even_ms, odd_ms = (self._quartiles(slice(first, None, 2)) for first in range(2))  # of the rounds
        for one_ms, other_ms, (_, kind, _) in zip(even_ms, odd_ms, self._rows, strict=True):
            ratios.setdefault(kind, []).append(abs(one_ms / other_ms - 1))
        return {kind: float(np.mean(values)) for kind, values in ratios.items()}

    def _quartiles(self, rounds: slice) -> list[float]:
        return [float(t) for block in self._times_ms for t in np.quantile(np.array(block[rounds]), QUARTILE, axis=0)]


# ---------------------------------------------------------------- networks


@dataclass(frozen=True, slots=True)
class NetworkScore:
    """One network: its measured latency, the predictions, and the noise of the measurement."""

    network: str
    measured_ms: float  # lower quartile of the rounds
    median_ms: float
    noise: float  # |latency of the even rounds / of the odd rounds - 1|
    predicted_ms: Mapping[str, float]
    covered: Mapping[str, bool]  # the measured latency lies in the 90 % interval
    extrapolated: Mapping[str, int]  # number of layers outside the data

    def error(self, predictor: str) -> float:
        """Return predicted / measured - 1."""
        return self.predicted_ms[predictor] / self.measured_ms - 1


def build_network(name: str) -> nn.Module:
    """Return a torchvision network with random weights."""
    options: dict[str, Any] = {"weights": None}
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": False}
    network: nn.Module = getattr(import_torchvision("torchvision.models"), name)(**options)
    return network.eval()


def prepared_networks(device: str) -> dict[str, tuple[LayerGraph, nn.Module]]:
    """Return the graph and the runnable module of every network, as a cloud that computes all layers runs it."""
    prepared: dict[str, tuple[LayerGraph, nn.Module]] = {}
    for name in tqdm(NETWORKS, desc="building", unit="network", disable=None):
        model = build_network(name)
        graph = trace(model, name, Example.of(torch.zeros(1, 3, USUAL_SIZE, USUAL_SIZE)), is_own=False)
        model = fold_batch_norms(model, graph).to(device)
        if device == "cpu":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        prepared[name] = (graph, partition_module(model, graph, [0], Side.CLOUD))
    return prepared


def measure_networks(
    networks: Mapping[str, nn.Module], remeasured: RemeasuredRows, device: str, rounds: int
) -> dict[str, list[float]]:
    """Return the times of every network, (rounds,), ms: the second of two runs in each round.

    In each round, the networks and the blocks of the data set's rows run in random order.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in networks}
    tensor = as_network_input(torch.from_numpy(synthetic_input(TensorSpec((1, 3, USUAL_SIZE, USUAL_SIZE)))), device)
    turns: list[str | int] = [*networks, *range(len(remeasured))]
    shuffle = np.random.default_rng(0).permutation
    for round_number in tqdm(range(rounds + 1), desc="measuring", unit="round", disable=None):
        counts = round_number > 0  # the first builds kernels
        for turn in (turns[index] for index in shuffle(len(turns))):
            if isinstance(turn, int):
                remeasured.measure(turn, counts)
                continue
            _run(networks[turn], tensor, device)
            start_ms = now_ms()
            _run(networks[turn], tensor, device)
            if counts:
                times_ms[turn].append(now_ms() - start_ms)
    return times_ms


def _run(network: nn.Module, tensor: Tensor, device: str) -> None:
    with torch.inference_mode():
        network(tensor.clone())[0].cpu()
    synchronise(device)


def score_network(graph: LayerGraph, times_ms: Sequence[float], predictors: Sequence[LatencyPredictor]) -> NetworkScore:
    """Return the comparison of one network's measured times (rounds,), ms, with the predictions."""
    measured = float(np.quantile(times_ms, QUARTILE))
    even_ms, odd_ms = (float(np.quantile(times_ms[first::2], QUARTILE)) for first in range(2))
    predicted = {predictor.name: predictor.predict(graph) for predictor in predictors}
    intervals = {name: latencies.interval() for name, latencies in predicted.items()}
    return NetworkScore(
        network=graph.model,
        measured_ms=measured,
        median_ms=float(np.median(times_ms)),
        noise=abs(even_ms / odd_ms - 1),
        predicted_ms={name: latencies.total() for name, latencies in predicted.items()},
        covered={name: low_ms <= measured <= high_ms for name, (low_ms, high_ms) in intervals.items()},
        extrapolated={name: len(latencies.extrapolated) for name, latencies in predicted.items()},
    )
