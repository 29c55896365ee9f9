"""The latencies of networks in this cloud, and whether its tasks agree with them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from neurosurgeon.graph.cut import unpack_nodes
from neurosurgeon.models.zoo import canonical_name, model_graph
from neurosurgeon.net.messages import Latencies

if TYPE_CHECKING:  # a busy port is reported before torch is imported
    from neurosurgeon.cloud.executor import CloudEngine
    from neurosurgeon.predictor.latencies import LayerLatencies
    from neurosurgeon.predictor.predictor_utils import LatencyPredictor


log = logging.getLogger(__name__)

COMPARED_TASKS = 8  # of one cut, with what was predicted
MAX_TOLD = 64  # models whose latencies are remembered; peers may name any size of a network


class CloudLatencies:
    """What the layers of models take in this cloud, predicted or measured, and whether its tasks agree.

    Called on the readers' threads (`__call__`) and on the writers' (`computed`).
    """

    def __init__(self, engine: CloudEngine, name: str, path: Path | None) -> None:
        self._engine = engine
        self._name = name  # of the predictor
        self._path = path
        self._preparing = threading.Lock()  # held while a predictor is fitted or a speed measured, which is kept
        self._lock = threading.Lock()  # of those below
        self._told: dict[str, LayerLatencies] = {}  # by model
        self._times_ms: dict[tuple[str, bytes], list[float]] = {}  # of the last tasks, by model and cut

    def __call__(self, model: str) -> Latencies:
        """Return what a model's layers take here; the first time may wait for a measurement of seconds."""
        if self._name == "measured":
            from neurosurgeon.engine.torch_engine import as_network_input, random_input
            from neurosurgeon.predictor.profile import measured_latencies

            network = self._engine.network(model)
            tensor = as_network_input(random_input(network.graph.input.shape), self._engine.device)
            known = self._engine.submit_job(lambda: measured_latencies(network, tensor)).result()
        else:
            with self._preparing:
                predictor = self._predictor()
            known = predictor.predict(model_graph(canonical_name(model)))
        with self._lock:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told[model] = known
        columns = (list(known.latency_ms), list(known.low_ms), list(known.high_ms))
        return Latencies(model, known.source, *columns, list(known.extrapolated), known.origin)

    def _predictor(self) -> LatencyPredictor:
        from neurosurgeon.predictor.machine_speed import kept_machine_speed, scaled_by_speed, scaled_to_machine
        from neurosurgeon.predictor.predictor_utils import find_predictor

        device, threads = self._engine.device, self._engine.threads
        found = find_predictor("cloud", device, self._name, self._path)
        if self._path is not None:
            return found
        speed = kept_machine_speed(device, threads)
        if speed is not None:
            return scaled_by_speed(found, speed, threads)
        return self._engine.submit_job(lambda: scaled_to_machine(found, device, threads)).result()

    def computed(self, model: str, cut: bytes, compute_ms: float) -> None:
        """Have the speed of this machine measured again where the tasks of a cut contradict it.

        The fastest of `COMPARED_TASKS` counts: the first builds kernels, and others wait for other programs.
        """
        from neurosurgeon.predictor.machine_speed import DISAGREEMENT, doubt_machine_speed

        with self._lock:
            told = self._told.get(model)
            if told is None or self._name == "measured" or self._path is not None:
                return
            times_ms = self._times_ms.setdefault((model, cut), [])
            times_ms.append(compute_ms)
            if len(times_ms) < COMPARED_TASKS:
                return
            self._times_ms.clear()
        graph = model_graph(canonical_name(model))
        on_edge = {graph.nodes[index].layer for index in unpack_nodes(graph, cut)}
        predicted_ms = told.of(layer for layer in range(len(graph.layers)) if layer not in on_edge).total()
        if predicted_ms and not 1 / DISAGREEMENT <= min(times_ms) / predicted_ms <= DISAGREEMENT:
            log.info("%s: predicted %.4g ms, measured %.4g ms", model, predicted_ms, min(times_ms))
            doubt_machine_speed(self._engine.device, self._engine.threads)
