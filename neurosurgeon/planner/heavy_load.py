"""The cut of a graph for many tasks at once: the one with the shortest bottleneck among edge, link and cloud.

DADS (INFOCOM'19, sec. V) shows that this is NP-hard, and approximates it. A sum is at most three times its largest
part, so the cheapest cut has a bottleneck of at most three times the shortest one. The search here begins with that
cut. It continues with other weights of the three stages, larger ones for earlier bottlenecks. From the best cuts found
it walks to better ones in the same block. On 1000 random graphs of up to 12 nodes
(python -m tests.benchmark.decision) it ends at the shortest bottleneck 98 times in 100, and at most at 1.25 times that.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.planner.chain_search import Floats
from neurosurgeon.planner.dag_search import DagCosts, DagCut, DagSearch

ROUNDS = 4  # of weights
STARTS = 2  # cuts to walk from; more of either found nothing better on random graphs
WEIGHT_STEP = 2.0
TOO_LONG_MS = 1e100  # for a tensor that cannot be sent, instead of infinity: infinity times 0 is no number

Flags = NDArray[np.bool_]


def _cost_ms(cut: DagCut) -> float:
    return cut.cost_ms


def shortest_bottleneck(search: DagSearch, costs: DagCosts) -> DagCut:
    """Return a cut with a short bottleneck, at most three times the shortest one, and its length as the cost, ms.

    Args: costs: how long nodes keep the edge or the cloud busy, and tensors the link; ``fixed_ms`` is ignored.
    """
    best = _best_end(search, costs)
    found = [best]
    shares, weights = np.zeros(3), np.full(3, 1 / 3)
    for turn in range(1, ROUNDS + 1):
        send_ms = np.where(costs.send_ms > best.cost_ms, np.inf, weights[1] * costs.send_ms)
        edge_nodes = search.best(DagCosts(weights[0] * costs.edge_ms, send_ms, weights[2] * costs.cloud_ms)).edge_nodes
        busy_ms = busy_times(search, costs, edge_nodes)
        found.append(DagCut(edge_nodes, float(busy_ms.max())))
        best = min(best, found[-1], key=_cost_ms)
        shares += busy_ms / (busy_ms.max() or 1.0)
        weights = np.exp(WEIGHT_STEP * (shares - shares.max()) / np.sqrt(turn))
        weights /= weights.sum()
    starts = sorted(dict.fromkeys(found), key=_cost_ms)[:STARTS]
    walks = (_walk(search, costs, block, cut) for cut in starts for block in _touched(search, cut))
    return min(best, *walks, key=_cost_ms)


def busy_times(search: DagSearch, costs: DagCosts, edge_nodes: Collection[int]) -> Floats:
    """Return the times for which a cut keeps edge, link and cloud busy, (3,), ms."""
    on_edge = np.zeros(search.size, dtype=np.bool_)
    on_edge[list(edge_nodes)] = True
    send_ms = costs.send_ms[search.boundary(edge_nodes)].sum()
    return np.array([costs.edge_ms[on_edge].sum(), send_ms, costs.cloud_ms[~on_edge].sum()])


def _best_end(search: DagSearch, costs: DagCosts) -> DagCut:
    """Return the cut between blocks, or that with all nodes on the edge, with the shortest bottleneck."""
    ends = np.array(search.ends)
    send_ms = np.append(costs.send_ms[ends[:-1]], 0.0)
    longest_ms = np.max((costs.edge_before_ms[ends + 1], send_ms, costs.cloud_after_ms[ends + 1]), axis=0)
    block = int(np.argmin(longest_ms))
    return DagCut(frozenset(range(ends[block] + 1)), float(longest_ms[block]))


def _touched(search: DagSearch, cut: DagCut) -> tuple[int, ...]:
    """Return the block that a cut goes through, or both blocks if it lies between two."""
    block = search.block_of(cut.edge_nodes)
    return (block,) if search.goes_through_block(cut.edge_nodes) or not block else (block - 1, block)


# ---------------------------------------------------------------- walking inside a block


def _walk(search: DagSearch, costs: DagCosts, block: int, cut: DagCut) -> DagCut:
    """Return the best cut that steps inside a block lead to; each step goes to the best neighbour.

    A step moves a node to the edge with all nodes that it needs, or to the cloud with all nodes that need it.
    """
    inside = _Block(search, costs, block)
    on_edge = np.array([node in cut.edge_nodes for node in inside.nodes], dtype=np.bool_)
    if not on_edge.size:
        return cut
    cost_ms = tuple(inside.costs(on_edge[None])[0])
    while True:
        steps = np.where(on_edge[:, None], on_edge & ~inside.needs.T, on_edge | inside.needs)
        costs_ms = inside.costs(steps)
        step = np.lexsort(costs_ms.T[::-1])[0]
        if tuple(costs_ms[step]) >= cost_ms:
            chosen = np.array(inside.nodes)[on_edge].tolist()
            return DagCut(frozenset((*range(inside.nodes.start), *chosen)), float(cost_ms[0]))
        on_edge, cost_ms = steps[step], tuple(costs_ms[step])


class _Block:
    """The nodes between two block ends, (m,), their dependencies, and the costs of cuts among them."""

    def __init__(self, search: DagSearch, costs: DagCosts, block: int) -> None:
        from scipy.sparse import csr_array

        start, end = (*search.ends, search.size)[block : block + 2]
        self.nodes = range(start + 1, end)
        self.needs = np.eye(len(self.nodes), dtype=np.bool_)  # [node, the nodes on the edge if it is there]
        for position, node in enumerate(self.nodes):
            for index in search.reads[node]:
                if index > start:
                    self.needs[position] |= self.needs[index - start - 1]
        self._edge_ms, self._cloud_ms = costs.edge_ms[start + 1 : end], costs.cloud_ms[start + 1 : end]
        self._send_ms = np.minimum(costs.send_ms[start:end], TOO_LONG_MS)  # including the start of the block
        self._before_ms, self._after_ms = costs.edge_before_ms[start + 1], costs.cloud_after_ms[end]
        arcs = [(node - start, reader - start - 1) for node in range(start, end) for reader in search.readers[node]]
        inner = np.array([arc for arc in arcs if arc[1] < len(self.nodes)], dtype=np.intp).reshape(-1, 2)
        shape = (len(self.nodes) + 1, len(self.nodes))
        self._readers = csr_array((np.ones(len(inner), dtype=np.float32), inner.T), shape=shape)  # [tensor, node]
        self._leaves = np.zeros(shape[0], dtype=np.bool_)  # tensors that are read after the block
        self._leaves[[tensor for tensor, reader in arcs if reader >= len(self.nodes)]] = True

    def costs(self, cuts: Flags) -> Floats:
        """Return the longest stage of some cuts, and the sum of all three, (cuts, 2), ms.

        Args: cuts: whether each node is on the edge, (cuts, m); all nodes before the block are.
        """
        in_cloud = (~cuts).astype(np.float32)
        is_on_edge = np.concatenate((np.ones((len(cuts), 1), dtype=np.bool_), cuts), axis=1)
        is_sent = is_on_edge & (self._leaves | ((self._readers @ in_cloud.T).T > 0))
        busy_ms = np.stack(
            (
                self._before_ms + cuts @ self._edge_ms,
                is_sent @ self._send_ms,
                self._after_ms + in_cloud @ self._cloud_ms,
            )
        )
        return np.stack((busy_ms.max(axis=0), busy_ms.sum(axis=0)), axis=1)
