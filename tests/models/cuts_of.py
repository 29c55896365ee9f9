"""Cuts of any graph, at random, their partitions, and tensors as they arrive over a wire."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neurosurgeon.engine.base import Side
from neurosurgeon.engine.torch_engine import as_array, as_tensor
from neurosurgeon.graph.layer_graph import LayerGraph
from neurosurgeon.models.build import TracedGraph
from neurosurgeon.models.partition import PartitionModule, partition_module
from neurosurgeon.net.header import pack_array, unpack_array


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
    """Yield valid cuts, each of some random nodes and all that they read."""
    draw = random.Random(seed)
    for _ in range(count):
        yield with_inputs(graph, draw.choices(range(len(graph.nodes)), k=draw.randint(1, 8)))


def over_the_wire(tensor: Tensor) -> Tensor:
    """Return a tensor as the other side gets it, in memory of its own."""
    spec, content = pack_array(as_array(tensor))
    return as_tensor(unpack_array(spec, memoryview(bytearray(content))))


class ModuleCut(NamedTuple):
    """The two partitions of a cut, as modules."""

    edge: PartitionModule
    cloud: PartitionModule


def cut_module(model: nn.Module, graph: TracedGraph, edge_nodes: Collection[int]) -> ModuleCut:
    """Return the partitions of any cut of any module."""
    return ModuleCut(*(partition_module(model, graph, edge_nodes, side) for side in Side))


def split_output(model: nn.Module, graph: TracedGraph, edge_nodes: frozenset[int], tensor: Tensor) -> Tensor:
    """Return the output of both partitions of a cut, one after the other."""
    edge, cloud = cut_module(model, graph, edge_nodes)
    with torch.inference_mode():
        made_on_edge = edge(tensor.clone())
        if len(edge_nodes) == len(graph.nodes):
            whole: Tensor = made_on_edge[0]
            return whole
        boundary = [over_the_wire(made) for made in made_on_edge]
        assert [made.shape for made in boundary] == [
            output.shape for node in graph.boundary(edge_nodes) for output in node.outputs
        ]
        output: Tensor = cloud(*boundary)[0]
    return output
