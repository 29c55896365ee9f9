"""The search for the best cut of any graph: an exact minimum cut (DADS, INFOCOM'19), no network is run.

A block ends at every node whose tensor is the only one alive. A cut inside a block is independent of all other blocks.
So the search compares the cuts at the ends of blocks by prefix sums, as in a chain. It finds the best cut inside every
block with one flow network: all blocks side by side between one source, the edge, and one sink, the cloud.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.planner.chain_search import Floats, sums_after, sums_before
from neurosurgeon.utils.errors import PlanningError

SOURCE, SINK = 0, 1  # nodes of the flow network
UNCUTTABLE = 2**30  # capacity; nearly twice as much is still an int32
NEGLIGIBLE_MS = 1e-9  # a search that cannot gain more is skipped


@dataclass(frozen=True)
class DagCosts:
    """The costs of a graph's nodes and tensors, (n,), and ``fixed_ms``, paid once if any tensor is sent; ms.

    ``send_ms`` is infinite for a tensor that cannot be sent.

    Raises: PlanningError: lengths differ, or a cost is negative or no number.
    """

    edge_ms: Floats
    send_ms: Floats
    cloud_ms: Floats
    fixed_ms: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.edge_ms) == len(self.send_ms) == len(self.cloud_ms):
            raise PlanningError("latencies on the edge, in the cloud and of sending differ in number")
        if not (np.isfinite(self.edge_ms).all() and np.isfinite(self.cloud_ms).all() and np.isfinite(self.fixed_ms)):
            raise PlanningError("a latency is not a number")
        if not all((costs >= 0).all() for costs in (self.edge_ms, self.send_ms, self.cloud_ms)):  # NaN >= 0 is false
            raise PlanningError("a latency is negative or not a number")

    @cached_property
    def edge_before_ms(self) -> Floats:
        """Latency of the first 0 ... n nodes on the edge, (n + 1,), ms."""
        return sums_before(self.edge_ms)

    @cached_property
    def cloud_after_ms(self) -> Floats:
        """Latency of all but the first 0 ... n nodes in the cloud, (n + 1,), ms."""
        return sums_after(self.cloud_ms)


class DagCut(NamedTuple):
    """The nodes on the edge, and the cost of this cut, ms."""

    edge_nodes: frozenset[int]
    cost_ms: float


class DagSearch:
    """The blocks of one graph and their flow network, built once; only capacities depend on latencies and the link.

    Every node has a latency on each side (DADS' light load, sec. IV). A tensor is sent at most once, however many nodes
    read it: one node of the flow network lies between it and its readers. No tensor returns from the cloud to the edge:
    reverse arcs are uncuttable. The input is on the edge. A node that reads nothing, such as a parameter, stays in the
    cloud if the end of the block before it does.

    Capacities are whole numbers; the cost of the best cut between blocks is 2^30. So the cut inside a block with m arcs
    costs at most m / 2^30 of this more than the best one. For the largest block of torchvision's networks, which is
    DenseNet-201's, that is 4 millionths. Costs between blocks are compared as they are: a chain gets its prefix sums.

    Args:   reads: for every node in execution order, the nodes whose outputs it reads, (n,); node 0 is the input.
            The output of the last node is wanted on the edge, so no tensor is sent if all nodes are there.
    Raises: PlanningError: a node reads one that does not come before it.
    """

    def __init__(self, reads: Sequence[Sequence[int]]) -> None:
        if not reads or any(not 0 <= index < node for node, inputs in enumerate(reads) for index in inputs):
            raise PlanningError("the nodes of a graph must come after all that they read")
        self.size = len(reads)
        self.reads = [sorted(set(inputs)) for inputs in reads]
        self.readers: list[list[int]] = [[] for _ in reads]
        for node, inputs in enumerate(self.reads):
            for index in inputs:
                self.readers[index].append(node)
        self.ends: list[int] = []  # (blocks,): nodes after which theirs is the only tensor alive; the last one, too
        last_reader = 0  # of all nodes so far
        for node, readers in enumerate(self.readers):
            if last_reader <= node:
                self.ends.append(node)
            last_reader = max([last_reader, *readers])
        self._network = _FlowNetwork(self.reads, self.readers, self.ends)

    def boundary(self, edge_nodes: Collection[int]) -> list[int]:
        """Return the nodes on the edge whose tensors are read in the cloud."""
        start = self.ends[self.block_of(edge_nodes)]
        return [
            node
            for node in sorted(edge_nodes)
            if node >= start and any(reader not in edge_nodes for reader in self.readers[node])
        ]

    def block_of(self, edge_nodes: Collection[int]) -> int:
        """Return the block of the last block end on the edge: a cut lies inside it, or right after that end."""
        return sum(end in edge_nodes for end in self.ends) - 1

    def goes_through_block(self, edge_nodes: Collection[int]) -> bool:
        """Return whether a cut lies inside a block: not between two, and not with all nodes on the edge."""
        return len(edge_nodes) != self.ends[self.block_of(edge_nodes)] + 1

    def best(self, costs: DagCosts) -> DagCut:
        """Return the cheapest cut; of equals, one between blocks, and the one with more in the cloud.

        Raises: PlanningError: the costs are not those of the graph's nodes.
        """
        end_ms = self.end_costs(costs)
        first = int(np.argmin(end_ms))
        inner = self.inner_cuts(costs, below_ms=float(end_ms[first]))
        return inner[0] if inner else DagCut(frozenset(range(self.ends[first] + 1)), float(end_ms[first]))

    def end_costs(self, costs: DagCosts) -> Floats:
        """Return the cost of a cut after every block end, (blocks,), ms; the last one has all nodes on the edge."""
        if len(costs.edge_ms) != self.size:
            raise PlanningError(f"{len(costs.edge_ms)} latencies do not make a graph of {self.size} nodes")
        ends = np.array(self.ends)
        total_ms = costs.edge_before_ms[ends + 1] + costs.send_ms[ends] + costs.cloud_after_ms[ends + 1]
        return np.append(total_ms[:-1] + costs.fixed_ms, costs.edge_before_ms[-1])

    def inner_cuts(self, costs: DagCosts, below_ms: float) -> list[DagCut]:
        """Return the best cut inside each block, if it costs less than ``below_ms``; the cheapest first."""
        if not self._network.interior.size or below_ms < NEGLIGIBLE_MS:
            return []
        on_edge, inner_ms = self._network.solve(costs, below_ms)
        ends = np.array((*self.ends, self.size))
        block_ms = costs.edge_before_ms[ends[:-1] + 1] + inner_ms + costs.cloud_after_ms[ends[1:]] + costs.fixed_ms
        chosen = self._network.interior[on_edge]
        bounds = np.searchsorted(chosen, ends)
        blocks = np.flatnonzero((bounds[:-1] < bounds[1:]) & (block_ms < below_ms))
        return [
            DagCut(
                frozenset((*range(ends[block] + 1), *chosen[bounds[block] : bounds[block + 1]].tolist())),
                float(block_ms[block]),
            )
            for block in blocks[np.argsort(block_ms[blocks], kind="stable")]
        ]


class _FlowNetwork:
    """All blocks of a graph that have nodes inside, side by side: the start of each is the source, its end the sink.

    An arc from the source is cut if its interior node is in the cloud, one to the sink if its node is on the edge. The
    other arcs are those of tensors, which cost the time to send them, and uncuttable ones. Costs come in this order.
    """

    def __init__(self, reads: Sequence[Sequence[int]], readers: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        nodes = np.arange(len(reads))
        blocks = np.searchsorted(ends, nodes, side="right") - 1  # the block of every node
        self.blocks = len(ends)
        self.interior = np.setdiff1d(nodes, ends)
        self._block_of_node = blocks[self.interior]
        names = {node: SINK + 1 + position for position, node in enumerate(self.interior.tolist())}
        inside = set(names.values())
        with_interior = set(self._block_of_node.tolist())
        tensors: list[tuple[int, int, int]] = []  # tail, head, node
        fixed: list[tuple[int, int, int]] = []
        self.size = SINK + 1 + len(names)
        for node, found in enumerate(readers):
            targets = {names.get(reader, SINK) for reader in found}
            if not targets or blocks[node] not in with_interior:
                continue
            tail = names.get(node, SOURCE)
            if len(targets) == 1 and {tail, *targets} <= inside:
                tensors.append((tail, targets.pop(), node))
            else:
                tensors.append((tail, self.size, node))
                fixed += [(self.size, head, node) for head in targets]
                self.size += 1
        for node, tail in names.items():
            fixed += [(tail, names[index], node) for index in reads[node] if index in names]
        self._sent = np.array([node for _, _, node in tensors], dtype=np.intp)
        inner = np.array(list(names.values()), dtype=np.intp)
        arcs = np.array([*tensors, *fixed], dtype=np.intp).reshape(-1, 3)
        tails = np.concatenate((np.full(len(inner), SOURCE), inner, arcs[:, 0]))
        heads = np.concatenate((inner, np.full(len(inner), SINK), arcs[:, 1]))
        self._order = np.lexsort((heads, tails))  # from the order of costs to that of a sparse matrix
        self._tails, self._heads = tails[self._order], heads[self._order].astype(np.int32)
        self._starts = np.searchsorted(self._tails, np.arange(self.size + 1)).astype(np.int32)
        self._block_of_arc = np.concatenate((self._block_of_node, self._block_of_node, blocks[arcs[:, 2]]))[self._order]

    def solve(self, costs: DagCosts, bound_ms: float) -> tuple[NDArray[np.bool_], Floats]:
        """Return whether each interior node is on the edge, (interior,), and the cost of each block, (blocks,), ms.

        Each block has its best cut. Only in blocks that cost more than ``bound_ms`` may a better one be missed.
        """
        from scipy.sparse import csr_array  # takes 0.2 s, which a chain does not need
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        edge_ms, cloud_ms = costs.edge_ms[self.interior], costs.cloud_ms[self.interior]
        gain_ms = cloud_ms - edge_ms
        uncuttable_ms = np.full(len(self._order) - 2 * len(self.interior) - len(self._sent), np.inf)
        costs_ms = (np.maximum(gain_ms, 0.0), np.maximum(-gain_ms, 0.0), costs.send_ms[self._sent], uncuttable_ms)
        lost_ms = np.concatenate(costs_ms)[self._order]
        if not np.isfinite(bound_ms):
            bound_ms = float(lost_ms[np.isfinite(lost_ms)].sum()) or 1.0
        capacities = np.rint(np.minimum(lost_ms, bound_ms) * (UNCUTTABLE / bound_ms)).astype(np.int32)
        graph = csr_array((capacities, self._heads, self._starts), shape=(self.size, self.size))
        residual = graph - maximum_flow(graph, SOURCE, SINK).flow
        on_edge = np.zeros(self.size, dtype=np.bool_)
        on_edge[breadth_first_order(residual, SOURCE, return_predecessors=False)] = True
        is_cut = on_edge[self._tails] & ~on_edge[self._heads]
        block_ms = np.zeros(self.blocks)
        block_ms += np.bincount(self._block_of_arc, np.where(is_cut, lost_ms, 0.0), minlength=self.blocks)
        block_ms += np.bincount(self._block_of_node, np.minimum(edge_ms, cloud_ms), minlength=self.blocks)
        return on_edge[SINK + 1 : SINK + 1 + len(self.interior)], block_ms
