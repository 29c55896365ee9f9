"""Networks and partitions for tests: each network is loaded once, and inputs are arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from neurosurgeon.engine.base import SEEDED, PartitionResult, Side, WeightsSource
from neurosurgeon.engine.torch_engine import TorchEngine, TorchNetwork, TorchPartition, as_array
from neurosurgeon.graph.spec import Array, TensorSpec, synthetic_input
from neurosurgeon.models.build import TracedGraph, trace
from neurosurgeon.models.names import Catalogue
from neurosurgeon.models.preprocess import as_network_input
from neurosurgeon.models.program import Example

INPUT_SHAPE = (1, 3, 224, 224)
ENGINE = TorchEngine()
Network = TorchNetwork


class Cut(NamedTuple):
    """The two partitions of a cut."""

    edge: TorchPartition
    cloud: TorchPartition


def model_graph(name: str) -> TracedGraph:
    """Return the graph of a network."""
    return ENGINE.graph(name)


def skeleton(name: str) -> nn.Module:
    """Return a network without weights."""
    return Catalogue().build_module(Catalogue().canonical_name(name))


@cache
def load_network(name: str, weights: WeightsSource = SEEDED) -> TorchNetwork:
    """Return a network, loaded once for all tests."""
    return ENGINE.open(name, weights)


def cut(network: TorchNetwork, point: int) -> Cut:
    """Return the partitions at a partition point."""
    return split(network, network.graph.edge_nodes(point))


def split(network: TorchNetwork, edge_nodes: frozenset[int]) -> Cut:
    """Return the partitions of any cut."""
    return Cut(*(network.partition(edge_nodes, side) for side in Side))


def run(partition: TorchPartition, arrays: Sequence[Array]) -> PartitionResult:
    """Run a partition on copies of arrays."""
    result = partition.run([array.copy("K") for array in arrays])
    assert result is not None
    return result


def pixels(shape: tuple[int, ...] = INPUT_SHAPE) -> Array:
    """Return the input of a task that has none."""
    return synthetic_input(TensorSpec(shape))


def random_input(shape: tuple[int, ...] = INPUT_SHAPE) -> Array:
    """Return the same as values, float32."""
    return as_array(as_network_input(torch.from_numpy(pixels(shape)), "cpu"))


def run_whole(network: TorchNetwork, array: Array) -> Array:
    """Return the output of the unsplit network, as the engine runs it."""
    return run(network.partition(network.graph.edge_nodes(len(network.graph.layers)), Side.EDGE), [array]).arrays[0]


def trace_module(model: nn.Module, shape: tuple[int, ...], name: str = "own", *, is_own: bool = True) -> TracedGraph:
    """Return the graph of a module for one input of this shape; as a network known by name, unless it is the user's."""
    return trace(model.eval(), name, Example.of(torch.randn(shape)), is_own=is_own)
