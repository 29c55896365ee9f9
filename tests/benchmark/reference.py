"""The partition point of the reference implementation: its features, its regression, its transfer time.

A plain linear regression per kind of layer on the columns of the contract, from this project's data sets, clamped at 0.
Other kinds cost nothing. Transfer = bytes / bandwidth, without a round trip or a reply; an image has 32-bit values. It
gets more than it has: a correctly measured bandwidth, free batch norms if they are folded, and the ends of blocks of
networks that are no chain, which it cannot cut at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from sklearn.linear_model import LinearRegression

from neurosurgeon.graph.layer_graph import LayerGraph, Node
from neurosurgeon.graph.spec import LayerKind
from neurosurgeon.planner.chain_search import chain_stages, rank_cuts
from neurosurgeon.predictor.get_datasets_func import COLUMNS, csv_path, read_rows
from neurosurgeon.predictor.places import dataset_directory
from neurosurgeon.utils.units import s_to_ms

KINDS = tuple(COLUMNS)[:6]  # of the contract


def reference_point(graph: LayerGraph, rate_bytes_per_s: float, slowdown: float) -> int:
    """Return the chosen partition point, for an edge with a known slowdown."""
    points = graph.block_points
    edge_ms, cloud_ms = (_between(points, predicted_ms(side, graph)) for side in ("edge", "cloud"))
    sizes_bytes = [graph.boundary_bytes[point] if point else graph.inputs[0].size_bytes for point in points]
    transfer_ms = [s_to_ms(size_bytes / rate_bytes_per_s) for size_bytes in sizes_bytes]
    stages_ms = chain_stages([slowdown * latency for latency in edge_ms], transfer_ms, cloud_ms)
    return points[rank_cuts(stages_ms, stages_ms)[0]]


def _between(points: Sequence[int], latency_ms: Sequence[float]) -> list[float]:
    return [sum(latency_ms[start:end]) for start, end in pairwise(points)]


def predicted_ms(side: str, graph: LayerGraph) -> list[float]:
    """Return the predicted time of every layer, (L,), ms."""
    return [sum(_node_ms(side, node) for node in layer.nodes) for layer in graph.layers]


def _node_ms(side: str, node: Node) -> float:
    if node.kind not in KINDS or node.folded:
        return 0.0
    values = {**node.params, "FLOPs": node.flops}
    features = [[values[name] for name in _features(node.kind)]]
    return max(0.0, float(_regression(side, node.kind).predict(features)[0]))


def _features(kind: LayerKind) -> Sequence[str]:
    return COLUMNS[kind][:-1]


@cache
def _regression(side: str, kind: LayerKind) -> LinearRegression:
    rows = read_rows(csv_path(dataset_directory(side, "cpu"), kind), kind)
    features = np.array([[row[name] for name in _features(kind)] for row in rows])
    return LinearRegression().fit(features, [row["latency"] for row in rows])
