"""The memory of an edge partition: the parameters of its nodes, and the tensors that are alive at the same time.

The partition runs in the graph's order and frees a tensor after its last reader. The boundary tensors are kept to the
end. Neither the workspace of kernels nor the process itself is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

from neurosurgeon.graph.layer_graph import LayerGraph


class EdgeMemory(NamedTuple):
    """Bytes of a partition's parameters, and the maximum over time of the bytes of all tensors alive."""

    parameter_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.parameter_bytes + self.activation_bytes


def edge_memory(graph: LayerGraph, edge_nodes: Collection[int]) -> EdgeMemory:
    """Return the memory of the edge partition of a cut; an image that is sent as it is counts as pixels."""
    order = sorted(edge_nodes)
    if order == [0]:
        return EdgeMemory(0, graph.nodes[0].sent_bytes)
    kept = {node.index for node in graph.boundary(edge_nodes)} | _makes_outputs(graph)
    return EdgeMemory(graph.parameter_bytes(order), _peaks_bytes(graph, order, kept)[-1])


def memory_at_points(graph: LayerGraph) -> tuple[EdgeMemory, ...]:
    """Return the memory of the edge partition for every partition point, (layers + 1,), in one pass.

    The boundary tensors of a point are read after it. So the tensors alive at a node are the same for all later points.
    """
    peaks_bytes = _peaks_bytes(graph, range(len(graph.nodes)), _makes_outputs(graph))
    needed: set[str] = set()
    added_bytes = []
    for node in graph.nodes:
        added_bytes.append(sum(size_bytes for name, size_bytes in node.parameters.items() if name not in needed))
        needed.update(node.parameters)
    parameter_bytes = list(accumulate(added_bytes))
    last_nodes = [0, *(layer.nodes[-1].index for layer in graph.layers)]
    first, *others = (EdgeMemory(parameter_bytes[index], peaks_bytes[index]) for index in last_nodes)
    return (first._replace(activation_bytes=graph.nodes[0].sent_bytes), *others)


def _makes_outputs(graph: LayerGraph) -> set[int]:
    return {output.node for output in graph.outputs if output.node is not None}


def _peaks_bytes(graph: LayerGraph, order: Sequence[int], kept: Collection[int]) -> list[int]:
    """Return the most bytes of tensors that were alive at once up to each node of an order, (order,).

    A tensor is freed after its last reader in the order; those of ``kept`` stay to the end.
    """
    alive_until = {index: order[-1] if index in kept else index for index in order}
    for index in order:
        for read in graph.nodes[index].inputs:
            alive_until[read] = max(alive_until[read], index)
    alive_bytes, most_bytes, peaks_bytes = 0, 0, []
    freed_bytes: Counter[int] = Counter()
    for index in order:
        size_bytes = graph.nodes[index].output_bytes
        freed_bytes[alive_until[index]] += size_bytes
        alive_bytes += size_bytes
        most_bytes = max(most_bytes, alive_bytes)
        peaks_bytes.append(most_bytes)
        alive_bytes -= freed_bytes[index]
    return peaks_bytes
