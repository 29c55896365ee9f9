"""The latencies of networks in this cloud, and whether its tasks agree with them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from neurosurgeon.cloud.executor import Executor
from neurosurgeon.cloud.store import NetworkStore
from neurosurgeon.graph.cut import unpack_nodes
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.net.messages import Latencies
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.predictor.predictor_utils import LatencyPredictor
from neurosurgeon.predictor.store import find_predictor

log = logging.getLogger(__name__)

COMPARED_TASKS = 8  # of one cut, with the predicted latency
MAX_SENT = 64  # models whose latencies are kept; peers may name any size of a network


class CloudLatencies:
    """The latencies of the layers of models in this cloud, predicted or measured, and whether its tasks agree.

    Called on the readers' threads (`__call__`) and on the writers' (`computed`).
    """

    def __init__(self, store: NetworkStore, executor: Executor, name: str, path: Path | None) -> None:
        self._store = store
        self._executor = executor
        self._name = name  # of the predictor
        self._path = path
        self._preparing = threading.Lock()  # held while a predictor is fitted or a speed measured, once for all threads
        self._lock = threading.Lock()  # guards the two below
        self._sent: dict[str, tuple[LayerGraph, LayerLatencies]] = {}  # by model
        self._times_ms: dict[tuple[str, bytes], list[float]] = {}  # of the last tasks, by model and cut

    def __call__(self, model: str, graph: LayerGraph) -> Latencies:
        """Return the latencies of a model's layers here. The first call may block for a measurement of seconds."""
        if self._name == "measured":
            network = self._store.network(model)
            known = LayerLatencies.measured(*self._executor.submit_job(network.measure).result())
        else:
            with self._preparing:
                predictor = self._predictor()
            known = predictor.predict(graph)
        with self._lock:
            if len(self._sent) >= MAX_SENT:
                self._sent.clear()
            self._sent[model] = graph, known
        columns = (list(known.latency_ms), list(known.low_ms), list(known.high_ms))
        return Latencies(model, known.source, *columns, list(known.extrapolated), known.origin)

    def _predictor(self) -> LatencyPredictor:
        engine, threads = self._executor.engine, self._executor.threads
        found = find_predictor("cloud", engine.device, self._name, self._path)
        if self._path is not None:
            return found
        if engine.has_speed(threads):
            return engine.scale(found, threads)
        return self._executor.submit_job(lambda: engine.scale(found, threads)).result()

    def computed(self, model: str, cut: bytes, compute_ms: float) -> None:
        """Let the speed of this machine be measured again if the tasks of a cut contradict it.

        It compares the fastest of `COMPARED_TASKS`: the first builds kernels, and others wait for other programs.

        Args: cut: the bit mask of the nodes on the edge.
        """
        with self._lock:
            if model not in self._sent or self._name == "measured" or self._path is not None:
                return
            graph, latencies = self._sent[model]
            times_ms = self._times_ms.setdefault((model, cut), [])
            times_ms.append(compute_ms)
            if len(times_ms) < COMPARED_TASKS:
                return
            self._times_ms.clear()
        on_edge = {graph.nodes[index].layer for index in unpack_nodes(graph, cut)}
        predicted_ms = latencies.of(layer for layer in range(len(graph.layers)) if layer not in on_edge).total()
        if predicted_ms:
            log.debug("%s: predicted %.4g ms, measured %.4g ms", model, predicted_ms, min(times_ms))
            self._executor.engine.check_speed(min(times_ms) / predicted_ms, self._executor.threads)
