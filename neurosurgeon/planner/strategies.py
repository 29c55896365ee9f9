"""The cuts of a network that each strategy considers; the planner takes the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import cache

import numpy as np

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.planner.chain_search import Objective
from neurosurgeon.planner.dag_search import DagCosts, DagSearch
from neurosurgeon.planner.heavy_load import shortest_bottleneck
from neurosurgeon.planner.memory import edge_memory, memory_at_points

PRICES = np.geomspace(2**-8, 2**8, 17)  # of a byte of parameters, in units of the edge's latency per byte


class Strategy(StrEnum):
    """How a network is cut; the first three find the same cut of a chain."""

    DADS = "dads"  # anywhere: the minimum cut of the graph (Hu et al., INFOCOM'19)
    NEUROSURGEON = "neurosurgeon"  # after any layer, in execution order (Kang et al., ASPLOS'17)
    CHAIN_OF_BLOCKS = "chain-of-blocks"  # only where a single tensor is sent
    EDGE_ONLY = "edge-only"
    CLOUD_ONLY = "cloud-only"


@cache  # building a search takes 0.4 ms for GoogLeNet and 3 ms for DenseNet-201, which is longer than a plan
def search_of(graph: LayerGraph) -> DagSearch:
    """Return the search for cuts of a graph, which is built once."""
    return DagSearch([node.inputs for node in graph.nodes])


def points_of(strategy: Strategy, graph: LayerGraph, max_edge_bytes: float = math.inf) -> list[int]:
    """Return the partition points that a strategy considers and whose edge partition fits the limit, in order."""
    last = len(graph.layers)
    if strategy is Strategy.EDGE_ONLY:
        points: Sequence[int] = [last]
    elif strategy is Strategy.CLOUD_ONLY:
        points = [0]
    elif strategy is Strategy.NEUROSURGEON or graph.is_chain:
        points = range(last + 1)
    else:
        points = graph.block_points if strategy is Strategy.CHAIN_OF_BLOCKS else search_of(graph).ends
    if max_edge_bytes == math.inf:
        return list(points)
    memory = memory_at_points(graph)
    return [point for point in points if memory[point].total_bytes <= max_edge_bytes]


def inner_cuts(
    graph: LayerGraph,
    costs: DagCosts,
    objective: Objective = Objective.LATENCY,
    max_edge_bytes: float = math.inf,
) -> list[frozenset[int]]:
    """Return cuts inside blocks that fit the edge's memory; if the best cut of all lies inside a block, it is included.

    For latency this is exact, for throughput an approximation (`planner.heavy_load`). If the best cut of a block does
    not fit, others are tried: the best ones if each byte of parameters on the edge has a price, for a range of prices.
    Only in this case may a better cut that fits be missed.

    Args: costs: of latency; for throughput, how long nodes and tensors keep edge, link and cloud busy.
    """
    search = search_of(graph)
    if objective is Objective.THROUGHPUT:
        cuts = [cut for cut in (shortest_bottleneck(search, costs).edge_nodes,) if search.goes_through_block(cut)]
    else:
        end_ms = search.end_costs(costs)
        if max_edge_bytes < math.inf:
            memory = memory_at_points(graph)
            end_ms[[memory[point].total_bytes > max_edge_bytes for point in search.ends]] = np.inf
        cuts = [cut.edge_nodes for cut in search.inner_cuts(costs, below_ms=float(end_ms.min()))]
    if max_edge_bytes == math.inf:
        return cuts

    def fits(cut: frozenset[int]) -> bool:
        return search.goes_through_block(cut) and edge_memory(graph, cut).total_bytes <= max_edge_bytes

    if not all(map(fits, cuts)):
        cuts += _priced_cuts(graph, costs)
    return list(filter(fits, dict.fromkeys(cuts)))


def _priced_cuts(graph: LayerGraph, costs: DagCosts) -> set[frozenset[int]]:
    parameter_bytes = np.array([float(sum(node.parameters.values())) for node in graph.nodes])
    usual_price = costs.edge_before_ms[-1] / max(parameter_bytes.sum(), 1.0)
    cuts: set[frozenset[int]] = set()
    for price in usual_price * PRICES:
        priced = replace(costs, edge_ms=costs.edge_ms + price * parameter_bytes)
        cuts.update(cut.edge_nodes for cut in search_of(graph).inner_cuts(priced, below_ms=np.inf))
    return cuts
