"""Predict the latency of each layer of a graph: a model for each kind of layer, with an interval.

There are two predictors. ``linear`` has non-negative coefficients, each a physical rate, that minimise the relative
error. ``forest`` adds boosted trees to the linear model. `predictor.store` fits, saves, loads and finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.predictor.features import feature_matrix, tree_matrix
from neurosurgeon.predictor.kernel_flops import node_work
from neurosurgeon.predictor.kind_models import Family, KindModel, Scale, family_of
from neurosurgeon.predictor.latencies import LayerLatencies
from neurosurgeon.utils.errors import MissingPredictorError

SIDES = ("edge", "cloud")
PREDICTORS = ("forest", "linear")
MAX_PREDICTIONS = 256  # kept by a predictor; peers of a cloud may name any size of a network
FREE_KINDS = frozenset({LayerKind.INPUT, LayerKind.VIEW})
# Kinds whose rates are used for a kind without data, the most similar first: they know the cost of arithmetic and
# memory traffic on the machine.
SIMILAR_KINDS: Mapping[LayerKind, tuple[LayerKind, ...]] = {
    LayerKind.MATMUL: (LayerKind.CONV, LayerKind.LINEAR),
    LayerKind.ATTENTION: (LayerKind.MATMUL, LayerKind.CONV, LayerKind.LINEAR),
    LayerKind.LAYER_NORM: (LayerKind.BATCHNORM, LayerKind.ACTIVATION),
    LayerKind.SOFTMAX: (LayerKind.ACTIVATION, LayerKind.BATCHNORM),
    LayerKind.WEIGHTED: (LayerKind.CONV, LayerKind.LINEAR),
    LayerKind.OTHER: (LayerKind.ACTIVATION, LayerKind.BATCHNORM),
}


@dataclass(frozen=True, eq=False)
class LatencyPredictor:
    """A model for every kind of layer, and the provenance of their data.

    Predictions are kept by graph, up to `MAX_PREDICTIONS`: then all are dropped. Any thread may call it.
    """

    name: str  # linear or forest
    kinds: Mapping[LayerKind, KindModel]
    provenance: Mapping[str, Any]
    scales: Mapping[Family, Scale] = field(default_factory=dict)  # to this machine; empty: not scaled
    scaling: str = "as it is"  # for people
    _predictions: dict[LayerGraph, LayerLatencies] = field(default_factory=dict, repr=False, init=False)

    @property
    def threads(self) -> int:
        """The number of CPU threads that the data was measured with."""
        return int(self.provenance.get("threads", 1))

    @property
    def origin(self) -> str:
        """The machine of the data, and how predictions were scaled from it to this one, for people."""
        device = self.provenance.get("device", "cpu")
        threads = f", threads: {self.threads}" if device == "cpu" else ""
        return f"data of {self.provenance.get('device_name') or device}{threads}, {self.scaling}"

    def predict(self, graph: LayerGraph) -> LayerLatencies:
        """Return the predicted latency of every layer of a graph, in ms, each with its 90 % interval.

        A folded batch norm has no latency: its work happens inside the convolution before it.

        Raises: MissingPredictorError: a layer's kind has no predictor; the message names the layer.
        """
        known = self._predictions.get(graph)
        if known is None:
            known = self._predict(graph)
            if len(self._predictions) >= MAX_PREDICTIONS:
                self._predictions.clear()
            self._predictions[graph] = known
        return known

    def _predict(self, graph: LayerGraph) -> LayerLatencies:
        size = len(graph.layers)
        total, below, above = (np.zeros(size) for _ in range(3))
        extrapolated: list[str] = []
        by_kind: dict[LayerKind, list[Node]] = {}
        for node in graph.nodes:
            if node.kind not in FREE_KINDS and not node.folded:
                by_kind.setdefault(node.kind, []).append(node)
        for kind, nodes in by_kind.items():
            works = [node_work(node) for node in nodes]
            tree_features = tree_matrix(kind, [node.params for node in nodes], works)
            model = self._model(kind, nodes[0])
            scales = [self.scales.get(family_of(kind, node.params), Scale()) for node in nodes]
            factor, scale_low, scale_high = np.array(scales).T
            latency_ms = model.predict(feature_matrix(works), tree_features) * factor
            layers = [node.layer for node in nodes]
            np.add.at(total, layers, latency_ms)
            np.add.at(below, layers, ((1 - np.minimum(model.interval[0], scale_low)) * latency_ms) ** 2)
            np.add.at(above, layers, ((np.maximum(model.interval[1], scale_high) - 1) * latency_ms) ** 2)
            beyond = model.extrapolates(tree_features)
            extrapolated += [node.name for node, is_beyond in zip(nodes, beyond, strict=True) if is_beyond]
        low, high = np.maximum(total - np.sqrt(below), 0), total + np.sqrt(above)
        return LayerLatencies(total.tolist(), low.tolist(), high.tolist(), self.name, extrapolated, self.origin)

    def _model(self, kind: LayerKind, node: Node) -> KindModel:
        if kind in self.kinds:
            return self.kinds[kind]
        similar = next((other for other in SIMILAR_KINDS.get(kind, ()) if other in self.kinds), None)
        if similar is None:
            raise MissingPredictorError(
                f"layer {node.name} is of kind {kind}, which has no predictor; there are predictors for "
                f"{', '.join(sorted(self.kinds))}"
            )
        return self.kinds[similar].for_similar_kind()
