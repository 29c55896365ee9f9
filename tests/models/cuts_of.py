"""Cuts of any graph at random, and tensors as a wire hands them over."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.partition import cut
from neurosurgeon.net.header import pack_tensor, unpack_tensor


def with_inputs(graph: LayerGraph, nodes: Iterable[int]) -> frozenset[int]:
    """Return the smallest cut that has these nodes on the edge."""
    found, todo = {0}, list(nodes)
    while todo:
        index = todo.pop()
        if index not in found:
            found.add(index)
            todo += graph.nodes[index].inputs
    return frozenset(found)


def random_cuts(graph: LayerGraph, count: int, seed: int = 0) -> Iterator[frozenset[int]]:
    """Yield valid cuts, each of some random nodes and all that they need."""
    draw = random.Random(seed)
    for _ in range(count):
        yield with_inputs(graph, draw.choices(range(len(graph.nodes)), k=draw.randint(1, 8)))


def over_the_wire(tensor: Tensor) -> Tensor:
    """Return a tensor as the other side gets it, in memory of its own."""
    spec, content = pack_tensor(tensor)
    return unpack_tensor(spec, memoryview(bytearray(content)))


def split_output(model: nn.Module, graph: LayerGraph, edge_nodes: frozenset[int], tensor: Tensor) -> Tensor:
    """Return what both halves of a cut compute together."""
    edge, cloud = cut(model, graph, edge_nodes)
    with torch.inference_mode():
        crossing = [over_the_wire(made) for made in edge(tensor.clone())]
        assert [made.shape for made in crossing] == [
            output.shape for node in graph.crossing(edge_nodes) for output in node.outputs
        ]
        output: Tensor = cloud(*crossing)[0]
    return output
