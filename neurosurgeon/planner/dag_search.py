"""The search for the best cut of any graph: an exact minimum cut (DADS, INFOCOM'19), no network is run.

Wherever a single tensor passes, a block ends. What is cut inside a block is independent of all other blocks, so the
search weighs the ends of blocks by prefix sums, as in a chain, and finds the best cut inside every block with one flow
network: all blocks side by side between one source, the edge, and one sink, the cloud.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurosurgeon.utils.errors import PlanningError

Floats = NDArray[np.float64]
SOURCE, SINK = 0, 1  # nodes of the flow network
UNCUTTABLE = 2**30  # capacity; nearly twice as much is still an int32
NEGLIGIBLE_MS = 1e-9  # no search is worth less


@dataclass(frozen=True)
class DagCosts:
    """What a graph's nodes and tensors cost, (n,), and what is paid once if anything crosses; ms.

    ``send_ms`` is infinite where a tensor must not cross. Raises PlanningError where a cost is none.
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
        if not all((costs >= 0).all() for costs in (self.edge_ms, self.send_ms, self.cloud_ms)):  # false for NaN, too
            raise PlanningError("a latency is negative or not a number")

    @cached_property
    def edge_before_ms(self) -> Floats:
        """Latency on the edge of the first 0 ... n nodes, (n + 1,)."""
        return np.concatenate(([0.0], np.cumsum(self.edge_ms)))

    @cached_property
    def cloud_after_ms(self) -> Floats:
        """Latency in the cloud of all but the first 0 ... n nodes, (n + 1,)."""
        return np.concatenate((np.cumsum(self.cloud_ms[::-1])[::-1], [0.0]))


class DagCut(NamedTuple):
    """The nodes on the edge, and what this costs; ms."""

    edge_nodes: frozenset[int]
    cost_ms: float


class DagSearch:
    """The blocks of one graph and their flow network, built once; only capacities depend on latencies and the link.

    Every node has a latency on each side (DADS' light load, sec. IV). A tensor crosses at most once, however many read
    it: one node of the flow network stands between it and its readers. Nothing returns from the cloud to the edge:
    reverse arcs are uncuttable. The input lives on the edge. A node that reads nothing, such as a parameter, stays in
    the cloud if the end of the block before it does.

    Capacities are whole numbers, with 2^30 for the cost of the best cut between blocks; the cut inside a block with m
    arcs costs at most m / 2^30 of this more than the best one: 4 millionths for the largest block of torchvision's
    networks, which is DenseNet-201's. Costs between blocks are compared as they are, so a chain gets its prefix sums.

    Args:   reads: for every node in execution order, the nodes whose outputs it reads, (n,); node 0 is the input.
            outputs: the nodes whose outputs are wanted; None: the last node's.
            wanted_in_cloud: outputs made on the edge must cross (default: they are wanted on the edge, so that with
            all nodes there nothing crosses).
    Raises: PlanningError: a node reads one that does not come before it.
    """

    def __init__(
        self, reads: Sequence[Sequence[int]], outputs: Sequence[int] | None = None, *, wanted_in_cloud: bool = False
    ) -> None:
        if not reads or any(not 0 <= index < node for node, inputs in enumerate(reads) for index in inputs):
            raise PlanningError("the nodes of a graph must come after all that they read")
        self.size = len(reads)
        self.reads = [sorted(set(inputs)) for inputs in reads]
        self.wanted_in_cloud = wanted_in_cloud
        wanted = {self.size - 1} if outputs is None else set(outputs)
        self.readers: list[list[int]] = [[] for _ in reads]
        for node, inputs in enumerate(self.reads):
            for index in inputs:
                self.readers[index].append(node)
        last_reader = [self.size if node in wanted else max([0, *found]) for node, found in enumerate(self.readers)]
        if wanted_in_cloud:
            for node in wanted:
                self.readers[node].append(self.size)
        self.ends = _single_passages(last_reader)  # (blocks,): nodes behind which theirs is the only tensor alive
        self._network = _FlowNetwork(self.reads, self.readers, self.ends)

    @property
    def has_interior(self) -> bool:
        """Whether any cut goes through a block, and not between two."""
        return bool(self._network.interior.size)

    def crossing(self, edge_nodes: Collection[int]) -> list[int]:
        """Return the nodes on the edge whose tensors are read in the cloud."""
        start = self.ends[self.block_of(edge_nodes)]
        return [
            node
            for node in sorted(edge_nodes)
            if node >= start and any(reader not in edge_nodes for reader in self.readers[node])
        ]

    def block_of(self, edge_nodes: Collection[int]) -> int:
        """Return the block that a cut goes through, or begins with: that of the last end on the edge."""
        return sum(end in edge_nodes for end in self.ends) - 1

    def goes_through_block(self, edge_nodes: Collection[int]) -> bool:
        """Return whether a cut is none between blocks, nor all on the edge."""
        return len(edge_nodes) not in (self.ends[self.block_of(edge_nodes)] + 1, self.size)

    def best(self, costs: DagCosts) -> DagCut:
        """Return the cheapest cut; of equals, one between blocks, and the one with more in the cloud.

        Raises: PlanningError: the costs are not those of the graph's nodes, or every cut needs a tensor to cross that
                must not.
        """
        end_ms = self.end_costs(costs)
        first = int(np.argmin(end_ms))
        inner = self.inner_cuts(costs, below_ms=float(end_ms[first]))
        if inner:
            return inner[0]
        if not np.isfinite(end_ms[first]):
            raise PlanningError("no cut is possible: each needs a tensor to cross that cannot be sent")
        last = self.ends[first] if first < len(self.ends) else self.size - 1
        return DagCut(frozenset(range(last + 1)), float(end_ms[first]))

    def end_costs(self, costs: DagCosts) -> Floats:
        """Return what it costs to cut behind every block, and to have all nodes on the edge, (blocks + 1,), ms."""
        if len(costs.edge_ms) != self.size:
            raise PlanningError(f"{len(costs.edge_ms)} latencies do not make a graph of {self.size} nodes")
        ends = np.array(self.ends)
        total_ms = costs.edge_before_ms[ends + 1] + costs.send_ms[ends] + costs.cloud_after_ms[ends + 1]
        end_ms = np.append(total_ms + costs.fixed_ms, costs.edge_before_ms[-1])
        if self.wanted_in_cloud:
            end_ms[-1] = np.inf
        elif self.ends[-1] == self.size - 1:
            end_ms[-2] = np.inf  # this is all on the edge, which pays no transfer
        return end_ms

    def inner_cuts(self, costs: DagCosts, below_ms: float) -> list[DagCut]:
        """Return the best cut inside each block, of those that cost less than ``below_ms``; cheapest first."""
        if not self.has_interior or below_ms < NEGLIGIBLE_MS:
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


def _single_passages(last_reader: Sequence[int]) -> tuple[int, ...]:
    """Return the nodes that no tensor passes by: none made before is read after."""
    found, reach = [], 0
    for node, last in enumerate(last_reader):
        if reach <= node:
            found.append(node)
        reach = max(reach, last)
    return tuple(found)


class _FlowNetwork:
    """All blocks of a graph that have nodes inside, side by side: the start of each is the source, its end the sink.

    Arcs are in the order of their costs: what each interior node loses in the cloud, what each loses on the edge, what
    each tensor costs that crosses, and those that must not be cut.
    """

    def __init__(self, reads: Sequence[Sequence[int]], readers: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        nodes = np.arange(len(reads))
        blocks = np.searchsorted(ends, nodes, side="right") - 1
        self.interior = np.setdiff1d(nodes, ends)
        self.blocks = len(ends)
        names = {node: SINK + 1 + position for position, node in enumerate(self.interior.tolist())}
        inside = set(names.values())
        with_interior = set(blocks[self.interior].tolist())
        tensors: list[tuple[int, int, int]] = []  # tail, head, node
        fixed: list[tuple[int, int, int]] = []
        self.size = SINK + 1 + len(names)
        for node, found in enumerate(readers):
            heads = {names.get(reader, SINK) for reader in found}
            if not heads or blocks[node] not in with_interior:
                continue
            tail = names.get(node, SOURCE)
            if len(heads) == 1 and {tail, *heads} <= inside:
                tensors.append((tail, heads.pop(), node))
            else:
                tensors.append((tail, self.size, node))
                fixed += [(self.size, head, node) for head in heads]
                self.size += 1
        for node, tail in names.items():
            fixed += [(tail, names[index], node) for index in reads[node] if index in names]
        self._sent = np.array([node for _, _, node in tensors], dtype=np.intp)
        inner = np.array(list(names.values()), dtype=np.intp)
        arcs = np.array([*tensors, *fixed], dtype=np.intp).reshape(-1, 3)
        self._tails = np.concatenate((np.full(len(inner), SOURCE), inner, arcs[:, 0]))
        self._heads = np.concatenate((inner, np.full(len(inner), SINK), arcs[:, 1]))
        self._block_of_arc = blocks[np.concatenate((self.interior, self.interior, arcs[:, 2]))]
        self._block_of_node = blocks[self.interior]
        self._fixed = np.full(len(fixed), np.inf)
        self._order = np.lexsort((self._heads, self._tails))
        self._indices = self._heads[self._order].astype(np.int32)
        counts = np.bincount(self._tails, minlength=self.size)
        self._starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)

    def solve(self, costs: DagCosts, bound_ms: float) -> tuple[NDArray[np.bool_], Floats]:
        """Return which interior nodes are on the edge in the best cut of each block, and what each block then costs.

        The first is (interior,), the second (blocks,), ms. Blocks that cost more than ``bound_ms`` may be cut badly.
        """
        from scipy.sparse import csr_array  # 0.2 s, for which a chain need not wait
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        edge_ms, cloud_ms = costs.edge_ms[self.interior], costs.cloud_ms[self.interior]
        gain_ms = cloud_ms - edge_ms
        lost_ms = np.concatenate(
            (np.maximum(gain_ms, 0.0), np.maximum(-gain_ms, 0.0), costs.send_ms[self._sent], self._fixed)
        )
        if not np.isfinite(bound_ms):
            bound_ms = float(lost_ms[np.isfinite(lost_ms)].sum()) or 1.0
        capacities = np.rint(np.minimum(lost_ms, bound_ms) * (UNCUTTABLE / bound_ms)).astype(np.int32)
        graph = csr_array((capacities[self._order], self._indices, self._starts), shape=(self.size, self.size))
        residual = graph - maximum_flow(graph, SOURCE, SINK).flow
        on_edge = np.zeros(self.size, dtype=np.bool_)
        on_edge[breadth_first_order(residual, SOURCE, return_predecessors=False)] = True
        is_cut = on_edge[self._tails] & ~on_edge[self._heads]
        block_ms = np.zeros(self.blocks)
        np.add.at(block_ms, self._block_of_arc, np.where(is_cut, lost_ms, 0.0))
        np.add.at(block_ms, self._block_of_node, np.minimum(edge_ms, cloud_ms))
        return on_edge[SINK + 1 : SINK + 1 + len(self.interior)], block_ms
