"""What the edge has to hold for its half of a network: the parameters of its nodes, and the tensors alive at once.

The half runs in the graph's order and lets go of a tensor behind its last reader; what crosses is kept to the end.
What a library's kernels need besides, and the process itself, is not counted.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from neurosurgeon.graph.layer_graph import LayerGraph


class EdgeMemory(NamedTuple):
    """Bytes of a half's parameters, and of the tensors that are alive when most are."""

    parameter_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.parameter_bytes + self.activation_bytes


def edge_memory(graph: LayerGraph, edge_nodes: Collection[int]) -> EdgeMemory:
    """Return what the edge half of a cut has to hold: of an image that only crosses, the pixels."""
    order = sorted(edge_nodes)
    if order == [0]:
        return EdgeMemory(0, graph.nodes[0].sent_bytes)
    kept = {node.index for node in graph.crossing(edge_nodes)}
    alive_until = {index: order[-1] if index in kept else index for index in order}
    for index in order:
        for read in graph.nodes[index].inputs:
            alive_until[read] = max(alive_until[read], index)
    alive, most = 0, 0
    leaving: dict[int, int] = {}
    for index in order:
        size_bytes = graph.nodes[index].output_bytes
        alive += size_bytes
        leaving[alive_until[index]] = leaving.get(alive_until[index], 0) + size_bytes
        most = max(most, alive)
        alive -= leaving.pop(index, 0)
    return EdgeMemory(graph.parameter_bytes(order), most)


@cache
def memory_at_points(graph: LayerGraph) -> tuple[EdgeMemory, ...]:
    """Return the same for every partition point, (layers + 1,), in one pass.

    What crosses a point is read behind it, so the tensors alive at a node are the same wherever the cut comes later.
    """
    size = len(graph.nodes)
    alive_until = list(range(size))
    for node in graph.nodes:
        for read in node.inputs:
            alive_until[read] = node.index
    changes = [0] * (size + 1)
    parameters: dict[str, int] = {}
    parameter_bytes = []
    for node, last in zip(graph.nodes, alive_until, strict=True):
        changes[node.index] += node.output_bytes
        changes[last + 1] -= node.output_bytes
        parameters.update(node.parameters)
        parameter_bytes.append(sum(parameters.values()))
    most = list(accumulate(accumulate(changes), max))
    last_nodes = [0, *(layer.nodes[-1].index for layer in graph.layers)]
    first, *others = (EdgeMemory(parameter_bytes[index], most[index]) for index in last_nodes)
    return (first._replace(activation_bytes=graph.nodes[0].sent_bytes), *others)
